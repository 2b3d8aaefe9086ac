"""Language names as Qwen3-ASR writes them, from the codes that manifests and data sets use."""

from __future__ import annotations

_NAMES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fa": "Persian", "fi": "Finnish", "fil": "Filipino", "fr": "French", "hi": "Hindi", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "mk": "Macedonian", "ms": "Malay",
    "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "th": "Thai",
    "tl": "Filipino", "tr": "Turkish", "vi": "Vietnamese", "yue": "Cantonese", "zh": "Chinese",
}  # fmt: skip
"""ISO 639 codes of the languages that Qwen3-ASR supports (qwen_asr.inference.utils.SUPPORTED_LANGUAGES)."""

NAMES = tuple(sorted(set(_NAMES.values())))
"""Their names as Qwen3-ASR writes them."""

_SCRIPTS = {
    "Arabic": ("Arabic",), "Cantonese": ("Han",), "Chinese": ("Han",), "Greek": ("Greek",), "Hindi": ("Devanagari",),
    "Japanese": ("Han", "Hiragana", "Katakana"), "Korean": ("Hangul", "Han"), "Macedonian": ("Cyrillic",),
    "Persian": ("Arabic",), "Russian": ("Cyrillic",), "Thai": ("Thai",),
}  # fmt: skip


def scripts(languages: str | None) -> tuple[str, ...]:
    """Unicode scripts that a language is written in, of several by comma together; () where one is not known."""
    names = [language_name(name) for name in (languages or "").split(",")]
    if not all(name in NAMES for name in names):
        return ()
    return tuple(dict.fromkeys(script for name in names for script in _SCRIPTS.get(name, ("Latin",))))


def language_name(name_or_code: str) -> str:
    """ "en", "en-US" and "english" give "English"; what is not known comes back as it is, for the engine to judge."""
    text = name_or_code.strip().replace("_", "-")
    code = text.lower().partition("-")[0]
    if code in _NAMES:
        return _NAMES[code]
    return next((name for name in _NAMES.values() if name.lower() == text.lower()), name_or_code)


def is_known(name: str) -> bool:
    """True for a name as Qwen3-ASR writes it."""
    return name in _NAMES.values()


def language_code(name: str) -> str:
    """The ISO 639 code of a name as Qwen3-ASR writes it ("Filipino": "fil"); another name comes back as it is."""
    return next((code for code, known in _NAMES.items() if known == name), name)

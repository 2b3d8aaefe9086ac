"""What stands around the audio of a stream, and what the model writes after it."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from pipeline.engine.causal.state import Prompt, StreamError
from pipeline.engine.model import LoadedModel, SegmentError
from pipeline.engine.tokens import token_ends
from pipeline.schema import Segment

_MOST = 1000  # that are remembered
_NEVER_SAID = ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>", "<|im_start|>")


class Prompts:
    """Prompts of a model, by forced language and context."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._tokenizer = loaded.processor.tokenizer
        self._audio_token_id: int = loaded.model.thinker.config.audio_token_id
        self._known: dict[tuple[str | None, str], Prompt] = {}

    @property
    def never_said(self) -> tuple[int, ...]:
        """Ids of the prompt's own tokens, which qwen3_asr_causal suppresses, too."""
        vocabulary = self._tokenizer.get_vocab()
        return tuple(vocabulary[token] for token in _NEVER_SAID if token in vocabulary)

    def __call__(self, language: str | None, context: str) -> Prompt:
        """Raises StreamError for a language or context that the model cannot take."""
        key = (language, context)
        if key not in self._known:
            if len(self._known) >= _MOST:
                self._known.clear()
            try:
                text, forced = self._loaded.prompt(Segment("", np.zeros(0, np.int16), language, context))
            except SegmentError as error:
                raise StreamError(error.code, str(error)) from error
            ids = self._tokenizer(text)["input_ids"]
            at = ids.index(self._audio_token_id)
            self._known[key] = Prompt(ids[:at], ids[at + 1 :], forced)
        return self._known[key]

    def said(self, token_ids: list[int]) -> tuple[str, str, str]:
        """Language, text and raw text of what the model has written."""
        raw: str = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return *parsed(raw), raw

    def head(self, token_ids: list[int], raw: str, text: str, num_chars: int) -> tuple[list[int], str]:
        """Of what the model has written, `raw`, the tokens and raw text that make the first `num_chars` characters of
        its `text`."""
        end = raw.rfind(text) + num_chars
        return token_ids[: bisect_left(token_ends(self._tokenizer, token_ids, raw), end) + 1], raw[:end]


def parsed(raw: str) -> tuple[str, str]:
    """Language and text of `language English<asr_text>...`, as the model writes where no language is forced; both are
    empty for `language None`, no speech."""
    before, tag, text = raw.rpartition("<asr_text>")
    if not tag and not raw.startswith("language "):
        return "", raw.strip()
    language = (before if tag else raw).partition("language ")[2].strip()
    return ("" if language == "None" else language), text.strip() if tag else ""

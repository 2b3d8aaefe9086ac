"""What is scored: references with the hypotheses of one system, from a JSONL file or (recordings.py) from outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import redact, storage
from pipeline.config import ConfigError
from pipeline.languages import is_known, language_name
from pipeline.schema import Status

UNKNOWN = "unknown"
"""The language of an item that names none: scored by word, with the basic normalizer."""

_ID_KEYS = ("id", "audio_id", "audio_filepath")


@dataclass(frozen=True, slots=True)
class Item:
    """A recording's reference and what a system wrote for it; `hypothesis` is None where it failed.

    `language` is the reference's, `detected` what the system took it for. `avg_logprob` is the mean over all tokens,
    `filter_reasons` what any part of it was caught by.
    """

    item_id: str
    reference: str
    hypothesis: str | None
    language: str
    set_name: str = ""
    duration_s: float | None = None
    detected: str | None = None
    avg_logprob: float | None = None
    filter_reasons: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.hypothesis or ""

    @property
    def status(self) -> Status:
        """As of a row; failed where any part of it failed."""
        if self.hypothesis is None or "failed" in self.filter_reasons:
            return "failed"
        return "ok" if self.hypothesis.strip() else "empty"


@dataclass(frozen=True, slots=True)
class Row:
    """What a funnel needs of a row: its seconds (None where nobody said) and the reason codes of its filters."""

    duration_s: float | None
    filter_reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class System:
    """What one system said. `rows` are all that it wrote, those without a reference, too; `made_by` says what engine
    and model that was, empty where nobody knows; `rtfx` is audio seconds a second of its newest run."""

    name: str
    items: list[Item]
    rows: list[Row]
    num_without_reference: int = 0
    made_by: dict[str, Any] = field(default_factory=dict)
    rtfx: float | None = None

    @property
    def num_without_language(self) -> int:
        return sum(item.language == UNKNOWN for item in self.items)


def read_hypotheses(path: str, options: storage.Options, language: str | None = None) -> System:
    """The system of a JSONL file: `reference` and `hypothesis` (null: failed) on every line; `language`, `id`, `set`,
    `duration`, `detected`, `avg_logprob` and `filter_reasons` where there are.

    `language` overrides the lines' own. Raises ConfigError that names file, line and mistake.
    """
    url, shown = storage.resolve(path), redact.names(path)
    items: dict[str, Item] = {}
    lines: dict[str, int] = {}
    with storage.open_read(url, options) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = _parse(line, f"line {number}", language)
            except ValueError as error:
                raise ConfigError(f"{shown}, line {number}: {error}") from None
            if item.item_id in items:
                first = lines[item.item_id]
                raise ConfigError(f"{shown}, line {number}: the id {item.item_id!r} is that of line {first}, too")
            items[item.item_id], lines[item.item_id] = item, number
    if not items:
        raise ConfigError(f'{shown} is empty; a line is {{"reference": "...", "hypothesis": "...", "language": "en"}}')
    found = list(items.values())
    return System(shown, found, [Row(item.duration_s, item.filter_reasons) for item in found])


def checked_language(language: str) -> str:
    """The name as Qwen3-ASR writes it; of several by comma the first decides. Raises ConfigError for an unknown one."""
    main, comma, others = language.partition(",")
    name = language_name(main)
    if not is_known(name):
        raise ConfigError(
            f"language {language!r} is none that Qwen3-ASR knows; write a name or an ISO code: English, vi, zh-CN"
        )
    return name + comma + others


def pooled(systems: Sequence[System]) -> System:
    """Several test sets of one system as one. Raises ConfigError when two hold the same recording."""
    if len(systems) == 1:
        return systems[0]
    owner: dict[str, System] = {}
    for system in systems:
        for item in system.items:
            first = owner.setdefault(item.item_id, system)
            if first is not system:
                raise ConfigError(f"{item.item_id} is in {first.name} and in {system.name}; a recording counts once")
    return System(
        ", ".join(system.name for system in systems),
        [item for system in systems for item in system.items],
        [row for system in systems for row in system.rows],
        sum(system.num_without_reference for system in systems),
        systems[0].made_by,
    )


def only_kept(system: System) -> System:
    """The items that no filter caught, in any of their parts."""
    return replace(system, items=[item for item in system.items if not item.filter_reasons])


def _parse(line: bytes, name: str, language: str | None) -> Item:
    """Raises ValueError with what is wrong with the line."""
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON {type(fields).__name__}, where an object is right")
    for key in ("reference", "hypothesis"):
        if key not in fields:
            raise ValueError(f"no `{key}`; its keys are {', '.join(fields) or 'none'}")
    item_id = next((fields[key] for key in _ID_KEYS if fields.get(key) is not None), name)
    reference = _text(fields, "reference")
    if reference is None:
        raise ValueError("`reference` is null, and there is nothing to score against")
    given = language or _text(fields, "language")
    logprob = _number(fields, "avg_logprob")
    duration_s = _number(fields, "duration")
    if duration_s is not None and duration_s < 0:
        raise ValueError(f"`duration` is {duration_s}, and below 0")
    return Item(
        item_id=redact.printable(str(item_id)),
        reference=reference,
        hypothesis=_text(fields, "hypothesis"),
        language=checked_language(given) if given else UNKNOWN,
        set_name=_text(fields, "set") or "",
        duration_s=duration_s,
        detected=_text(fields, "detected"),
        avg_logprob=logprob,
        filter_reasons=tuple(_texts(fields, "filter_reasons")),
    )


def _text(fields: dict[str, Any], key: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"`{key}` is a {type(value).__name__}, where a string is right")
    return None if value is None else redact.printable(value)


def _number(fields: dict[str, Any], key: str) -> float | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"`{key}` is {value!r}, where a number is right")
    return float(value)


def _texts(fields: dict[str, Any], key: str) -> Iterator[str]:
    value = fields.get(key) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"`{key}` is {value!r}, where a list of strings is right")
    yield from value

"""What a model is calibrated and trained on: stretches of speech with a text, from NeMo manifests and from the outputs
of `shardscribe transcribe`, whose `keep` rows are pseudo-labels. A reference is read here, its audio in `audio`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline import listing, storage
from pipeline.config import ConfigError
from pipeline.languages import language_name
from pipeline.redact import HIDDEN
from pipeline.sources import manifest

_COLUMNS = [
    "segment_id", "recording_id", "audio_filepath", "channel", "offset", "duration", "text", "language", "token_ids",
    "keep", "unit_id", "model_id", "model_revision",
]  # fmt: skip
_KEPT = [("keep", "==", True), ("language", "!=", "")]
_READERS = 16


@dataclass(frozen=True, slots=True)
class ExampleRef:
    """Where a stretch of speech lies, and what is said in it.

    `audio` is a file, `<tar>/<member>` or `<parquet>#<row>`, `recording_id` what the run called the recording (the
    audio's own name for a manifest) and `split_id` what it was read in; `channel` None is all, mixed. `language` is a
    name ("English"). `token_ids` are what the model `teacher` (id@revision) wrote, the end token among them; empty and
    "" for a manifest. `audio_columns` are the columns that audio of Parquet may stand in.
    """

    example_id: str
    audio: str
    offset_s: float
    duration_s: float
    text: str
    language: str
    recording_id: str
    split_id: str = ""
    channel: int | None = None
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    teacher: str = ""
    logits: str = ""
    audio_columns: tuple[str, ...] = ("audio",)


def read_examples(
    sources: Sequence[str],
    options: storage.Options,
    languages: Sequence[str] = (),
    min_s: float = 0.0,
    max_s: float = 30.0,
    with_text: bool = True,
) -> list[ExampleRef]:
    """The examples of all sources in order, from `min_s` to `max_s` seconds long: of `languages` (names or codes), or
    of every one where none is named.

    A source is a NeMo manifest (each line with `duration`, `lang` and, unless `with_text` is False, `text`) or the
    output folder of a transcribe job.
    Raises ConfigError for a source without examples, and for a language that none of them has.
    """
    wanted = {language_name(name) for name in languages}
    refs: list[ExampleRef] = []
    there: set[str] = set()
    for source in sources:
        url = storage.resolve(source)
        is_output = storage.exists(storage.join(url, "shardscribe.yaml"), options)
        num_found = 0
        for ref in _pseudo_labels(url, options) if is_output else _manifest(url, options, with_text):
            num_found += 1
            if min_s <= ref.duration_s <= max_s:
                there.add(ref.language)
                if not wanted or ref.language in wanted:
                    refs.append(ref)
        if num_found == 0:
            what = "no row with `keep`" if is_output else "no line"
            raise ConfigError(f"{source} has {what}: there is nothing to learn from")
    if missing := sorted(wanted - there) or (not there and ["any language"]):
        raise ConfigError(
            f"{', '.join(sources)}: no examples of {' and '.join(missing)} from {min_s:g} to {max_s:g} s; there are "
            f"{', '.join(sorted(there)) or 'none'}"
        )
    return refs


def _manifest(url: str, options: storage.Options, with_text: bool) -> Iterator[ExampleRef]:
    if not url.lower().endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
        raise ConfigError(
            f"{url} is neither a NeMo manifest (.jsonl) nor an output of `shardscribe transcribe`, which has a "
            "shardscribe.yaml"
        )
    for number, entry in manifest.entries(url, options):
        missing = [
            name
            for name, value in (("duration", entry.duration_s), ("text", entry.text), ("lang", entry.language))
            if not value and (with_text or name != "text")
        ]
        if missing or entry.duration_s is None or entry.language is None:
            raise ConfigError(f"{url}:{number} has no {' and no '.join(missing)}, which an example needs")
        audio = storage.join(storage.folder_of(url), entry.audio_filepath)
        yield ExampleRef(
            example_id=f"{url}#{number}",
            audio=audio,
            offset_s=entry.offset_s,
            duration_s=entry.duration_s,
            text=entry.text or "",
            language=language_name(entry.language),
            recording_id=audio,
        )


def _pseudo_labels(url: str, options: storage.Options) -> Iterator[ExampleRef]:
    """The `keep` rows of an output whose language was found, in the order of its units."""
    inputs = yaml.safe_load(storage.read_bytes(storage.join(url, "shardscribe.yaml"), options))["config"]["inputs"]
    columns = tuple(dict.fromkeys(source["audio_column"] for source in inputs))
    folder = storage.join(url, "transcripts")
    names = [name for name in listing.file_names(folder, options) if name.endswith(".parquet")]
    with ThreadPoolExecutor(_READERS) as pool:
        for name, table in zip(
            names, pool.map(lambda name: _kept(storage.join(folder, name), options), names), strict=True
        ):
            logits = storage.join(storage.join(url, "logits"), name)
            for row in table.to_pylist():
                if HIDDEN in row["audio_filepath"]:
                    raise ConfigError(
                        f"{url}: {row['audio_filepath']} was read with credentials in its URL, which no output keeps; "
                        "put them under storage.options and transcribe again"
                    )
                yield ExampleRef(
                    example_id=row["segment_id"],
                    audio=row["audio_filepath"],
                    offset_s=row["offset"],
                    duration_s=row["duration"],
                    text=row["text"],
                    language=row["language"],
                    recording_id=row["recording_id"],
                    split_id=row["unit_id"].partition("-")[0],
                    channel=row["channel"],
                    token_ids=array("i", row["token_ids"] or ()),
                    teacher=f"{row['model_id']}@{row['model_revision']}",
                    logits=logits,
                    audio_columns=columns,
                )


def _kept(url: str, options: storage.Options) -> pa.Table:
    try:
        with storage.open_read(url, options) as file:
            return pq.read_table(file, columns=_COLUMNS, filters=_KEPT, use_threads=False)
    except pa.ArrowInvalid as error:
        raise storage.StorageError(f"{url} is no readable unit: {error}; delete it and run the job again") from error

"""Parquet data sets of audio: splits are runs of consecutive row groups that fill a unit."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import ConfigError, InputConfig
from pipeline.listing import FileInfo
from pipeline.sources.sample import Filler, Sample, text_or_none
from pipeline.units import Split, estimated_seconds

UNKNOWN_S = 30.0
"""Estimate for audio whose size only its own store knows: asking for each would cost a request, and an answer that
changes (a file that turns up later) would move units."""

_BATCH_BYTES = 16 << 20


def plan(
    infos: Iterable[FileInfo], config: InputConfig, options: storage.Options, target_s: float, input_index: int
) -> Iterator[Split]:
    """Items are `[[url, first row group, number of row groups, first row, audio, text and language column]]`."""
    for info in infos:
        with _opened(info.url, options) as file:
            metadata, columns = file.metadata, _columns(info.url, file.schema_arrow, config)
            has_bytes = not _holds_paths(file.schema_arrow.field(config.audio_column).type)
        filler = Filler(target_s)
        first_row = 0
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        sizes = [_audio_bytes(group, config.audio_column) for group in groups]
        seconds = [
            estimated_seconds("", size) if has_bytes else UNKNOWN_S * group.num_rows
            for group, size in zip(groups, sizes, strict=True)
        ]
        for _, members in groupby(range(len(groups)), key=lambda i: filler.run_of(seconds[i])):  # noqa: B023
            run = list(members)
            yield Split(
                "parquet",
                [[info.url, run[0], len(run), first_row, *columns]],
                sum(sizes[i] for i in run),
                sum(seconds[i] for i in run),
                input_index,
            )
            first_row += sum(groups[i].num_rows for i in run)


def samples(split: Split, options: storage.Options) -> Iterator[Sample]:
    """A sample for each row. Audio comes as bytes, as Hugging Face's struct{bytes, path}, or as a path or URL relative
    to the file's folder."""
    url, first_group, num_groups, row, audio, text, language = split.items[0]
    with _opened(url, options) as file:
        groups = list(range(first_group, first_group + num_groups))
        metadata = [file.metadata.row_group(i) for i in groups]
        num_rows = max(sum(group.num_rows for group in metadata), 1)
        row_bytes = max(sum(_audio_bytes(group, audio) for group in metadata) // num_rows, 1)
        wanted = [column for column in (audio, text, language) if column]
        for batch in file.iter_batches(max(1, min(256, _BATCH_BYTES // row_bytes)), groups, wanted):
            for i in range(batch.num_rows):
                yield _sample(url, row, batch, i, (audio, text, language), options)
                row += 1


def _sample(
    url: str,
    row: int,
    batch: pa.RecordBatch,
    i: int,
    columns: tuple[str, str | None, str | None],
    options: storage.Options,
) -> Sample:
    audio, text, language = columns
    content, path = _content_and_path(batch.column(audio)[i])
    name = f"{url}#{row}" + (f"/{path.rsplit('/', 1)[-1]}" if path else "")
    sample = Sample(
        recording_id=name,
        audio_filepath=name,
        estimated_s=0.0,
        text_ref=text_or_none(batch.column(text)[i].as_py()) if text else None,
        language=text_or_none(batch.column(language)[i].as_py()) if language else None,
    )
    if content is not None:
        sample.estimated_s = estimated_seconds(path or "", len(content.as_buffer()))
        sample.open = lambda: io.BytesIO(content.as_py())
    elif path:
        sample.estimated_s = UNKNOWN_S
        sample.open = partial(storage.fetch, storage.join(storage.folder_of(url), path), options)
    else:
        sample.error = f"no_audio: row {row} of {url} is null in column '{audio}'"
    return sample


def _content_and_path(value: Any) -> tuple[Any | None, str | None]:
    """The audio as a binary scalar, the path beside or instead of it; None for what is null."""
    if not value.is_valid:
        return None, None
    if pa.types.is_struct(value.type):
        names = [field.name for field in value.type]
        content = value["bytes"] if "bytes" in names and value["bytes"].is_valid else None
        return content, value["path"].as_py() if "path" in names else None
    return (None, value.as_py()) if _holds_paths(value.type) else (value, None)


def _holds_paths(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _columns(url: str, schema: pa.Schema, config: InputConfig) -> tuple[str, str | None, str | None]:
    """The audio, text and language column to read. Text and language may be absent unless the config names them."""
    chosen: list[str | None] = [config.audio_column]
    for option in ("text_column", "language_column"):
        name = getattr(config, option)
        chosen.append(name if name in schema.names or option in config.model_fields_set else None)
    for name in chosen:
        if name is not None and name not in schema.names:
            raise ConfigError(f"{url} has no column '{name}'; it has {', '.join(schema.names)}")
    kind = schema.field(config.audio_column).type
    in_struct = pa.types.is_struct(kind) and any(field.name in ("bytes", "path") for field in kind)
    if not (in_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _holds_paths(kind)):
        raise ConfigError(
            f"{url}: column '{config.audio_column}' is {kind}; audio is binary, "
            "struct{bytes, path}, or string (a path)"
        )
    return config.audio_column, chosen[1], chosen[2]


def _audio_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    """Bytes of the audio column in the file: audio hardly compresses further, so these are the audio's own."""
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".", 1)[0] == column)


class _opened:
    """A ParquetFile that streams its column chunks (`pre_buffer` would hold whole row groups)."""

    def __init__(self, url: str, options: storage.Options) -> None:
        self._url = url
        self._file = storage.open_read(url, options)

    def __enter__(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._file, pre_buffer=False, buffer_size=1 << 20)
        except pa.ArrowInvalid as error:
            self._file.close()
            raise ConfigError(f"{self._url} is no Parquet file: {error}") from error

    def __exit__(self, *_: object) -> None:
        self._file.close()

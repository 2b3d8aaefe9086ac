"""Parquet data sets of audio: splits are runs of consecutive row groups that fill a unit."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import redact, storage
from pipeline.config import ConfigError, InputConfig
from pipeline.listing import FileInfo
from pipeline.sources.fetch import fetch
from pipeline.sources.sample import Filler, Sample
from pipeline.units import Split, estimated_seconds

UNKNOWN_S = 30.0
"""Estimate for audio whose size only its own store knows: asking for each would cost a request, and an answer that
changes (a file that turns up later) would move units."""

_BATCH_BYTES = 16 << 20
_DAMAGE = (pa.ArrowException, OSError)  # what pyarrow raises over a file that is not right


def plan(
    infos: Iterable[FileInfo], config: InputConfig, options: storage.Options, target_s: float, input_index: int
) -> Iterator[Split]:
    """Items are `[[url, first row group, number of row groups, first row, audio, text and language column]]`."""
    for info in infos:
        with _opened(info.url, options) as file:
            metadata, columns = file.metadata, _columns(info.url, file.schema_arrow, config)
            has_bytes = not _holds_paths(file.schema_arrow.field(config.audio_column).type)
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            sizes = [_audio_bytes(group, config.audio_column) for group in groups]
        filler = Filler(target_s)
        first_row = 0
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
    to the file's folder. What of a row group cannot be read is one sample with the error `damaged_parquet`."""
    url, first_group, num_groups, row, audio, text, language = split.items[0]
    wanted = [column for column in (audio, text, language) if column]
    with _opened(url, options) as file:
        for group in range(first_group, first_group + num_groups):
            metadata = file.metadata.row_group(group)
            end = row + metadata.num_rows
            unpacked = sum(chunk.total_uncompressed_size for chunk in _chunks(metadata, audio))
            row_bytes = max(unpacked // max(metadata.num_rows, 1), 1)
            try:
                for batch in file.iter_batches(max(1, min(256, _BATCH_BYTES // row_bytes)), [group], wanted):
                    for i in range(batch.num_rows):
                        yield _sample(url, row, batch, i, (audio, text, language), options)
                        row += 1
            except storage.StorageError:
                raise
            except _DAMAGE as error:
                yield _lost(redact.names(url), row, end, error)
            row = end


def _lost(url: str, first: int, end: int, error: BaseException) -> Sample:
    name = f"{url}#{first}-{end - 1}"
    said = " ".join(str(error).split())
    return Sample(name, name, 0.0, error=f"damaged_parquet: rows {first} to {end - 1} of {url} are lost: {said}")


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
    name = redact.names(f"{url}#{row}" + (f"/{path.rsplit('/', 1)[-1]}" if path else ""))
    sample = Sample(
        recording_id=name,
        audio_filepath=name,
        estimated_s=0.0,
        text_ref=_text(batch.column(text)[i]) if text else None,
        language=_text(batch.column(language)[i]) if language else None,
    )
    if content is not None:
        sample.estimated_s = estimated_seconds(path or "", len(content.as_buffer()))
        sample.open = lambda: io.BytesIO(content.as_py())
    elif path and "\0" in path:
        sample.error = f"missing_file: row {row} of {redact.names(url)} has a path that no file has"
    elif path:
        sample.estimated_s = UNKNOWN_S
        sample.open = partial(fetch, storage.join(storage.folder_of(url), path), options)
    else:
        sample.error = f"no_audio: row {row} of {redact.names(url)} is null in column '{audio}'"
    return sample


def _content_and_path(value: Any) -> tuple[Any | None, str | None]:
    """The audio as a binary scalar, the path beside or instead of it; None for what is null."""
    if not value.is_valid:
        return None, None
    if pa.types.is_struct(value.type):
        names = [field.name for field in value.type]
        content = value["bytes"] if "bytes" in names and value["bytes"].is_valid else None
        return content, _text(value["path"]) if "path" in names else None
    return (None, _text(value)) if _holds_paths(value.type) else (value, None)


def _text(value: Any) -> str | None:
    """A scalar's text, None where it holds none; Parquet promises UTF-8 and does not check it."""
    if not value.is_valid or not _holds_paths(value.type):
        return None
    return value.as_buffer().to_pybytes().decode("utf-8", "backslashreplace")  # type: ignore[no-any-return]


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
    return sum(chunk.total_compressed_size for chunk in _chunks(group, column))


def _chunks(group: pq.RowGroupMetaData, column: str) -> list[Any]:
    chunks = (group.column(i) for i in range(group.num_columns))
    return [chunk for chunk in chunks if chunk.path_in_schema.split(".", 1)[0] == column]


class _opened:
    """A ParquetFile that streams its column chunks (`pre_buffer` would hold whole row groups)."""

    def __init__(self, url: str, options: storage.Options) -> None:
        self._url = url
        self._file = storage.open_read(url, options)

    def __enter__(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._file, pre_buffer=False, buffer_size=1 << 20)
        except _DAMAGE as error:
            self.__exit__(type(error), error)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._file.close()
        if isinstance(error, _DAMAGE) and not isinstance(error, storage.StorageError):
            raise ConfigError(f"{self._url} is no Parquet file: {' '.join(str(error).split())}") from error

"""A Hugging Face dataset: Parquet with an `audio` column of FLAC bytes that `datasets` knows for audio, and a card."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.export.folder import Folder, Row, flac, key_of
from pipeline.export.rows import LIGHT
from pipeline.schema import SAMPLE_RATE_HZ, TRANSCRIPTS

_ROW_GROUP_BYTES = 32 << 20
_AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_NAMES = {"float": "float32", "double": "float64"}  # those that are not Arrow's


class HfWriter:
    """data/train-00000.parquet and so on; `load_dataset(FOLDER)` reads them."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        columns = [_plain(TRANSCRIPTS.field(name)) for name in LIGHT]
        features = {"audio": {"sampling_rate": SAMPLE_RATE_HZ, "_type": "Audio"}}
        features |= {field.name: _feature(field.type) for field in columns}
        metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        self._schema = pa.schema([pa.field("audio", _AUDIO), *columns], metadata=metadata)
        self._file: tuple[Any, Any] | None = None
        self._rows: list[Row] = []
        self._group_bytes = self._num_bytes = self._num_shards = 0

    def add(self, row: Row, pcm: np.ndarray | None) -> None:
        assert pcm is not None
        data = flac(pcm)
        audio = {"bytes": data, "path": f"{key_of(row)}.flac"}
        self._rows.append({"audio": audio} | {name: row[name] for name in LIGHT})
        self._group_bytes += len(data)
        self._num_bytes += len(data)
        if self._group_bytes >= _ROW_GROUP_BYTES or self._num_bytes >= self._folder.shard_bytes:
            self._flush()
        if self._num_bytes >= self._folder.shard_bytes:
            self._end_shard()

    def end_split(self) -> None: ...

    def close(self) -> None:
        self._flush()
        self._end_shard()
        head = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}]}
        self._folder.put("README.md", f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n".encode())

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._file is None:
            path = self._folder.path()
            self._file = path, pq.ParquetWriter(path, self._schema, compression="zstd")
        self._file[1].write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._group_bytes = [], 0

    def _end_shard(self) -> None:
        if self._file is not None:
            path, writer = self._file
            writer.close()
            self._folder.put(f"data/train-{self._num_shards:05d}.parquet", path)
            self._file, self._num_bytes, self._num_shards = None, 0, self._num_shards + 1


def _plain(field: pa.Field) -> pa.Field:
    kind = field.type
    return pa.field(field.name, kind.value_type if pa.types.is_dictionary(kind) else kind)


def _feature(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return [_feature(kind.value_type)]
    return {"dtype": _NAMES.get(str(kind), str(kind)), "_type": "Value"}

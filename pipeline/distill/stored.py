"""A teacher that is not there any more: the likeliest tokens that its job stored (OUT/logits, engine.top_logprobs)."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.distill.examples import ExampleRef
from pipeline.distill.loss import Likeliest
from pipeline.storage import FileUnavailableError, StorageError

_UNITS = 64  # that are kept; one of half an hour has 1 MB with 16 tokens a place


class StoredTeacher:
    """Reads what was stored of examples in any order."""

    def __init__(self, options: storage.Options) -> None:
        self._options = options
        self._units: OrderedDict[str, tuple[dict[str, int], pa.Table]] = OrderedDict()

    def likeliest(self, ref: ExampleRef) -> Likeliest:
        """Of every token that the teacher wrote, the end token among them.

        Raises ConfigError for an example without any, StorageError for what does not fit the example any more.
        """
        if not ref.logits:
            raise ConfigError(f"{ref.example_id} is of a manifest, which has no teacher: set `teacher`")
        rows, table = self._unit(ref.logits)
        row = rows.get(ref.example_id)
        if row is None or table["token_ids"][row].as_py() != list(ref.token_ids):
            raise StorageError(f"{ref.logits} holds nothing of {ref.example_id} as it is labelled: run its job again")
        num_top = table["num_top"][row].as_py()
        ids, logprobs = (np.asarray(table[name][row].values).reshape(-1, num_top) for name in _TOP)
        return Likeliest(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logprobs.copy()))

    def _unit(self, url: str) -> tuple[dict[str, int], pa.Table]:
        if url in self._units:
            self._units.move_to_end(url)
            return self._units[url]
        try:
            with storage.open_read(url, self._options) as file:
                table = pq.read_table(file, use_threads=False)
        except (FileUnavailableError, FileNotFoundError):
            raise ConfigError(
                f"{url} is not there: label with engine.top_logprobs (8 to 64), or set `teacher` to have it live"
            ) from None
        except pa.ArrowException as error:
            raise StorageError(f"{url} is no readable Parquet file: {error}") from error
        self._units[url] = {name: row for row, name in enumerate(table["segment_id"].to_pylist())}, table
        if len(self._units) > _UNITS:
            self._units.popitem(last=False)
        return self._units[url]


_TOP = ("top_ids", "top_logprobs")

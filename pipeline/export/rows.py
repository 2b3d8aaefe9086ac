"""The rows to export, split by split, and their audio cut from the inputs of their job."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from pipeline.audio import AudioError, Channels, decode
from pipeline.config import TranscribeConfig
from pipeline.export.folder import Row
from pipeline.languages import language_name
from pipeline.output import Output
from pipeline.schema import SAMPLE_RATE_HZ, TRANSCRIPTS
from pipeline.sources.plan import plan, samples
from pipeline.sources.sample import Sample
from pipeline.storage import FileUnavailableError, Options
from pipeline.units import Split, UnitKey

HEAVY = ("text_raw", "words", "sentences", "token_ids", "token_logprobs")
"""Columns that most formats have no place for."""

LIGHT = tuple(name for name in TRANSCRIPTS.names if name not in HEAVY)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows: `only_kept` those that no filter caught, `only_heard` those with audio behind them (failed ones have
    none), `languages` by name or code; none are all."""

    only_kept: bool
    only_heard: bool
    languages: tuple[str, ...] = ()
    columns: tuple[str, ...] = LIGHT

    def rows(self, output: Output, keys: Iterable[UnitKey]) -> list[Row]:
        """The chosen rows of units of one split, in their order."""
        wanted = {language_name(name) for name in self.languages}
        columns = list(dict.fromkeys([*self.columns, "keep", "status", "language", "duration"]))
        rows = []
        for _, _, table in output.tables(sorted(keys), columns):
            if self.only_kept:
                table = table.filter(table["keep"])
            if self.only_heard:
                table = table.filter(pc.and_(pc.not_equal(table["status"], "failed"), pc.greater(table["duration"], 0)))
            for row in table.to_pylist():
                if not wanted or wanted & set((row["language"] or "").split(",")):
                    rows.append(row)
        return rows


def without_audio(output: Output, selection: Selection) -> Iterator[list[Row]]:
    """The rows of each split, in the order of split ids."""
    for _, done in sorted(output.committed().items()):
        yield selection.rows(output, done.keys)


def with_audio(
    output: Output, selection: Selection, config: TranscribeConfig, options: Options
) -> Iterator[Iterator[tuple[Row, np.ndarray | str]]]:
    """For each split its rows with their audio, or why there is none, in the order of the inputs.

    `config` is the output's, `options` the storage options of its inputs. Raises ConfigError or StorageError when an
    input is not there any more.
    """
    committed = output.committed()
    for split in plan(config.inputs, options, config.units.target_s):
        done = committed.pop(split.split_id, None)
        if done is not None:
            yield _cut(split, selection.rows(output, done.keys), options)
    for done in committed.values():
        rows = selection.rows(output, done.keys)
        yield iter([(row, "the inputs of the job do not hold it any more") for row in rows])


def _cut(split: Split, rows: Sequence[Row], options: Options) -> Iterator[tuple[Row, np.ndarray | str]]:
    """The split is walked once; of its recordings only those with rows are opened."""
    by_recording: dict[str, list[Row]] = {}
    for row in rows:
        name = (
            row["recording_id"] if row["channel"] is None else row["recording_id"].removesuffix(f"#ch{row['channel']}")
        )
        by_recording.setdefault(name, []).append(row)
    if by_recording:
        for sample in samples(split, options):
            mine = by_recording.pop(sample.recording_id, None)
            if mine is not None:
                yield from cut_recording(sample, mine)
            if not by_recording:
                return
    for missing in by_recording.values():
        yield from ((row, f"its recording is no longer in {split.items[0][0]}") for row in missing)


def cut_recording(sample: Sample, rows: Sequence[Row]) -> Iterator[tuple[Row, np.ndarray | str]]:
    """The audio of `rows`, all of one recording, int16 `[num_samples]` at 16 kHz: the samples that the engine heard.

    The recording is decoded once, and no more of it held than its longest segment.
    """
    channels: Channels = "mix" if rows[0]["channel"] is None else "split"
    waiting = deque(sorted(rows, key=lambda row: float(row["offset"])))
    why = sample.error or "its source has no audio"
    if sample.open is not None and sample.error is None:
        why = "its recording ends before it"
        try:
            with sample.open() as file:
                yield from _segments(
                    decode(file, channels, sample.offset_s, sample.duration_s), sample.offset_s, waiting
                )
        except (AudioError, FileUnavailableError) as error:
            why = str(error)
    yield from ((row, why) for row in waiting)


def _segments(
    blocks: Iterator[np.ndarray], offset_s: float, waiting: deque[Row]
) -> Iterator[tuple[Row, np.ndarray | str]]:
    """Takes from `waiting` what the blocks, `[num_frames, num_channels]`, hold."""
    held, start = np.empty((0, 1), np.int16), 0  # what is held begins at sample `start`
    for block in blocks:
        if not waiting:
            return
        held = np.concatenate([held, block]) if len(held) else block
        while waiting:
            first, end = _bounds(waiting[0], offset_s)
            if end > start + len(held):
                break
            row = waiting.popleft()
            channel = row["channel"] or 0
            if channel < held.shape[1]:
                yield row, held[first - start : end - start, channel].copy()
            else:
                yield row, f"its recording has no channel {channel} any more"
        needed = _bounds(waiting[0], offset_s)[0] if waiting else start + len(held)
        dropped = min(max(needed - start, 0), len(held))
        held, start = held[dropped:], start + dropped


def _bounds(row: Row, offset_s: float) -> tuple[int, int]:
    start = round((row["offset"] - offset_s) * SAMPLE_RATE_HZ)
    return start, start + round(row["duration"] * SAMPLE_RATE_HZ)

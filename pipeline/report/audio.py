"""The audio of a few rows, read again from the inputs of their job: the way back from a row to what was heard.

The inputs are planned anew and only the splits of the rows are walked, so that every kind of source works as it did for
the job; of a split, only the recordings asked for are opened.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from pipeline.audio import AudioError, Channels, decode
from pipeline.config import ConfigError, TranscribeConfig
from pipeline.report.gather import Row
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.sources.plan import plan, samples
from pipeline.sources.sample import Sample
from pipeline.storage import Options
from pipeline.units import Split

MAX_CLIP_S = 60.0
_BITS_PER_SECOND = 24_000  # speech at 16 kHz is transparent there; 30 s take 90 KB
_UNREADABLE = (AudioError, ConfigError, OSError)


@dataclass(frozen=True, slots=True)
class Clip:
    """A row's audio as Ogg Opus, 16 kHz mono; None with a `note` that says why. A note beside audio says what of it is
    there."""

    ogg: bytes | None
    note: str = ""


def read_clips(rows: Sequence[Row], config: TranscribeConfig, options: Options) -> list[Clip]:
    """One clip a row, in order. What cannot be read any more is a clip with a note; nothing raises for it.

    `config` is the resolved configuration of the rows' output, `options` the storage options of its inputs.
    """
    clips = {i: Clip(None, "no audio was read of it") for i, row in enumerate(rows) if row.duration == 0}
    wanted: dict[str, dict[int, Row]] = {}
    for i, row in enumerate(rows):
        if i not in clips:
            wanted.setdefault(row.unit.partition("-")[0], {})[i] = row
    notes = []
    for source in config.inputs:
        try:
            for split in plan([source], options, config.units.target_s) if wanted else ():
                if split.split_id in wanted:
                    clips |= _split_clips(split, wanted.pop(split.split_id), options)
                if not wanted:
                    break
        except _UNREADABLE as error:
            notes.append(str(error))
    why = "; ".join(notes) or "the inputs of the job do not hold it any more"
    return [clips.get(i) or Clip(None, why) for i in range(len(rows))]


def _split_clips(split: Split, rows: dict[int, Row], options: Options) -> dict[int, Clip]:
    """The clips of `rows`, all of one split, under the keys of `rows`."""
    clips: dict[int, Clip] = {}
    why = f"its recording is no longer in {split.items[0][0]}"
    try:
        for sample in samples(split, options):
            for i, row in rows.items():
                if row.recording_id == _recording_id(sample, row.channel):
                    clips[i] = _clip(sample, row)
            if len(clips) == len(rows):
                break
    except _UNREADABLE as error:
        why = str(error)
    return {i: clips.get(i) or Clip(None, why) for i in rows}


def _recording_id(sample: Sample, channel: int | None) -> str:
    return sample.recording_id if channel is None else f"{sample.recording_id}#ch{channel}"


def _clip(sample: Sample, row: Row) -> Clip:
    if sample.open is None:
        return Clip(None, sample.error or "its source has no audio")
    channels: Channels = "mix" if row.channel is None else "split"
    channel = row.channel or 0
    blocks: list[np.ndarray] = []
    try:
        with sample.open() as file:
            for block in decode(file, channels, row.offset, min(row.duration, MAX_CLIP_S)):
                blocks.append(block[:, channel])
    except _UNREADABLE as error:
        return Clip(None, str(error))
    except IndexError:
        return Clip(None, f"{row.audio_filepath} has no channel {channel} any more")
    note = f"the first {MAX_CLIP_S:g} s of it" if row.duration > MAX_CLIP_S else ""
    return Clip(_opus(np.concatenate(blocks)), note)


def _opus(pcm: np.ndarray) -> bytes:
    """int16 `[num_samples]` at 16 kHz as Ogg Opus, the same bytes for the same samples.

    libsndfile draws the stream's serial number from the clock, FFmpeg leaves it fixed when asked to be bit-exact.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="ogg", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libopus", rate=SAMPLE_RATE_HZ, layout="mono", options={"application": "voip"})
        stream.bit_rate = _BITS_PER_SECOND
        for frame in _frames(pcm):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _frames(pcm: np.ndarray) -> Iterator[av.AudioFrame]:
    for start in range(0, len(pcm), SAMPLE_RATE_HZ):
        frame = av.AudioFrame.from_ndarray(pcm[None, start : start + SAMPLE_RATE_HZ], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE_HZ, start, Fraction(1, SAMPLE_RATE_HZ)
        yield frame

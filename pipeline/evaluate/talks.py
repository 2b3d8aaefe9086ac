"""The recordings of a configuration's inputs, whole, with reference and language, to be replayed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.audio import AudioError, decode
from pipeline.config import ConfigError, TranscribeConfig
from pipeline.evaluate.items import checked_language
from pipeline.evaluate.replay import Talk
from pipeline.sources.plan import plan, samples
from pipeline.sources.sample import Sample


def languages(config: TranscribeConfig) -> list[str]:
    """Of all talks, each once, before any is decoded. Raises ConfigError where there is nothing to score."""
    found = dict.fromkeys(_language(config, sample) for sample in _samples(config))
    if not found:
        raise ConfigError(
            "no recording of the inputs has a reference. Inputs give them as KEY.txt or KEY.json beside the audio, a "
            "manifest's `text`, or a Parquet column"
        )
    return list(found)


def read_talks(config: TranscribeConfig) -> Iterator[Talk]:
    """One after the other; what has no reference is left out. Raises ConfigError for what cannot be read."""
    for sample in _samples(config):
        assert sample.open is not None and sample.text_ref is not None
        try:
            with sample.open() as file:
                blocks = [block[:, 0] for block in decode(file, "mix", sample.offset_s, sample.duration_s)]
        except AudioError as error:
            raise ConfigError(f"{sample.audio_filepath}: {error}") from error
        language = _language(config, sample)
        yield Talk(sample.recording_id, language, sample.text_ref, np.concatenate(blocks), sample.sentences)


def _samples(config: TranscribeConfig) -> Iterator[Sample]:
    for split in plan(config.inputs, config.storage.access, config.units.target_s):
        for sample in samples(split, config.storage.access):
            if sample.error is not None:
                raise ConfigError(f"{sample.audio_filepath}: {sample.error}")
            if sample.text_ref is not None and sample.open is not None:
                yield sample


def _language(config: TranscribeConfig, sample: Sample) -> str:
    named = config.engine.language or sample.language
    if not named:
        raise ConfigError(f"{sample.audio_filepath} names no language; --language NAME names one for all")
    return checked_language(named).partition(",")[0]

"""From a configuration to a model with its causal tower."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config import EngineConfig
from pipeline.engine.base import EngineInfo
from pipeline.engine.causal.settings import Settings, settings_of
from pipeline.engine.causal.tower_file import KEY, OFFLINE, untrained
from pipeline.engine.causal.weights import load_tower
from pipeline.engine.checkpoint import CheckpointError
from pipeline.engine.model import LoadedModel, load_model


@dataclass(frozen=True, slots=True)
class Causal:
    """A model with its causal tower; `languages` those that the tower was trained on, None where all are let in."""

    loaded: LoadedModel
    settings: Settings
    info: EngineInfo
    languages: frozenset[str] | None


def load_causal(config: EngineConfig) -> Causal:
    """The model and the tower that `config` names. Raises CheckpointError when one is not to run, or when the tower was
    not trained on the language that `config` forces."""
    loaded = load_model(config)
    info, languages = replace(loaded.info, engine="causal"), None
    if config.tower is not None and config.tower != OFFLINE:
        found = load_tower(config.tower, loaded.model.thinker.audio_tower, info.model_id, config.tower_revision)
        info = replace(info, model_revision=f"{info.model_revision}+tower@{found.revision}")
        languages = None if config.untrained_languages else found.languages
    if config.language is not None and languages is not None:
        language = loaded.known_language(config.language)
        if language not in languages:
            raise CheckpointError(f"{KEY}: {config.tower}: {untrained(language, languages)}")
    return Causal(loaded, settings_of(config), info, languages)

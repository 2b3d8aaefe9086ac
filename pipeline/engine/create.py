"""From a configuration to an engine. Imports an engine's module (and torch with it) only when one is made."""

from __future__ import annotations

from pipeline.config import EngineConfig
from pipeline.engine.base import AsrEngine, Observer


def create_engine(config: EngineConfig, observe: Observer | None = None) -> AsrEngine:
    """Load the model and start the engine, with its aligner; `observe` hears of every batch.

    Raises CheckpointError when a model is not one to run.
    """
    engine = _engine(config, observe)
    if config.aligner is None:
        return engine
    from pipeline.engine.aligner import AlignedEngine

    return AlignedEngine(engine, config)


def _engine(config: EngineConfig, observe: Observer | None) -> AsrEngine:
    match config.name:
        case "offline":
            from pipeline.engine.offline import OfflineEngine

            return OfflineEngine(config, observe)
        case "causal":
            from pipeline.engine.causal.engine import CausalEngine

            return CausalEngine(config, observe)
        case "reference":
            from pipeline.engine.reference import ReferenceEngine

            return ReferenceEngine(config, observe)

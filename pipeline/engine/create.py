"""From a configuration to an engine. Imports an engine's module (and torch with it) only when one is made."""

from __future__ import annotations

from pipeline.config import EngineConfig
from pipeline.engine.base import AsrEngine


def create_engine(config: EngineConfig) -> AsrEngine:
    """Load the model and start the engine. Raises CheckpointError when the model is not one to run."""
    match config.name:
        case "reference":
            from pipeline.engine.reference import ReferenceEngine

            return ReferenceEngine(config)

"""What `shardscribe follow` hears, and where it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from pipeline import storage
from pipeline.config import EngineConfig, SegmentationConfig, StorageConfig, TranscribeConfig
from pipeline.labels_config import LabelsConfig
from pipeline.section import Section


class FollowInput(Section):
    """A growing file, a FIFO, or a folder or pattern that files keep arriving in."""

    path: str
    kind: Literal["auto", "file", "fifo", "folder"] = "auto"  # auto: what stands there; patterns and folders are such
    # of audio without a header, 16-bit little-endian
    rate_hz: int = Field(16_000, ge=1_000, le=1_000_000)
    channels: PositiveInt = 1


def _as_input(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class FollowEngine(EngineConfig):
    name: Literal["causal"] = "causal"
    tower: str | None = "embedded/tower"


class FollowConfig(Section):
    inputs: Annotated[list[Annotated[FollowInput, BeforeValidator(_as_input)]], Field(min_length=1)]
    output: str
    state: str | None = None  # a local folder; null: OUTPUT/streams, where the output is local
    poll_s: float = Field(0.2, gt=0)  # between two looks at inputs that had nothing new
    list_every_s: float = Field(5.0, gt=0)  # between two listings of folders
    ended_after_s: float | None = Field(30.0, gt=0)  # a file that has not grown for so long is whole; null: never
    segments_per_object: PositiveInt = 20  # of a stream, in one Parquet object; its last one may have fewer
    engine: FollowEngine = FollowEngine()
    labels: LabelsConfig = LabelsConfig()
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _has_state(self) -> FollowConfig:
        if self.state is None and "://" in self.output:
            raise ValueError("state: the output is remote, and streams keep their state in a local folder; name one")
        if self.labels.calibrate is not None:
            raise ValueError("labels.calibrate: thresholds are fitted on a sample of what is there; set them")
        return self

    @property
    def state_folder(self) -> Path:
        return Path(self.state or Path(storage.resolve(self.output)) / "streams")

    @property
    def job(self) -> TranscribeConfig:
        """The main job that would give these rows, which the output is claimed and labelled as."""
        return TranscribeConfig(
            inputs=[{"path": source.path} for source in self.inputs],
            output=self.output,
            segmentation=SegmentationConfig(policy="stream"),
            engine=self.engine,
            labels=self.labels,
            storage=self.storage,
        )

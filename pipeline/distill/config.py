"""The options of jobs that make models from models."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from pipeline.config import StorageConfig
from pipeline.section import Section

Format = Literal["int4", "int3", "int2", "fp8"]
_HEAD = "thinker.lm_head.weight_quantizer"


class SamplesConfig(Section):
    """Speech with its text, equally much of every language."""

    sources: Annotated[list[str], Field(min_length=1)]  # NeMo manifests, outputs of `shardscribe transcribe`
    languages: list[str] = []  # names or codes; none: all that there are
    samples_per_language: PositiveInt = 64
    seed: int = 0
    min_s: float = Field(1.0, ge=0)
    max_s: float = Field(30.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> SamplesConfig:
        if self.min_s >= self.max_s:
            raise ValueError(f"min_s ({self.min_s}) must be below max_s ({self.max_s})")
        return self


class QuantizeConfig(Section):
    model: str = "embedded/student"  # as engine.model
    revision: str | None = None
    output: str  # a new local folder
    calibration: SamplesConfig
    heldout: SamplesConfig | None = None  # what quantizing costs is measured on these, too
    format: Format = "int4"  # int4 has kernels; the others are comparators, which engines run as fake_quant
    algorithm: Literal["awq_full", "awq_lite", "rtn"] = "awq_full"  # rtn: round to nearest, without calibration
    group_size: PositiveInt = 128  # inputs that share a scale; fp8 has one for each output
    alpha_step: float = Field(0.1, gt=0, le=1)  # awq: of the search for input scales
    clip_tokens: PositiveInt = 1024  # awq_full: positions, over all samples, that the search for clipping looks at
    exclude: list[str] = ["*audio_tower*", "*lm_head*"]  # layers that stay as they are, by the pattern of their name
    device: str = "auto"
    threads: PositiveInt | None = None
    storage: StorageConfig = StorageConfig()

    @field_validator("exclude")
    @classmethod
    def _head_stays(cls, exclude: list[str]) -> list[str]:
        if not any(fnmatch(_HEAD, pattern) for pattern in exclude):
            raise ValueError("`*lm_head*` has to be in it: its weight is the embedding's, too")
        return exclude

    @model_validator(mode="after")
    def _fits(self) -> QuantizeConfig:
        if self.format == "fp8" and self.algorithm != "rtn":
            raise ValueError(f"algorithm: {self.algorithm} searches for integers in groups; format: fp8 takes rtn")
        return self

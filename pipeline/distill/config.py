"""The options of jobs that make models from models."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from pipeline.config import StorageConfig
from pipeline.section import Section

Format = Literal["int4", "int3", "int2", "fp8"]
_HEAD = "thinker.lm_head.weight_quantizer"


class SpeechConfig(Section):
    """Speech with its text."""

    sources: Annotated[list[str], Field(min_length=1)]  # NeMo manifests, outputs of `shardscribe transcribe`
    languages: list[str] = []  # names or codes; none: all that there are
    min_s: float = Field(1.0, ge=0)
    max_s: float = Field(30.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> SpeechConfig:
        if self.min_s >= self.max_s:
            raise ValueError(f"min_s ({self.min_s}) must be below max_s ({self.max_s})")
        return self


class SamplesConfig(SpeechConfig):
    """Some of it, equally much of every language."""

    samples_per_language: PositiveInt = 64
    seed: int = 0


class QuantizeRayConfig(Section):
    """Where it runs: in the command itself, or as a task of a cluster, whose output folder has to be shared."""

    address: str | None = None  # "auto": the cluster of this node; "ray://host:10001"
    num_gpus: float = Field(0.0, ge=0)  # of the task
    num_cpus: float = Field(1.0, gt=0)


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
    ray: QuantizeRayConfig = QuantizeRayConfig()
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


class TrainingRayConfig(Section):
    """Where training runs. Of it only the number of workers changes what is learned."""

    address: str | None = None  # null: a local Ray; "auto": the cluster of this node; "ray://host:10001"
    workers: PositiveInt = 1  # each has its own batches
    num_gpus: float | None = Field(None, ge=0)  # of a worker; null: 1 where the cluster has GPUs
    num_cpus: float = Field(1.0, gt=0)  # of a worker
    parallel: Literal["ddp", "fsdp2"] = "ddp"  # fsdp2: a student too large for one device
    retries: NonNegativeInt = 3  # after a worker or its node has died


class TrainingConfig(Section):
    """What all trainings have."""

    output: str  # a local folder, or one that all workers share; the same command again goes on in it
    balance: float = Field(1.0, ge=0, le=1)  # 1: equally much of every language; 0: as there is
    steps: PositiveInt = 2000
    learning_rate: float = Field(1e-5, gt=0)
    warmup_steps: NonNegativeInt = 100
    final_share: float = Field(0.05, ge=0, le=1)  # of the learning rate, where its cosine ends
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_audio_s: float = Field(480.0, gt=0)  # of one batch of one worker, padding included
    accumulate: PositiveInt = 1  # batches a step
    evaluate_every: PositiveInt = 200  # steps
    best_by: Literal["errors", "loss"] = "errors"  # errors tell little where there is little held-out speech
    save_every: PositiveInt = 100
    log_every: PositiveInt = 10
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of forward passes; trained weights are float32
    device: str = "auto"
    readers: PositiveInt = 2  # threads that read audio ahead
    ray: TrainingRayConfig = TrainingRayConfig()
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _warms_up(self) -> TrainingConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self


class DistillConfig(TrainingConfig):
    """Quantization-aware distillation."""

    student: str  # a folder with ModelOpt's fake quantization: `fake-quant` of `shardscribe quantize`
    teacher: str | None  # as engine.model; null: what `labels` stored of it (engine.top_logprobs)
    teacher_revision: str | None = None
    labels: SpeechConfig  # what is learned from
    heldout: SamplesConfig  # what the best step is chosen on
    alpha_kd: float = Field(0.5, ge=0, le=1)  # KL's share of the loss beside cross-entropy's
    temperature: float = Field(1.0, gt=0)  # of both sides; stored teachers know 1 alone
    trainable: Annotated[list[str], Field(min_length=1)] = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*.mlp.*"]

    @model_validator(mode="after")
    def _fits(self) -> DistillConfig:
        if self.teacher is None and self.temperature != 1:
            raise ValueError(f"temperature: {self.temperature:g} needs a live teacher; what is stored is that at 1")
        return self


class TowerConfig(TrainingConfig):
    """Self-distillation of a causal audio tower from the offline tower of the same model."""

    model: str = "embedded/student"  # as engine.model; its tower is the teacher, and what training begins with
    revision: str | None = None
    tower: str | None = None  # a causal tower to begin with instead, as engine.tower
    speech: SpeechConfig  # what is heard; texts are needed where text_weight is above 0
    heldout: SamplesConfig  # with texts: what the best step is chosen on
    steps: PositiveInt = 3000
    learning_rate: float = Field(1e-4, gt=0)
    block_frames: Annotated[list[PositiveInt], Field(min_length=1)] = [96, 192]  # drawn for every batch
    left_steps: PositiveInt = 195  # that a step sees, of 80 ms
    cosine_weight: float = Field(0.5, ge=0)  # mean squared error + this * (1 - cosine)
    text_weight: float = Field(0.0, ge=0)  # + this * cross-entropy of the model's decoder with the speech's texts
    offset_share: float = Field(0.5, ge=0, le=1)  # of examples that begin at a later position than 0
    max_offset: PositiveInt = 6000  # of those, drawn evenly in their logarithm

    @model_validator(mode="after")
    def _whole_chunks(self) -> TowerConfig:
        if odd := [frames for frames in self.block_frames if frames % 8 or frames > 8 * self.left_steps]:
            raise ValueError(f"block_frames: {odd[0]} must be a multiple of 8 within left_steps ({self.left_steps})")
        return self

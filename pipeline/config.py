"""Every option of every job, as pydantic models: unknown keys are refused, errors name the key and what is allowed.

A job's file in `conf/` is one complete YAML without inheritance; `--set path.to.key=value` overrides a key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline import redact
from pipeline.labels_config import LabelsConfig, TeacherLabelsConfig
from pipeline.section import Section
from pipeline.streams_config import SPEED_KEYS, StreamsConfig

Model = TypeVar("Model", bound=BaseModel)


Quantization = Literal["none", "int4", "fake_quant"]


class ConfigError(ValueError):
    """A mistake of the user's in a configuration; the message is all that they need, and holds no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(redact.text(message))


class InputConfig(Section):
    """One place to read audio from. `path` may hold globs (`*`, `**`, `?`) and brace ranges (`{00000..00127}`)."""

    path: str
    kind: Literal["auto", "webdataset", "files", "parquet", "manifest"] = "auto"
    audio_column: str = "audio"  # Parquet: bytes, or struct{bytes, path} as Hugging Face datasets write it
    text_column: str = "text"
    language_column: str = "language"


def _as_input(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class AudioConfig(Section):
    channels: Literal["mix", "split"] = "mix"  # split: one recording a channel, as call archives need


class UnitsConfig(Section):
    target_s: float = Field(1800.0, gt=0)  # estimated audio of one unit; the cap in decoded audio is twice this


class SegmentationConfig(Section):
    policy: Literal["sentence", "pause", "fixed", "stream"] = "pause"  # stream: engine.name: causal cuts by itself
    fixed_s: float = Field(16.0, gt=0, le=1200)  # fixed: the length of every window
    # pause: a window is cut at its longest pause between min_s and max_s. sentence: it is decoded up to a pause before
    # max_s, ended at the last sentence in its text after min_s, and the next window begins there
    min_s: float = Field(12.0, gt=0)
    max_s: float = Field(30.0, gt=0, le=1200)
    stretch_s: float = Field(300.0, gt=0)  # sentence: longer recordings are worked off as several stretches at once
    vad_threshold: float = Field(0.5, gt=0, lt=1)  # Silero's speech probability
    min_silence_ms: PositiveInt = 100

    @model_validator(mode="after")
    def _ordered(self) -> SegmentationConfig:
        if self.min_s >= self.max_s:
            raise ValueError(f"min_s ({self.min_s}) must be below max_s ({self.max_s})")
        return self


class EngineConfig(Section):
    name: Literal["offline", "reference", "causal"] = "offline"
    model: str = "embedded/student"  # a Hub id, a local folder, or embedded/student, embedded/teacher
    revision: str | None = None  # of a Hub id: branch, tag or commit
    # causal: the audio tower in place of the model's own: embedded/tower, a file or folder, a Hub id; offline: its own
    tower: str | None = None
    tower_revision: str | None = None
    untrained_languages: bool = False  # causal: also those that the tower was not trained on
    aligner: str | None = None  # word times: Qwen/Qwen3-ForcedAligner-0.6B or a local folder
    aligner_revision: str | None = None
    language: str | None = None  # force a language ("English"); null: the input's own, else detected
    trust_input_language: bool = False  # force the language that the input names for a recording
    context: str = ""  # hotwords, in the system prompt
    attention: Literal["windowed", "published"] = "windowed"  # published: full attention under SDPA, as qwen-asr runs
    # int4: of a checkpoint that is quantized (pipeline/engine/quantized); fake_quant: what ModelOpt's fake quantization
    # of any width computes, at full size, to compare formats (pipeline/engine/fake_quant)
    quantization: Quantization = "none"
    lm_head: Literal["full", "int8"] = "full"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    top_logprobs: int = Field(0, ge=0, le=64)  # likeliest tokens at every place, in OUT/logits/; 0: none
    max_new_tokens: PositiveInt = 512
    max_new_tokens_per_s: float = Field(24.0, gt=0)  # offline: of audio, with 32 more; a row that needs more runs away
    # what follows changes speed, not text
    device: str = "auto"
    threads: PositiveInt | None = None  # torch threads of an actor on CPU; null: its num_cpus
    batch_size: PositiveInt = 32
    batch_audio_s: float = Field(480.0, gt=0)  # padded audio of one batch
    # offline: rows that are decoded at once, the share of the device's free memory that their cache may take, prompt
    # tokens of one prefill (13 a second of audio), and how many waiting segments are sorted by length; causal: streams
    # that are heard at once
    slots: PositiveInt = 64
    memory_share: float = Field(0.5, gt=0, lt=1)
    prefill_tokens: PositiveInt = 8192
    look_ahead: PositiveInt = 512
    stall_timeout_s: float = Field(1800.0, gt=0)  # a batch that takes longer hangs: its process is ended and redone
    streams: StreamsConfig = StreamsConfig()

    @model_validator(mode="after")
    def _runs_here(self) -> EngineConfig:
        if self.name != "reference" and self.attention == "published":
            raise ValueError(f"attention: published is of engine.name: reference; {self.name} attends within windows")
        if self.name != "causal":
            if self.tower is not None:
                raise ValueError(f"tower: {self.tower} is of engine.name: causal, not of {self.name}")
            return self
        if self.tower is None:
            raise ValueError("tower: engine.name: causal needs one, such as qfuxa/qwen3-asr-0.6b-streaming")
        if self.aligner is not None:
            raise ValueError("aligner: engine.name: causal writes no word times; segments have their own times")
        if self.top_logprobs:
            raise ValueError("engine.name: causal has no top_logprobs; label with offline")
        return self


class TeacherConfig(EngineConfig):
    model: str = "embedded/teacher"


ENGINE_SPEED_KEYS = {
    "device", "threads", "batch_size", "batch_audio_s", "slots", "memory_share", "prefill_tokens", "look_ahead",
    "stall_timeout_s",
}  # fmt: skip
"""Keys of `EngineConfig` that change no row."""
_WITHOUT_SPEED: dict[str, Any] = {**dict.fromkeys(ENGINE_SPEED_KEYS, True), "streams": SPEED_KEYS}


class RayConfig(Section):
    """Where the job runs and how much of the cluster it takes. Nothing here changes a transcript."""

    address: str | None = None  # null: a local Ray; "auto": the cluster of this node; "ray://host:10001"
    read_stall_timeout_s: float = Field(300.0, gt=0)  # a recording that gives no audio for so long hangs its decoder
    read_tasks: PositiveInt | None = None  # concurrent read tasks; null: half of the cluster's CPUs, at least one
    engines: PositiveInt | None = None  # engine actors; null: one per GPU, or one when there is none
    num_gpus: float | None = Field(None, ge=0)  # of one engine actor; null: 1 when the cluster has GPUs, else 0
    num_cpus: float = Field(1.0, gt=0)  # of one engine actor
    units_in_flight: PositiveInt = 2  # units in one engine actor at once: the tail of one overlaps the next
    object_store_bytes: PositiveInt | None = None  # of a local Ray


class RetryConfig(Section):
    """How a request to a remote store is made again when it fails for what may pass: no answer, a broken one, 5xx, 429.

    The wait before try n is drawn between 0 and `first_wait_s * 2**(n - 2)`: with the defaults the last try comes after
    31 s on average, so that a store may be away for about that long.
    """

    attempts: PositiveInt = 8  # of one request, the first included
    first_wait_s: float = Field(0.5, gt=0)
    max_wait_s: float = Field(30.0, gt=0)  # a longer Retry-After is cut to it, too
    timeout_s: float = Field(60.0, gt=0)  # s3, http: without a byte; an upload has a second more for every 100 kB


class StorageConfig(Section):
    """fsspec options by protocol: `{s3: {endpoint_url: ..., anon: true}}`. Credentials belong in the environment."""

    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    retry: RetryConfig = RetryConfig()

    @property
    def access(self) -> dict[str, dict[str, Any]]:
        """What the functions of pipeline.storage take as `options`: these, and the retry policy beside them."""
        return self.options | {"retry": self.retry.model_dump()}

    @field_validator("options")
    @classmethod
    def _retries_are_elsewhere(cls, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if "retry" in options:
            raise ValueError("`retry` is no protocol; write it as storage.retry")
        for protocol in ("s3", "s3a"):
            below = options.get(protocol, {}).get("config_kwargs", {})
            for key in ("retries", "connect_timeout", "read_timeout"):
                if key in below:
                    right = "attempts" if key == "retries" else "timeout_s"
                    raise ValueError(f"{protocol}.config_kwargs.{key} is decided by storage.retry.{right}; set that")
        return options


class TranscribeConfig(Section):
    inputs: Annotated[list[Annotated[InputConfig, BeforeValidator(_as_input)]], Field(min_length=1)]
    output: str
    audio: AudioConfig = AudioConfig()
    units: UnitsConfig = UnitsConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
    engine: EngineConfig = EngineConfig()
    agree_with: EngineConfig | None = None  # a second model that hears every segment, in the same actors
    labels: LabelsConfig = LabelsConfig()
    ray: RayConfig = RayConfig()
    storage: StorageConfig = StorageConfig()

    def result_hash(self) -> str:
        """16 hex digits of all that can change a row. Inputs are not in it (their units carry them in their names), nor
        is what only changes speed."""
        data = self.model_dump(
            mode="json",
            include={"audio", "units", "segmentation", "engine", "agree_with", "labels"},
            exclude={"engine": _WITHOUT_SPEED, "agree_with": _WITHOUT_SPEED},
        )
        for engine in (data["engine"], data["agree_with"]):
            if engine is not None and engine["name"] != "causal":
                del engine["streams"], engine["untrained_languages"]
        return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).hexdigest()

    @model_validator(mode="after")
    def _one_aligner(self) -> TranscribeConfig:
        if self.agree_with is not None and self.agree_with.aligner is not None:
            raise ValueError("agree_with.aligner: only the text of the second model is used; word times are engine's")
        if (self.engine.name == "causal") != (self.segmentation.policy == "stream"):
            raise ValueError("segmentation.policy: stream belongs to engine.name: causal, and no other to it")
        return self


class PseudolabelConfig(TranscribeConfig):
    """The transcribe job with a teacher, and filters for what is to be trained on."""

    engine: TeacherConfig = TeacherConfig()
    labels: TeacherLabelsConfig = TeacherLabelsConfig()


def load_config(model: type[Model], path: Path | None, overrides: Sequence[str] = ()) -> Model:
    """Read the YAML at `path` (None: an empty one) into `model`, after overrides `key.path=value` (YAML, too).

    Raises ConfigError that names the file, each wrong key and what it may be.
    """
    data = {} if path is None else _read_yaml(path)
    for override in overrides:
        _override(data, override)
    return validate(model, data, "--set" if path is None else str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path} (examples: conf/*.yaml)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {_yaml_mistake(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold `key: value` pairs, such as `inputs: [...]`")
    return data


def validate(model: type[Model], data: dict[str, Any], where: str) -> Model:
    """`data` as a `model`, or a ConfigError that says what is wrong `where`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model, detail) for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def _override(data: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in nested dicts and lists, making sections that are not there."""
    key_path, separator, text = override.partition("=")
    if not separator or not key_path:
        raise ConfigError(f"--set {override}: write it as path.to.key=value, for example engine.batch_size=16")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key_path}: the value is no valid YAML; quote it") from None
    *parents, last = key_path.split(".")
    node: Any = data
    for key in parents:
        if isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            node = node[_index(node, key, override)]
    if isinstance(node, dict):
        node[last] = value
    else:
        node[_index(node, last, override)] = value


def _index(node: Any, key: str, override: str) -> int:
    if not isinstance(node, list) or not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(f"--set {override.partition('=')[0]}: there is no `{key}` to go into")
    return int(key)


def _explain(model: type[BaseModel], detail: Any) -> str:
    """One pydantic error as `key: what is wrong (what is allowed)`."""
    location = [part for part in detail["loc"] if not isinstance(part, str) or "[" not in part]
    key = ".".join(map(str, location))
    if detail["type"] == "extra_forbidden":
        names = _names_beside(model, location)
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(names)}"
        return f"unknown key `{key}`; {hint}"
    if detail["type"] == "missing":
        return f"`{key}` is required"
    if detail["type"] == "too_short":
        return f"`{key}` needs at least {detail['ctx']['min_length']} item"
    message = detail["msg"].replace("Input should", "should")
    if detail["type"] == "value_error":
        return f"`{key}`: {message.removeprefix('Value error, ')}"
    if detail["type"] == "model_type":
        message = "should be a section of keys"
    is_secret = isinstance(detail["input"], dict | list) or location[:2] == ["storage", "options"]
    shown = f"a {type(detail['input']).__name__}" if is_secret else repr(detail["input"])
    return f"`{key}` {message}, not {shown}"


def _yaml_mistake(error: yaml.YAMLError) -> str:
    """Where and what, without the line itself, which may hold credentials."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        said = ", ".join(filter(None, [error.context, error.problem]))
        said = re.sub(r"'\w[^']*'", "a name", said)  # such as the alias that a password with a star is
        return f"{said} in line {mark.line + 1}, column {mark.column + 1}"
    return "it holds characters that YAML does not know"


def _names_beside(model: type[BaseModel], location: list[Any]) -> list[str]:
    """The keys that the section of `location` knows."""
    section = model
    for part in location[:-1]:
        if part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel]:
    """The model class inside `list[Annotated[Model, ...]]` and the like."""
    while not isinstance(annotation, type) or not issubclass(annotation, BaseModel):
        annotation = get_args(annotation)[0]
    return annotation

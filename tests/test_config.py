"""What a user may write in a configuration, and what is said about what they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipeline.config import ConfigError, PseudolabelConfig, TranscribeConfig, load_config, validate
from pipeline.labels_config import THRESHOLDS, LabelsConfig
from pipeline.streams_config import SPEED_KEYS, StreamsConfig

BASE = "inputs: [a.tar]\noutput: out\n"


def load(tmp_path: Path, text: str, *overrides: str) -> TranscribeConfig:
    path = tmp_path / "conf.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(TranscribeConfig, path, overrides)


def config(**sections: Any) -> TranscribeConfig:
    return TranscribeConfig.model_validate({"inputs": ["a.tar"], "output": "out"} | sections)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inputs: [a.tar]", "`output` is required"),
        (BASE + "engin: {}", "unknown key `engin`; did you mean `engine`?"),
        (BASE + "engine: {batchsize: 3}", "unknown key `engine.batchsize`; did you mean `batch_size`?"),
        (BASE + "audio: {zzz: 3}", "unknown key `audio.zzz`; known here: channels"),
        (BASE + "engine: 5", "`engine` should be a section of keys, not 5"),
        (BASE + "engine: {batch_size: 0}", "`engine.batch_size` should be greater than 0, not 0"),
        (BASE + "engine: {batch_size: many}", "`engine.batch_size` should be a valid integer"),
        (BASE + "audio: {channels: both}", "`audio.channels` should be 'mix' or 'split', not 'both'"),
        (BASE + "segmentation: {min_s: 40}", "`segmentation`: min_s (40.0) must be below max_s (30.0)"),
        (BASE + "units: {target_s: .inf}", "`units.target_s` should be a finite number, not inf"),
        (BASE + "labels: {max_char_rate: .nan}", "`labels.max_char_rate` should be a finite number, not nan"),
        (BASE + "labels: {languages: {Klingon: {}}}", "Klingon is none of Qwen3-ASR's languages: Arabic,"),
        (BASE + "labels: {languages: {th: {min_words: 1}}}", "min_words is no threshold; they are min_duration_s,"),
        (BASE + "labels: {min_char_rate: 50}", "`labels`: min_char_rate (50) must not be above max_char_rate (40)"),
        (
            BASE + "labels: {languages: {th: {min_char_rate: 41}}}",
            "`labels`: languages.Thai: min_char_rate (41) must not be above max_char_rate (40)",
        ),
        (BASE + "labels: {phrases: {English: ['']}}", "should have at least 1 character"),
        (
            BASE + "labels: {calibrate: {quantiles: {min_avg_logprob: 5}}}",
            "min_avg_logprob: 5 is no quantile; it lies between 0 and 1",
        ),
        (BASE + "labels: {calibrate: {quantiles: {avg_logprob: 0.1}}}", "avg_logprob is no threshold"),
        (BASE + "agree_with: {modle: a}", "unknown key `agree_with.modle`; did you mean `model`?"),
        (BASE + "agree_with: {aligner: a}", "agree_with.aligner: only the text of the second model is used"),
        (BASE + "storage: {options: {s3: 5}}", "`storage.options.s3` should be a valid dictionary, not a int"),
        (
            BASE + "storage: {options: {retry: {}}}",
            "`storage.options`: `retry` is no protocol; write it as storage.retry",
        ),
        (
            BASE + "storage: {options: {s3: {config_kwargs: {retries: {max_attempts: 9}}}}}",
            "`storage.options`: s3.config_kwargs.retries is decided by storage.retry.attempts; set that",
        ),
        (BASE + "storage: {retry: {attempts: 0}}", "`storage.retry.attempts` should be greater than 0, not 0"),
        (BASE + "storage: {retry: {wait_s: 1}}", "unknown key `storage.retry.wait_s`; did you mean `max_wait_s`?"),
        (
            BASE + "storage: {options: {s3: [{secret: hush}]}}",
            "`storage.options.s3` should be a valid dictionary, not a list",
        ),
        (BASE + "storage: [{options: {s3: {secret: hush}}}]", "`storage` should be a section of keys, not a list"),
        ("inputs: []\noutput: o", "`inputs` needs at least 1 item"),
        ("inputs: a.tar\noutput: o", "`inputs` should be a valid list, not 'a.tar'"),
        ("inputs: [3]\noutput: o", "`inputs.0` should be a section of keys, not 3"),
        ("inputs: [a, {path: b, knd: files}]\noutput: o", "unknown key `inputs.1.knd`; did you mean `kind`?"),
        ("inputs: [{path: a, kind: tar}]\noutput: o", "`inputs.0.kind` should be 'auto', 'webdataset', 'files'"),
        ("- a", "must hold `key: value` pairs, such as `inputs: [...]`"),
        ("", "must hold `key: value` pairs, such as `inputs: [...]`"),
        (
            "a: [b",
            "is no valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>' in line 1",
        ),
    ],
)
def test_a_mistake_is_named_with_its_file_and_what_would_be_right(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    line = str(caught.value)
    assert message in line and line.startswith(str(tmp_path / "conf.yaml")) and "\n" not in line and "hush" not in line


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "inputs: [{pth: a}]\nengine: {name: fast, batch_size: -1}")
    keys = {line.split("`")[1] for line in str(caught.value).splitlines()}
    assert keys == {"inputs.0.path", "inputs.0.pth", "output", "engine.name", "engine.batch_size"}


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*missing\.yaml \(examples: conf/"):
        load_config(TranscribeConfig, tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read .*binary.yaml"):
        load_config(TranscribeConfig, tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path}"):
        load_config(TranscribeConfig, tmp_path)


def test_validate_says_where() -> None:
    with pytest.raises(ConfigError, match="^the server: `output` is required$"):
        validate(TranscribeConfig, {"inputs": ["a"]}, "the server")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("engine.batch_size=4", "engine.batch_size", 4),
        ("output=s3://bucket/out", "output", "s3://bucket/out"),
        ("engine.context=a=b", "engine.context", "a=b"),
        ("engine.context=", "engine.context", None),
        ("labels.max_char_rate=null", "labels.max_char_rate", None),
        ("labels={max_char_rate: 3}", "labels.max_char_rate", 3.0),
        ("storage.options.s3.endpoint_url=http://h:1", "storage.options", {"s3": {"endpoint_url": "http://h:1"}}),
    ],
)
def test_an_override_sets_one_key(tmp_path: Path, override: str, path: str, value: object) -> None:
    text = BASE + "engine: {model: m}\n"
    if value is None and path == "engine.context":
        with pytest.raises(ConfigError, match="`engine.context` should be a valid string, not None"):
            load(tmp_path, text, override)
        return
    loaded: Any = load(tmp_path, text, override)
    assert loaded.engine.model == "m"
    for key in path.split("."):
        loaded = getattr(loaded, key)
    assert loaded == value


def test_overrides_of_lists(tmp_path: Path) -> None:
    text = "inputs: [a.tar, {path: b, kind: files}]\noutput: out\n"
    assert [source.path for source in load(tmp_path, text, "inputs.0=c.tar").inputs] == ["c.tar", "b"]
    assert load(tmp_path, text, "inputs.1.kind=parquet").inputs[1].kind == "parquet"
    whole = load(tmp_path, text, 'inputs=["s3://b/x-{0..3}.tar", {path: d, kind: files}]').inputs
    assert [(source.path, source.kind) for source in whole] == [("s3://b/x-{0..3}.tar", "auto"), ("d", "files")]


def test_the_last_override_wins_and_a_section_is_made_where_none_is(tmp_path: Path) -> None:
    loaded = load(tmp_path, BASE + "ray:\n", "ray.engines=2", "ray.engines=3", "units.target_s=60")
    assert loaded.ray.engines == 3 and loaded.units.target_s == 60


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.batch_size", "--set engine.batch_size: write it as path.to.key=value"),
        ("=3", "--set =3: write it as path.to.key=value"),
        ("engine.batch_size=[1", "--set engine.batch_size: the value is no valid YAML"),
        ("inputs.1=x", "--set inputs.1: there is no `1` to go into"),
        ("inputs.-1=x", "there is no `-1` to go into"),
        ("inputs.²=x", "there is no `²` to go into"),
        ("inputs.first.kind=files", "there is no `first` to go into"),
        ("output.bucket=x", "there is no `bucket` to go into"),
        ("engin.batch_size=3", "unknown key `engin`; did you mean `engine`?"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, BASE, override)
    assert message in str(caught.value)


SEGMENTATION = {
    "policy": "fixed", "fixed_s": 8, "min_s": 5, "max_s": 20, "stretch_s": 60, "vad_threshold": 0.3, "min_silence_ms": 9
}  # fmt: skip
RESULT = [
    {"audio": {"channels": "split"}},
    {"units": {"target_s": 60}},
    *({"segmentation": {key: value}} for key, value in SEGMENTATION.items()),
    *(
        {"engine": section}
        for section in (
            {"model": "other"},
            {"revision": "main"},
            {"language": "English"},
            {"trust_input_language": True},
            {"context": "hotword"},
            {"name": "reference", "attention": "published"},
            {"dtype": "bfloat16"},
            {"max_new_tokens": 5},
            {"aligner": "Qwen/Qwen3-ForcedAligner-0.6B"},
            {"aligner_revision": "main"},
            {"name": "reference"},
            {"quantization": "int4"},
            {"lm_head": "int8"},
            {"top_logprobs": 8},
            {"max_new_tokens_per_s": 30},
        )
    ),
    *({"agree_with": {key: value}} for key, value in (("model", "a"), ("context", "b"), ("dtype", "bfloat16"))),
    *({"labels": {key: 0.5}} for key in THRESHOLDS),
    {"labels": {"known_phrases": True}},
    {"labels": {"phrases": {"English": ["a phrase"]}}},
    {"labels": {"whole_phrases": {"English": ["a phrase"]}}},
    {"labels": {"keep_causal": False}},
    {"labels": {"languages": {"Thai": {"max_char_rate": 9}}}},
    {"labels": {"calibrate": {}}},
    {"labels": {"calibrate": {"quantiles": {"min_avg_logprob": 0.1}}}},
]  # fmt: skip
NO_RESULT = [
    {"inputs": ["b.tar"]},
    {"output": "elsewhere"},
    {"ray": {"engines": 3, "num_gpus": 0.5, "units_in_flight": 9, "address": "auto", "read_stall_timeout_s": 9}},
    {"storage": {"options": {"s3": {"anon": True}}, "retry": {"attempts": 3, "timeout_s": 5}}},
    *(
        {"engine": section}
        for section in (
            {"device": "cpu"},
            {"threads": 3},
            {"batch_size": 1},
            {"batch_audio_s": 9},
            {"slots": 9},
            {"memory_share": 0.1},
            {"prefill_tokens": 9},
            {"look_ahead": 9},
            {"stall_timeout_s": 60},
            {"streams": {"max_streams": 3, "max_waiting_s": 90, "park_after_s": 0}},
        )
    ),
]


STREAMS: dict[str, Any] = {
    "block_frames": 96, "left_steps": 188, "hold_back": 3, "stable_iterations": 2, "roll": "mark", "min_s": 9,
    "max_s": 15, "repetition_penalty": 1, "no_repeat_ngram": 0, "max_new_tokens": 99,
}  # fmt: skip


def test_the_hash_changes_with_what_changes_a_row_and_with_nothing_else() -> None:
    base = config().result_hash()
    assert base == config().result_hash() and len(base) == 16 and int(base, 16) >= 0
    hashes = [config(**sections).result_hash() for sections in RESULT]
    assert len({base, *hashes}) == 1 + len(RESULT), "each of these makes other rows"
    for sections in NO_RESULT:
        assert config(**sections).result_hash() == base, f"{sections} changes no row"


def causal(**engine: Any) -> str:
    options = {"name": "causal", "tower": "a"} | engine
    return config(segmentation={"policy": "stream"}, engine=options).result_hash()


def test_what_changes_the_rows_of_streams() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"tower": "b"}, {"tower_revision": "c"}, {"untrained_languages": True},
        *({"streams": {key: value}} for key, value in STREAMS.items()),
    ]  # fmt: skip
    assert len({config().result_hash(), *(causal(**change) for change in changes)}) == 1 + len(changes)
    assert set(STREAMS) | SPEED_KEYS == set(StreamsConfig.model_fields)


def test_what_only_changes_the_speed_of_the_second_model_is_in_no_hash() -> None:
    slow, fast = ({"model": "a"} | options for options in ({}, {"slots": 9, "device": "cpu", "batch_size": 1}))
    assert config(agree_with=slow).result_hash() == config(agree_with=fast).result_hash()


def test_every_key_was_decided_on() -> None:
    """A new key must be put into one of the two lists above."""
    decided = {(name, key) for sections in RESULT + NO_RESULT for name, keys in sections.items() for key in keys}
    decided |= {("engine", key) for key in ("tower", "tower_revision", "untrained_languages", "streams")}
    for name in ("audio", "units", "segmentation", "engine", "labels"):
        section = TranscribeConfig.model_fields[name].annotation
        keys = set(section.model_fields)  # type: ignore[union-attr]
        assert keys == {key for section_name, key in decided if section_name == name}


def test_a_value_written_out_and_left_out_are_the_same() -> None:
    assert config(units={"target_s": 1800}).result_hash() == config().result_hash() == config(units={}).result_hash()


def test_a_configuration_cannot_be_changed() -> None:
    frozen = config()
    with pytest.raises(ValidationError, match="frozen"):
        frozen.output = "other"
    with pytest.raises(ValidationError, match="frozen"):
        frozen.engine.batch_size = 2


def test_a_language_has_the_thresholds_of_all_but_for_its_own() -> None:
    labels = LabelsConfig.model_validate(
        {"max_char_rate": 30, "languages": {"vi": {"max_char_rate": 20, "min_avg_logprob": None}}}
    )
    assert (
        labels.thresholds("Vietnamese")["max_char_rate"]
        == labels.thresholds("Vietnamese,English")["max_char_rate"]
        == 20
    )
    assert labels.thresholds("Vietnamese")["min_avg_logprob"] is None
    for other in ("English", "", None):
        assert labels.thresholds(other)["max_char_rate"] == 30 and labels.thresholds(other)["min_avg_logprob"] == -1.0
    written_out = LabelsConfig.model_validate(labels.model_dump(mode="json"))
    assert written_out == labels, "what a language leaves open stays open"


def test_pseudolabel_has_the_keys_of_transcribe_with_the_defaults_of_a_teacher() -> None:
    teacher = PseudolabelConfig.model_validate({"inputs": ["a.tar"], "output": "out"})
    assert teacher.engine.model == "embedded/teacher" and not teacher.labels.keep_causal
    assert teacher.labels.max_reference_wer == 0.1 and teacher.labels.min_duration_s == 0.5
    assert (
        PseudolabelConfig.model_validate(teacher.model_dump() | {"engine": {"slots": 3}}).engine.model
        == "embedded/teacher"
    )
    same = TranscribeConfig.model_validate(teacher.model_dump())
    assert same.result_hash() == teacher.result_hash() != config().result_hash()


def _keys(model: Any, data: Any, path: str = "") -> set[str]:
    """Paths of the keys of sections that `data` leaves out."""
    missing = set()
    for name, field in model.model_fields.items():
        if name not in data:
            missing.add(path + name)
        elif isinstance(data[name], dict) and hasattr(field.annotation, "model_fields"):
            missing |= _keys(field.annotation, data[name], f"{path}{name}.")
    return missing


@pytest.mark.parametrize(("name", "model"), [("transcribe", TranscribeConfig), ("pseudolabel", PseudolabelConfig)])
def test_the_complete_configurations_hold_every_key_with_its_default(name: str, model: type[TranscribeConfig]) -> None:
    path = Path(__file__).parent.parent / "conf" / f"{name}.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert _keys(model, data) == set()
    loaded = load_config(model, path)
    defaults = model.model_validate({"inputs": data["inputs"], "output": data["output"]})
    assert loaded == defaults

"""`shardscribe distill`: what learns and what stands still, what is written, how it goes on, what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray as ray_core
import torch
import yaml
from rich.console import Console
from tensorboardX.proto import event_pb2
from typer.testing import CliRunner

from jobs import distill as job
from jobs import quantize
from jobs.cli import app
from pipeline.alone import alone_in
from pipeline.commit import logits_to_parquet
from pipeline.config import ConfigError, EngineConfig, PseudolabelConfig, validate
from pipeline.distill import state as states
from pipeline.distill import student as training
from pipeline.distill.config import DistillConfig, QuantizeConfig, SpeechConfig, TrainingRayConfig
from pipeline.distill.examples import ExampleRef, read_examples
from pipeline.distill.fit import fit
from pipeline.distill.log import TrainingLog, entries
from pipeline.distill.loop import Loop, best_folder, schedule
from pipeline.distill.quantize import load, quantized_linears
from pipeline.distill.stored import StoredTeacher
from pipeline.distill.student import QuantizedStudent, Writer
from pipeline.distill.training_output import TrainingOutput
from pipeline.distill.worker import TrainingError, Worker
from pipeline.engine.checkpoint import CheckpointError, resolve
from pipeline.engine.create import create_engine
from pipeline.engine.quantized import read
from pipeline.schema import Hypothesis
from pipeline.storage import StorageError
from pipeline.units import TranscribedSegment
from tests.distill.sources import write_manifest
from tests.engine.tiny import build_checkpoint, segment

CPU = torch.device("cpu")
ALONE = Worker(0, 1, CPU)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_manifest(tmp_path_factory.mktemp("manifest") / "m.jsonl", 4))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another random model with the same tokenizer."""
    return build_checkpoint(tmp_path_factory.mktemp("teacher") / "teacher", seed=7)


def rounded(model: Path | str, out: Path, manifest: str, bits: int = 4, group_size: int = 32) -> Path:
    options = {
        "model": str(model),
        "output": str(out),
        "calibration": {"sources": [manifest], "samples_per_language": 1},
        "group_size": group_size,
        "format": f"int{bits}",
        "algorithm": "rtn",
        "device": "cpu",
    }
    quantize.run(validate(QuantizeConfig, options, "test"), Console(quiet=True))
    return out / "fake-quant"


@pytest.fixture(scope="module")
def student(tiny_checkpoint: Path, manifest: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounded(tiny_checkpoint, tmp_path_factory.mktemp("student") / "int4", manifest)


@pytest.fixture
def config(student: Path, teacher: Path, manifest: str, tmp_path: Path) -> DistillConfig:
    (tmp_path / "out").mkdir()
    return configured(student, teacher, manifest, tmp_path / "out")


def configured(student: Path, teacher: Path | None, manifest: str, output: Path, **changes: Any) -> DistillConfig:
    options: dict[str, Any] = {
        "student": str(student),
        "teacher": str(teacher) if teacher else None,
        "output": str(output),
        "labels": {"sources": [manifest]},
        "heldout": {"sources": [manifest], "samples_per_language": 1},
        "steps": 8,
        "warmup_steps": 2,
        "learning_rate": 3e-3,
        "batch_audio_s": 12,
        "evaluate_every": 4,
        "save_every": 2,
        "log_every": 1,
        "dtype": "float32",
        "device": "cpu",
        "readers": 1,
    }
    return validate(DistillConfig, options | changes, "test")


def curve(output: Path) -> list[tuple[int, float, float]]:
    return [(each["step"], each["loss"], each["lr"]) for each in entries(output / "training.jsonl") if "loss" in each]


def run(config: DistillConfig) -> None:
    training.train(config, ALONE)


# what learns


def test_only_the_chosen_quantized_weights_learn_and_all_else_stands_still(config: DistillConfig) -> None:
    config = config.model_copy(update={"trainable": ["*.up_proj", "*.q_proj"]})
    task = QuantizedStudent(config, ALONE, torch.float32)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    trained = Loop(config, task, ALONE, torch.float32)
    trained.run()
    trained.close()
    after = task.model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved == {
        name for name in before if name.endswith(("up_proj.weight", "q_proj.weight")) and ".model." in name
    }
    assert any("_amax" in name for name in before), "scales are among those that stand still"


def test_it_learns_and_what_is_written_is_what_was_trained(config: DistillConfig, tmp_path: Path) -> None:
    run(config.model_copy(update={"steps": 40, "evaluate_every": 20, "save_every": 40}))
    output = Path(config.output)
    held = [entry for entry in entries(output / "training.jsonl") if entry["kind"] == "heldout"]
    assert [entry["step"] for entry in held] == [0, 20, 40]
    assert held[-1]["kl"] < 0.8 * held[0]["kl"] and held[-1]["ce"] < held[0]["ce"]
    state = states.newest(output / "state")
    assert state is not None and state.step == 40 and best_folder(output, state.best_step).is_dir()
    Writer(resolve(config.student, quantization="fake_quant")).write(state.weights, tmp_path / "written")
    written = load(resolve(str(tmp_path / "written"), quantization="fake_quant"), CPU).model
    for name, linear in quantized_linears(written).items():
        trained = linear.weight_quantizer(state.weights[f"{name}.weight"]).to(torch.bfloat16)
        assert torch.equal(linear.weight_quantizer(linear.get_parameter("weight")), trained)


def test_a_loop_that_is_stopped_goes_on_with_the_same_curve(
    config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    other = config.model_copy(update={"output": str(tmp_path / "other")})
    Path(other.output).mkdir()
    real = Loop._learn

    def stop(self: Loop[Any], batches: Any) -> Any:
        if self._step == 5:
            raise KeyboardInterrupt
        return real(self, batches)

    monkeypatch.setattr(Loop, "_learn", stop)
    with pytest.raises(KeyboardInterrupt):
        run(other)
    monkeypatch.undo()
    run(other)
    assert [step for step, _, _ in curve(tmp_path / "other")] == list(range(1, 9)), "none twice, none left out"
    for mine, its in zip(curve(tmp_path / "other"), curve(tmp_path / "out"), strict=True):
        assert mine == pytest.approx(its, rel=1e-6)
    weights = [states.newest(tmp_path / name / "state").weights for name in ("out", "other")]  # type: ignore[union-attr]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_workers_learn_what_one_does_with_twice_the_batches(
    config: DistillConfig, tmp_path: Path, parallel: str
) -> None:
    run(config.model_copy(update={"accumulate": 2, "steps": 5}))
    two = config.model_copy(
        update={
            "steps": 5,
            "output": str(tmp_path / "two"),
            "ray": TrainingRayConfig.model_validate({"workers": 2, "num_cpus": 0.5, "parallel": parallel}),
        }
    )
    Path(two.output).mkdir()
    fit(partial(training.train, two), two.ray, tmp_path / "two" / "ray", "cpu")
    for mine, its in zip(curve(tmp_path / "two"), curve(tmp_path / "out"), strict=True):
        assert mine == pytest.approx(its, rel=1e-4)
    # and one goes on alone where two stopped
    one = two.model_copy(update={"steps": 6, "accumulate": 2, "ray": TrainingRayConfig()})
    run(one)
    assert [step for step, _, _ in curve(tmp_path / "two")] == list(range(1, 7))


def test_a_stored_teacher_teaches_what_a_live_one_does(tmp_path: Path, manifest: str, local_ray: None) -> None:
    """On the embedded pair, with 32 of 2,560 tokens stored in 16 bits."""
    labels = {
        "inputs": ["pipeline/embedded/samples/mixed-00000.tar"],
        "output": str(tmp_path / "labels"),
        "engine": {"model": "embedded/teacher", "top_logprobs": 32, "dtype": "float32"},
    }
    from jobs import transcribe

    assert transcribe.run(validate(PseudolabelConfig, labels, "test"), Console(quiet=True)) == 0
    student = rounded("embedded/student", tmp_path / "int3", manifest, bits=3, group_size=128)
    curves = {}
    for name, teacher in (("live", Path("embedded/teacher")), ("stored", None)):
        (tmp_path / name).mkdir()
        options = {"steps": 6, "learning_rate": 1e-4, "evaluate_every": 6, "batch_audio_s": 30}
        run(configured(student, teacher, str(tmp_path / "labels"), tmp_path / name, **options))
        curves[name] = [entry for entry in entries(tmp_path / name / "training.jsonl") if entry["kind"] == "step"]
    for live, stored in zip(curves["live"], curves["stored"], strict=True):
        print(f"step {live['step']}: KL live {live['kl']:.5f}, stored {stored['kl']:.5f}; CE {live['ce']:.5f}")
        assert stored["kl"] == pytest.approx(live["kl"], rel=0.05, abs=2e-4)
        assert stored["kl"] <= live["kl"] + 2e-4, "a lower bound"
        assert stored["ce"] == pytest.approx(live["ce"], rel=0.02, abs=1e-4)


# the command


@pytest.mark.usefixtures("local_ray")
def test_the_command_ends_with_a_model_that_runs_as_int4(
    config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With relative paths, as people write them."""
    conf = tmp_path / "d.yaml"
    data = config.model_dump(mode="json") | {"output": "new"}
    for place, key in (
        (data, "student"),
        (data, "teacher"),
        *((data[name]["sources"], 0) for name in ("labels", "heldout")),
    ):
        place[key] = os.path.relpath(place[key], tmp_path)
    conf.write_text(yaml.safe_dump(data))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["distill", str(conf), "--debug"])
    assert result.exit_code == 0, result.output
    model = tmp_path / "new" / "model"
    assert "step 8/8  held-out: CE" in result.output and f"Card: {model / 'README.md'}" in result.output.replace(
        "\n", ""
    )
    facts = json.loads((model / "training.json").read_text())
    assert facts["numbers"] == "int4" and len(facts["teachers"]) == 1 and facts["best_step"] in (0, 4, 8)
    assert {entry["step"] for entry in facts["heldout"]} == {0, 4, 8}
    texts = []
    for form in ("packed", "export", "fake-quant"):
        assert len(read(model / form).linears) == 14
        options = {"model": str(model / form), "quantization": "int4", "device": "cpu", "max_new_tokens": 8}
        engine = create_engine(EngineConfig.model_validate(options))
        (found,) = engine.submit([segment(2.3, 1)]).result()
        engine.close()
        assert isinstance(found, Hypothesis)
        texts.append(found.token_ids)
    assert texts[0] == texts[1] == texts[2]
    again = CliRunner().invoke(app, ["distill", str(conf)])
    assert again.exit_code == 0 and "nothing left to do" in again.output
    board = next((tmp_path / "new" / "tensorboard").iterdir())
    tags = {value.tag for event in events(board) for value in event.summary.value}
    assert tags >= {"step/loss", "step/kl", "step/ce", "step/lr", "step/tokens_s", "heldout/error_rate"}


def events(file: Path) -> list[Any]:
    """TFRecords: length, its checksum, data, its checksum."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


@pytest.mark.usefixtures("local_ray")
def test_sigkill_then_the_same_command_gives_the_same_curve(config: DistillConfig, tmp_path: Path) -> None:
    run(config)
    conf = tmp_path / "d.yaml"
    output = tmp_path / "killed"
    conf.write_text(yaml.safe_dump(config.model_copy(update={"output": str(output)}).model_dump(mode="json")))
    command = [sys.executable, "-c", "from jobs.cli import app; app()", "distill", str(conf)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    driver = subprocess.Popen(command, cwd=ROOT, env=inherited, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 150
    while not curve(output):
        assert driver.poll() is None and time.monotonic() < until, driver.communicate()[1]
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    result = CliRunner().invoke(app, ["distill", str(conf)])
    assert result.exit_code == 0, result.output
    assert [step for step, _, _ in curve(output)] == list(range(1, 9)), "none twice, none left out"
    for mine, its in zip(curve(output), curve(tmp_path / "out"), strict=True):
        assert mine == pytest.approx(its, rel=1e-5)


# what goes wrong


def test_a_loss_that_is_no_number_stops_and_names_the_batch(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Loop._forward, 0

    def poisoned(self: Loop[Any], tensors: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return real(self, tensors) * (math.nan if calls == 4 else 1.0)

    monkeypatch.setattr(Loop, "_forward", poisoned)
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan .* on the batch of \S+m.jsonl#\d+") as caught:
        run(config)
    output = Path(config.output)
    assert f"{output / 'state' / 'step-00000002.pt'} is the last good state" in str(caught.value)
    state = states.newest(output / "state")
    assert state is not None and state.step == 2 and all(each.isfinite().all() for each in state.weights.values())
    assert best_folder(output, state.best_step).is_dir()


@pytest.mark.usefixtures("local_ray")
def test_workers_that_die_start_again_and_mistakes_do_not(tmp_path: Path) -> None:
    def dies_once(worker: Worker) -> None:
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os._exit(1)
        (tmp_path / "ended").touch()

    def mistaken(worker: Worker) -> None:
        with (tmp_path / "tries").open("a") as file:
            file.write("x")
        raise ConfigError("labels: nothing there")

    def dies(worker: Worker) -> None:
        os._exit(1)

    ray = TrainingRayConfig(num_cpus=0.5, retries=1)
    fit(dies_once, ray, tmp_path / "a", "cpu")
    assert (tmp_path / "ended").exists()
    with pytest.raises(ConfigError, match="labels: nothing there"):
        fit(mistaken, ray, tmp_path / "b", "cpu")
    assert (tmp_path / "tries").read_text() == "x"
    with pytest.raises(TrainingError, match="workers failed 1 times"):
        fit(dies, ray.model_copy(update={"retries": 0}), tmp_path / "c", "cpu")
    until = time.monotonic() + 30
    while ray_core.available_resources().get("CPU", 0.0) < ray_core.cluster_resources()["CPU"]:
        assert time.monotonic() < until, "failed trainings keep their place"
        time.sleep(0.2)


def test_a_teacher_of_another_family_is_refused(config: DistillConfig, teacher: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(teacher, tmp_path / "features"))
    features = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(features | {"n_fft": 512}))
    with pytest.raises(CheckpointError, match=r"hears other features than .* \(.*n_fft.* differ\); take a teacher of"):
        run(config.model_copy(update={"teacher": str(other)}))
    with pytest.raises(CheckpointError, match=r"embedded/teacher has another tokenizer \(2,\d+ tokens\) than"):
        run(config.model_copy(update={"teacher": "embedded/teacher"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "embedded/student"}, "has no fake quantization to train through; run `shardscribe quantize`"),
        ({"teacher": "embedded/none"}, "teacher: there is no 'embedded/none'"),
        ({"teacher": None}, r"teacher: null takes what the labels' jobs stored, and \S+m.jsonl#1 is of a manifest"),
        ({"output": "s3://bucket/out"}, "output: s3://bucket/out is no local folder"),
        ({"labels": {"sources": ["nothing"], "min_s": 50, "max_s": 60}}, "is neither a NeMo manifest"),
        ({"languages": ["Thai"]}, "no examples of Thai"),
    ],
)
def test_what_cannot_be_trained_on_is_said_and_leaves_nothing(
    student: Path, teacher: Path, manifest: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if languages := changes.pop("languages", None):
        changes = {"labels": {"sources": [manifest], "languages": languages}}
    options = configured(student, teacher, manifest, tmp_path / "out").model_dump(mode="json") | changes
    with pytest.raises((ConfigError, CheckpointError), match=message):
        job.run(validate(DistillConfig, options, "test"), Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_audio_that_is_gone_ends_training_and_is_named(config: DistillConfig, tmp_path: Path) -> None:
    line = {"audio_filepath": "gone.wav", "duration": 2.0, "text": "a", "lang": "en"}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(StorageError, match=r"m.jsonl#1: \S+gone.wav: no such file"):
        run(config.model_copy(update={"labels": SpeechConfig(sources=[str(tmp_path / "m.jsonl")])}))


def test_a_teacher_that_stored_nothing_is_told_what_to_do(student: Path, manifest: str, tmp_path: Path) -> None:
    ref = ExampleRef("a@0-1", "a.wav", 0.0, 1.0, "a", "English", "a", logits=str(tmp_path / "unit.parquet"))
    with pytest.raises(ConfigError, match=r"unit.parquet is not there: label with engine.top_logprobs"):
        StoredTeacher({}).likeliest(ref)
    hypothesis = Hypothesis("a", "a", "English", [5], [-0.1], "stop", top_ids=np.array([[5, 6]], np.int32),
                            top_logprobs=np.array([[-0.1, -2.0]], np.float32))  # fmt: skip
    labelled = TranscribedSegment("a@0-1", "a", "a.wav", None, 0.0, 1.0, None, None, hypothesis, None)
    (tmp_path / "unit.parquet").write_bytes(logits_to_parquet([labelled]))
    found = StoredTeacher({}).likeliest(replace(ref, token_ids=array("i", [5])))
    assert found.ids.tolist() == [[5, 6]] and found.logprobs[0].tolist() == pytest.approx([-0.1, -2.0], rel=1e-3)
    with pytest.raises(StorageError, match="holds nothing of a@0-1 as it is labelled: run its job again"):
        StoredTeacher({}).likeliest(replace(ref, token_ids=array("i", [7])))


def test_names_that_no_layer_has_are_refused(config: DistillConfig) -> None:
    with pytest.raises(ConfigError, match=r"trainable: \*.conv names no quantized layer of"):
        run(config.model_copy(update={"trainable": ["*.conv"]}))


def test_another_training_does_not_mix_in(config: DistillConfig, tmp_path: Path) -> None:
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="holds something that is no training; name a new folder"):
        job.run(config, Console(quiet=True))
    (tmp_path / "out" / "notes.txt").unlink()
    revisions, refs = {"student": "a", "teacher": None}, read_examples(config.labels.sources, {})
    TrainingOutput(config).claim(revisions, refs)
    TrainingOutput(config.model_copy(update={"log_every": 7})).claim(revisions, refs)
    for other, message in (
        (config.model_copy(update={"learning_rate": 1.0}), "changed: learning_rate"),
        (config.model_copy(update={"ray": TrainingRayConfig(workers=2)}), "changed: ray.workers"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainingOutput(other).claim(revisions, refs)
    with pytest.raises(ConfigError, match="changed: the examples"):
        TrainingOutput(config).claim(revisions, refs[1:])
    with pytest.raises(ConfigError, match="changed: the weights of the teacher"):
        TrainingOutput(config).claim(revisions | {"teacher": "b"}, refs)
    with pytest.raises(ConfigError, match="is the output of another job"):
        TrainingOutput(config).claim({"model": "a"}, refs)


def test_one_training_at_a_time(tmp_path: Path) -> None:
    another = pytest.raises(TrainingError, match="another process works in")
    with alone_in(tmp_path, TrainingError), another, alone_in(tmp_path, TrainingError, 0.3):
        pass
    with alone_in(tmp_path, TrainingError, 0.3):
        pass


# small parts


def test_the_learning_rate_rises_and_falls(config: DistillConfig) -> None:
    config = config.model_copy(update={"steps": 100, "warmup_steps": 10, "final_share": 0.1})
    factors = [schedule(config, step) for step in range(100)]
    assert factors[:10] == sorted(factors[:10]) and factors[0] == pytest.approx(1 / 11)
    assert factors[10:] == sorted(factors[10:], reverse=True) and factors[10] == 1
    assert factors[-1] == pytest.approx(0.1, abs=0.01)


def test_a_log_goes_on_behind_the_state(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.add({"step": step, "kind": "step", "loss": 1.0 / step})
    log.close()
    with (tmp_path / "training.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')
    TrainingLog(tmp_path, 2).close()
    assert [entry["step"] for entry in entries(tmp_path / "training.jsonl")] == [1, 2]


def test_states_are_whole_and_the_newest_two_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        states.save(tmp_path, states.State(step, {"w": torch.full((2,), float(step))}, {}, 0, (1.0, 2.0)))
    (tmp_path / ".step-00000009.part").write_bytes(b"cut off")
    assert [file.name for file in sorted(tmp_path.glob("step-*"))] == ["step-00000002.pt", "step-00000003.pt"]
    found = states.newest(tmp_path)
    assert found is not None and found.step == 3 and float(found.weights["w"][0]) == 3.0

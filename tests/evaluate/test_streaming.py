"""Systems under the streaming contract, and `shardscribe evaluate --contract streaming` as a user runs it."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner, Result

from jobs.cli import app
from pipeline.config import EngineConfig
from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.commit import CommitPolicy
from pipeline.engine.causal.roll import RollPolicy
from pipeline.engine.causal.settings import Settings
from pipeline.engine.causal.tower import Geometry
from pipeline.engine.causal.weights import save_tower
from pipeline.engine.model import LoadedModel
from pipeline.evaluate.replay import Talk, measure
from pipeline.evaluate.streaming_systems import CausalSystem, OfflineSystem
from pipeline.evaluate.upstream import Backend, UpstreamSystem
from tests.engine.causal.recordings import joined
from tests.engine.causal.streams import loaded_from, text_of, transcribed
from tests.engine.causal.upstream import STUDENT, save_flat, tower_of, upstream
from tests.engine.tiny import noise

SECOND = 16_000
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
SENTENCES = [{"text": " ".join(WORDS), "offset": 0.0, "duration": 8.0}]


def talk(seconds: float = 8.0, sentences: Any = SENTENCES) -> Talk:
    return Talk("talk", "English", " ".join(WORDS), np.zeros(int(seconds * SECOND), np.int16), sentences)


SETTINGS = Settings(Geometry(96, 40), CommitPolicy(2), RollPolicy(2.0, 4.0), max_new_tokens=24, slots=1)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return loaded_from(tiny_checkpoint)


def test_our_engine_never_takes_back_a_word(loaded: LoadedModel) -> None:
    pcm = noise(30.0, 5)
    system = CausalSystem("ours", loaded, SETTINGS, loaded.info)
    found = measure(system, replace(talk(), pcm=pcm), None)
    (updates,) = transcribed(StreamBatch(loaded, replace(SETTINGS, max_waiting_s=1e6)), [pcm])
    assert found.text == text_of(updates).rstrip() and found.text
    assert (found.num_retractions, found.num_refused) == (0, 0) and found.num_updates > 20
    again = measure(system, replace(talk(), pcm=pcm), None)
    assert again.text == found.text


def test_the_end_of_a_segment_keeps_its_newest_250_ms_until_the_next_update(loaded: LoadedModel) -> None:
    system = CausalSystem("ours", loaded, SETTINGS, loaded.info)
    system.begin("English")
    pcm = noise(12.0, 5)
    updates = [update for at in range(0, len(pcm), 1600) for update in system.hear(pcm[at : at + 1600])]
    updates += system.end()
    assert [update.is_final for update in updates] == [False] * (len(updates) - 1) + [True]
    for update in updates:
        assert 0 <= update.open_s <= 4.0 + 0.96 and update.open_from <= len(update.text)
    before = [update.held_from or 0 for update in updates]
    assert before == sorted(before)


def test_the_offline_engine_is_the_ceiling_and_has_no_latency(tiny_checkpoint: Path) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), dtype="float32", device="cpu", threads=1, max_new_tokens=6)
    system = OfflineSystem("offline", config)
    found = system.measure(replace(talk(), pcm=joined("english", 40.0).pcm))
    system.close()
    (minute,) = found.minutes
    assert found.latencies_s is None and minute.flops and minute.lm_head_flops
    assert minute.flops > minute.lm_head_flops and found.text


@pytest.mark.parametrize("backend", ["windowed", "causal"])
def test_the_upstream_runtime_keeps_the_contract(backend: Backend, tmp_path: Path) -> None:
    upstream()
    clip = joined("english", 12.0)
    tower = str(save_flat(STUDENT, tmp_path)) if backend == "causal" else ""
    config = EngineConfig(model="embedded/student", dtype="float32", device="cpu")
    system = UpstreamSystem(backend, config, backend, tower)
    found = measure(system, Talk("clip", "English", clip.text, clip.pcm))
    assert found.num_retractions == found.num_refused == 0 and found.num_updates >= 5
    assert found.text and found.latencies_s is None
    assert found.errors.rate < (0.6 if backend == "windowed" else 1.0), found.text
    (minute,) = found.minutes
    assert minute.flops and minute.lm_head_flops and minute.lm_head_flops < minute.flops


# the command


def write_talks(path: Path, *labels: dict[str, Any], seconds: float = 5.0) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate(labels):
            audio = io.BytesIO()
            soundfile.write(audio, noise(seconds, number), SECOND, format="WAV")
            files = {f"{number}.wav": audio.getvalue(), f"{number}.json": json.dumps(label).encode()}
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


LABEL = {"text": " ".join(WORDS), "language": "en", "sentences": SENTENCES}


def evaluate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_command_writes_a_table_and_all_figures(tiny_checkpoint: Path, tmp_path: Path) -> None:
    talks = write_talks(tmp_path / "talks.tar", LABEL, {"text": "one", "language": "Chinese"}, {"language": "en"})
    model = "--manifest", talks, "--model", tiny_checkpoint, "--out", tmp_path / "out"
    sets = "--set", "engine.tower=offline", "--set", "engine.dtype=float32", "--set", "engine.max_new_tokens=6"
    result = evaluate("--contract", "streaming", *model, *sets, "--system", "causal", "--system", "offline")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "streaming.json").read_text())
    assert [(row["system"], row["language"], row["num_retractions"]) for row in found["rows"]] == [
        (system, language, 0) for system in ("causal", "offline") for language in ("English", "Chinese")
    ]
    first, second, *_, offline = found["recordings"]
    assert first["talk"].endswith("0.wav") and first["audio_s"] == 5.0 and first["minutes"][0]["flops"] > 0
    assert second["latency_s"] is None and second["num_words_timed"] == 0 and offline["latency_s"] is None
    assert found["machine"]["versions"]["torch"] and found["systems"]["causal"]["settings"]["roll"]["min_s"] == 7.0
    lines = (tmp_path / "out" / "streaming.md").read_text().splitlines()
    assert len(lines) == 6 and lines[2].startswith("| causal | English | WER ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contract", "nonsense"], "--contract nonsense: there is streaming"),
        (["--contract", "streaming", "--system", "both"], "--system both: there are causal, windowed, offline"),
        (["--contract", "streaming"], "tower: engine.name: causal needs one"),
        (["--contract", "streaming", "--set", "engine.tower=/nowhere"], "'/nowhere' is no file or folder"),
        (["--system", "causal"], "--system goes with --contract streaming"),
        (["--contract", "streaming", "--json"], "--contract goes with --manifest"),
    ],
)
def test_a_mistake_is_one_line(tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    talks = write_talks(tmp_path / "talks.tar", LABEL)
    result = evaluate("--manifest", talks, "--model", tiny_checkpoint, "--out", tmp_path / "out", *arguments)
    assert result.exit_code in (1, 2) and message in " ".join(result.output.split()), result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"language": "en"}, "no recording of the inputs has a reference"),
        ({"text": "one"}, "0.wav names no language; --language NAME"),
        ({"text": "one", "language": "xx"}, "language 'xx' is none that Qwen3-ASR knows"),
    ],
)
def test_recordings_that_cannot_be_scored(
    tiny_checkpoint: Path, tmp_path: Path, label: dict[str, Any], message: str
) -> None:
    talks = write_talks(tmp_path / "talks.tar", label)
    arguments = "--contract", "streaming", "--manifest", talks, "--model", tiny_checkpoint, "--out", tmp_path / "out"
    result = evaluate(*arguments, "--set", "engine.tower=offline")
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_language_that_the_tower_was_not_trained_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_tower(tower_of(tiny_checkpoint), tmp_path / "tower.safetensors", {"languages": "English"})
    talks = write_talks(tmp_path / "talks.tar", LABEL | {"language": "vi"}, seconds=1.0)
    arguments = ["--contract", "streaming", "--manifest", talks, "--model", tiny_checkpoint, "--out", tmp_path / "out"]
    arguments += ["--set", f"engine.tower={tmp_path / 'tower.safetensors'}", "--set", "engine.dtype=float32"]
    result = evaluate(*arguments)
    assert result.exit_code == 2 and "Vietnamese is none of the languages" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert evaluate(*arguments, "--force").exit_code == 0


def test_a_contract_needs_recordings_and_a_model() -> None:
    result = evaluate("--contract", "streaming", "--system", "offline")
    assert result.exit_code == 2 and "needs --manifest FILE, --model MODEL, --out DIR" in result.output

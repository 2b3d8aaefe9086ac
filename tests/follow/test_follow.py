"""Streams that keep coming: what is written of them is what a recording would give, once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
import s3fs
import soundfile
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import ConfigError, validate
from pipeline.engine.causal.engine import CausalEngine
from pipeline.follow.config import FollowConfig
from pipeline.follow.follower import Follower
from pipeline.output import Output
from pipeline.schema import Hypothesis, Segment
from pipeline.summary import summarize
from tests.engine.causal.test_engine import STREAMS
from tests.engine.tiny import noise

TIMEOUT_S = 60


def config_of(model: Path, folder: Path, **options: Any) -> FollowConfig:
    engine = {"model": str(model), "tower": "offline", "dtype": "float32", "device": "cpu", "slots": 8}
    data = {
        "inputs": [str(folder / "in")],
        "output": str(folder / "out"),
        "engine": engine | {"streams": STREAMS} | options.pop("engine", {}),
        "ended_after_s": 0.2,
        "poll_s": 0.02,
        "list_every_s": 0.05,
        "segments_per_object": 3,
    }
    return validate(FollowConfig, data | options, "test")


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CausalEngine]:
    engine = CausalEngine(config_of(tiny_checkpoint, tmp_path_factory.mktemp("engine")).engine)
    yield engine
    engine.close()


def follow(config: FollowConfig, engine: CausalEngine, until: Callable[[Follower], bool] | None = None) -> Follower:
    """Until all that is there was heard, or until `until`."""
    output = Output(config.output, {})
    output.claim(config.job)
    Path(config.output, "streams").mkdir(parents=True, exist_ok=True)
    stop, ended = threading.Event(), time.monotonic() + TIMEOUT_S
    follower = Follower(config, engine, output, f"run-{time.monotonic()}", lambda segment: None)

    def look(_: Any) -> None:
        if time.monotonic() > ended or (until is not None and until(follower)):
            stop.set()

    follower.run(stop, until_idle=until is None, progress=look)
    assert time.monotonic() < ended, "it did not end by itself"
    return follower


def rows(config: FollowConfig) -> list[dict[str, Any]]:
    table = ds.dataset(Path(config.output) / "transcripts", format="parquet").to_table()
    return sorted(table.to_pylist(), key=lambda row: (row["recording_id"], row["offset"], row["duration"]))


def expected(engine: CausalEngine, pcm: np.ndarray) -> list[tuple[float, float, str]]:
    """Offset, duration and text of the segments of a recording."""
    (heard,) = engine.stream([Segment("whole", pcm)]).result(TIMEOUT_S)
    found = []
    for each in heard:
        assert isinstance(each.result, Hypothesis)
        found.append((each.start / 16_000, (each.end - each.start) / 16_000, each.result.text))
    return found


def told(found: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    return [(row["offset"], row["duration"], row["text"]) for row in found]


def assert_heard(found: list[dict[str, Any]], wanted: list[tuple[float, float, str]]) -> None:
    """But for the last 80 ms, which a stream does not say that it has heard."""
    assert [text for *_, text in told(found)] == [text for *_, text in wanted]
    for (offset, duration, _), (other, its, _) in zip(told(found), wanted, strict=True):
        assert offset == pytest.approx(other) and duration == pytest.approx(its, abs=0.1)


def write_wav(path: Path, pcm: np.ndarray, rate_hz: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, pcm, rate_hz, subtype="PCM_16")


def test_files_of_a_folder(tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path) -> None:
    """In several formats; every stream's rows stand in objects whose names say that it is complete."""
    clips = {"a.wav": noise(13.3, 1), "b.flac": noise(5.0, 2), "c.wav": noise(0.5, 3)}
    for name, pcm in clips.items():
        write_wav(tmp_path / "in" / name, pcm)
    (tmp_path / "in" / "notes.txt").write_text("no audio")
    config = config_of(tiny_checkpoint, tmp_path)
    follower = follow(config, engine)
    found = rows(config)
    for name, pcm in clips.items():
        mine = [row for row in found if row["recording_id"].endswith(name)]
        assert_heard(mine, expected(engine, pcm))
        assert all(row["engine"] == "causal" and row["status"] in ("ok", "empty") for row in mine)
        for row in mine:
            latencies = row["commit_latencies"] or []
            assert len(latencies) == len(row["text"].split()) or not row["text"].isascii()
            assert all(0 <= latency < TIMEOUT_S for latency in latencies)
    assert follower.counts.done == 3 and follower.counts.segments == len(found)
    summary = summarize(Output(config.output, {}))
    assert summary.is_complete and summary.num_recordings == 3 and summary.num_segments == len(found)
    assert not list((tmp_path / "out" / "streams").glob("*.json"))
    assert follow(config, engine).counts.segments == 0  # nothing is heard twice
    assert rows(config) == found


def test_a_file_that_grows(tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path) -> None:
    """Its header names no size; its chunks are of any size, odd bytes too."""
    pcm, path = noise(11.0, 4), tmp_path / "in" / "live.wav"
    write_wav(path, pcm[:0])
    config = config_of(tiny_checkpoint, tmp_path, inputs=[str(path)], ended_after_s=1.0)

    def write() -> None:
        data, at = pcm.tobytes(), 0
        with path.open("ab") as file:
            for size in (1, 9_999, 32_000, 100_001, 50_000, len(data)):
                file.write(data[at : at + size])
                file.flush()
                at += size
                time.sleep(0.1)

    writer = threading.Thread(target=write)
    writer.start()
    follow(config, engine)
    writer.join()
    assert_heard(rows(config), expected(engine, pcm))


def test_a_wav_whose_samples_are_followed_by_other_chunks(
    tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path
) -> None:
    pcm, path = noise(3.0, 5), tmp_path / "in" / "tagged.wav"
    write_wav(path, pcm)
    with path.open("ab") as file:
        file.write(b"LIST" + (4000).to_bytes(4, "little") + b"x" * 4000)
    config = config_of(tiny_checkpoint, tmp_path)
    follow(config, engine)
    assert_heard(rows(config), expected(engine, pcm))


@pytest.mark.parametrize("rate_hz", [16_000, 8_000])
def test_a_fifo(tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path, rate_hz: int) -> None:
    """Samples without a header, then another stream through the same pipe, a WAV this time."""
    fifo, pcm = tmp_path / "radio", noise(9.0, 6)
    os.mkfifo(fifo)
    config = config_of(tiny_checkpoint, tmp_path, inputs=[{"path": str(fifo), "rate_hz": rate_hz}])

    def write(data: bytes) -> None:
        with fifo.open("wb") as file:
            for at in range(0, len(data), 50_001):
                file.write(data[at : at + 50_001])
                file.flush()

    writer = threading.Thread(target=write, args=(pcm.tobytes(),))
    writer.start()
    follow(config, engine, lambda follower: follower.counts.done == 1)
    writer.join()
    first = rows(config)
    assert sum(row["duration"] for row in first) == pytest.approx(9.0 * 16_000 / rate_hz, abs=0.1)
    if rate_hz == 16_000:
        assert_heard(first, expected(engine, pcm))
    write_wav(tmp_path / "second.wav", pcm)
    writer = threading.Thread(target=write, args=((tmp_path / "second.wav").read_bytes(),))
    writer.start()
    follow(config, engine, lambda follower: follower.counts.done == 1)
    writer.join()
    second = [row for row in rows(config) if row["recording_id"].endswith("#2")]
    assert_heard(second, expected(engine, pcm))


def test_a_stopped_follower_goes_on(tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path) -> None:
    """After any number of segments; of what was heard at most the open segment is read again."""
    pcm = noise(40.0, 7)
    write_wav(tmp_path / "in" / "a.wav", pcm)
    config = config_of(tiny_checkpoint, tmp_path)
    for num_segments in (1, 2, 4, 1):
        follow(config, engine, lambda follower, most=num_segments: follower.counts.segments >= most)
        states = list((tmp_path / "out" / "streams").glob("*.json"))
        if states:
            state = json.loads(states[0].read_text())
            ends = [row["offset"] + row["duration"] for row in [*told_rows(config), *state["rows"]]]
            assert state["resume"]["first_frame"] / 100 == pytest.approx(max(ends, default=0.0))
    follow(config, engine)
    assert_heard(rows(config), expected(engine, pcm))


def told_rows(config: FollowConfig) -> list[dict[str, Any]]:
    return rows(config) if (Path(config.output) / "transcripts").exists() else []


def test_a_fifo_that_was_stopped_goes_on(tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path) -> None:
    """What had come through it and was not written yet is on disk."""
    fifo, pcm = tmp_path / "radio", noise(20.0, 8)
    os.mkfifo(fifo)
    config = config_of(tiny_checkpoint, tmp_path, inputs=[str(fifo)])
    keep_open = os.open(fifo, os.O_RDWR)  # so that the writer does not end with its reader
    half = 13 * 16_000 + 77

    def write(samples: np.ndarray) -> None:
        with fifo.open("wb") as file:
            file.write(samples.tobytes())

    writer = threading.Thread(target=write, args=(pcm[:half],))
    writer.start()
    follow(config, engine, lambda follower: follower.counts.segments >= 2 and not writer.is_alive())
    writer = threading.Thread(target=write, args=(pcm[half:],))
    writer.start()
    threading.Timer(1.0, os.close, args=(keep_open,)).start()
    follow(config, engine, lambda follower: follower.counts.done == 1)
    writer.join()
    assert_heard(rows(config), expected(engine, pcm))
    assert not list((tmp_path / "out" / "streams").glob("*.pcm"))


def test_killed_at_any_moment(tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path) -> None:
    """SIGKILL of the process, again and again."""
    clips = {f"{number}.wav": noise(60.0 + number, 10 + number) for number in range(3)}
    for name, pcm in clips.items():
        write_wav(tmp_path / "in" / name, pcm)
    config = config_of(tiny_checkpoint, tmp_path, segments_per_object=2)
    path = tmp_path / "follow.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.cli", "follow", str(path), "--until-idle"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    num_killed = 0
    for wanted in (1, 5, 12):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + TIMEOUT_S
        while process.poll() is None and len(objects(config)) < wanted and time.monotonic() < until:
            time.sleep(0.002)
        num_killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert num_killed >= 2
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    found = rows(config)
    for name, pcm in clips.items():
        assert_heard([row for row in found if row["recording_id"].endswith(name)], expected(engine, pcm))


def objects(config: FollowConfig) -> list[Path]:
    return list((Path(config.output) / "transcripts").glob("*.parquet"))


def test_an_object_that_its_state_does_not_know_of(
    tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill between the two leaves it: the rows are in the object, and in the state, too."""
    pcm = noise(30.0, 20)
    write_wav(tmp_path / "in" / "a.wav", pcm)
    config = config_of(tiny_checkpoint, tmp_path)
    before: dict[Path, bytes] = {}
    write = Follower._write

    def remembered(follower: Follower, state: Any) -> None:
        before.update((file, file.read_bytes()) for file in follower.folder.glob("*.json"))
        write(follower, state)

    with monkeypatch.context() as patch:
        patch.setattr(Follower, "_write", remembered)
        follow(config, engine, lambda follower: len(objects(config)) == 1)
    ((file, data),) = before.items()
    assert len(json.loads(data)["rows"]) == 3
    file.write_bytes(data)
    follow(config, engine)
    assert_heard(rows(config), expected(engine, pcm))


@pytest.mark.parametrize("is_there", [True, False])
def test_a_state_that_is_older_than_the_output_or_lost(
    tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path, is_there: bool
) -> None:
    """It goes on behind the last row."""
    write_wav(tmp_path / "in" / "a.wav", noise(30.0, 21))
    config = config_of(tiny_checkpoint, tmp_path)
    old: dict[Path, bytes] = {}

    def remember(follower: Follower) -> bool:
        if not old:
            old.update((file, file.read_bytes()) for file in follower.folder.glob("*.json"))
        return len(objects(config)) == 2

    follow(config, engine, remember)
    for file, data in old.items():
        file.write_bytes(data) if is_there else file.unlink()
    follow(config, engine)
    found = rows(config)
    ends = [row["offset"] + row["duration"] for row in found]
    assert [row["offset"] for row in found[1:]] == pytest.approx(ends[:-1]) and ends[-1] == pytest.approx(30.0, abs=0.1)


def test_what_cannot_be_heard_is_a_row_and_harms_no_other(
    tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path
) -> None:
    good = noise(4.0, 22)
    write_wav(tmp_path / "in" / "good.wav", good)
    write_wav(tmp_path / "in" / "empty.wav", good[:0])
    (tmp_path / "in" / "nothing.wav").write_bytes(b"")
    (tmp_path / "in" / "text.wav").write_bytes(b"this is no audio at all, and never was")
    write_wav(tmp_path / "half.flac", good)
    half = (tmp_path / "half.flac").read_bytes()
    (tmp_path / "in" / "half.flac").write_bytes(half[: len(half) // 2])
    with wave.open(str(tmp_path / "in" / "odd.wav"), "wb") as file:
        file.setparams((1, 2, 100, 0, "NONE", ""))  # 100 Hz
        file.writeframes(good.tobytes())
    (tmp_path / "in" / "cut.wav").write_bytes((tmp_path / "in" / "good.wav").read_bytes()[:20])
    config = config_of(tiny_checkpoint, tmp_path)
    follower = follow(config, engine)
    by_name = {Path(row["recording_id"]).name: row for row in rows(config)}
    assert_heard([by_name["good.wav"]], expected(engine, good))
    wanted = {
        "empty.wav": "no_samples", "nothing.wav": "empty_file", "text.wav": "not_audio", "half.flac": "truncated",
        "odd.wav": "bad_format", "cut.wav": "truncated",
    }  # fmt: skip
    assert {name: by_name[name]["error"].partition(":")[0] for name in wanted} == wanted
    assert follower.counts.failed == len(wanted) and follower.counts.done == len(wanted) + 1


def fail_stream(engine: CausalEngine, stream: Any) -> None:
    if not stream.is_done:
        engine._batch._fail(stream, "not_finite", "NaN")


def test_a_stream_that_the_engine_fails(
    tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had said stays, the rest is a failed row."""
    pcm = noise(20.0, 23)
    write_wav(tmp_path / "in" / "bad.wav", pcm)
    write_wav(tmp_path / "in" / "good.wav", pcm)
    config = config_of(tiny_checkpoint, tmp_path)
    bad: list[Any] = []

    def fail(follower: Follower) -> bool:
        for stream_id, followed in list(follower._followed.items()):
            if followed.state.url.endswith("bad.wav") and followed.state.resume.num_segments >= 2 and not bad:
                bad.append(stream_id)
                engine._later(partial(fail_stream, engine, followed.live._stream))
        return not follower._followed and follower.counts.done == 2

    follow(config, engine, fail)
    found = rows(config)
    assert_heard([row for row in found if row["recording_id"].endswith("good.wav")], expected(engine, pcm))
    broken = [row for row in found if row["recording_id"].endswith("bad.wav")]
    assert broken[-1]["error"] == "not_finite: NaN" and len(broken) >= 3
    assert_heard(broken[:2], expected(engine, pcm)[:2])


def test_more_streams_than_may_be_open_wait(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for number in range(7):
        write_wav(tmp_path / "in" / f"{number}.wav", noise(3.0, number))
    config = config_of(tiny_checkpoint, tmp_path, engine={"streams": STREAMS | {"max_streams": 2}})
    engine, most = CausalEngine(config.engine), [0, 0]

    def look(follower: Follower) -> bool:
        most[0], most[1] = max(most[0], follower.counts.open), max(most[1], follower.counts.waiting)
        return follower.counts.done == 7

    follow(config, engine, look)
    engine.close()
    assert most[0] == 2 and most[1] >= 4 and len({row["recording_id"] for row in rows(config)}) == 7


def test_of_a_broken_engine_no_stream_is_written_off(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_wav(tmp_path / "in" / "a.wav", noise(10.0, 30))
    config = config_of(tiny_checkpoint, tmp_path)
    engine = CausalEngine(config.engine)
    engine._batch.turn = lambda: (_ for _ in ()).throw(TypeError("ours"))  # type: ignore[method-assign]
    with pytest.raises(Exception, match="the engine broke: TypeError: ours"):
        follow(config, engine)
    engine.close()
    assert not objects(config)
    whole = CausalEngine(config.engine)
    follow(config, whole)
    assert_heard(rows(config), expected(whole, noise(10.0, 30)))
    whole.close()


def test_mistakes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"output": "s3://bucket/out"}, "state: the output is remote"),
        ({"engine": {"tower": None}}, "tower: engine.name: causal needs one"),
        ({"engine": {"streams": {"min_s": 9.0, "max_s": 3.0}}}, r"min_s \(9.0\) must be at most max_s"),
        ({"engine": {"streams": {"rol": 1}}}, "unknown key `engine.streams.rol`; did you mean `roll`"),
        ({"inputs": []}, "`inputs` needs at least 1 item"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(tiny_checkpoint, tmp_path, **options)


def test_the_command(tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path) -> None:
    """Text on stdout as segments end, the rest on stderr; SIGTERM stops it, and one at a time works on an output."""
    pcm = noise(6.0, 31)
    write_wav(tmp_path / "in" / "a.wav", pcm)
    config = config_of(tiny_checkpoint, tmp_path, ended_after_s=None)
    path = tmp_path / "follow.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "follow", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    wanted = expected(engine, pcm)
    assert line.rstrip("\n") == f"{tmp_path}/in/a.wav  00:00:00  {' '.join(wanted[0][2].split())}"
    second = CliRunner().invoke(app, ["follow", str(path)])
    assert second.exit_code == 2 and "another process works in" in second.stderr
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0 and "1 streams open" in errors and "stopped" in errors
    assert not objects(config) and list((tmp_path / "out" / "streams").glob("*.json"))


def test_objects_that_arrive_under_a_prefix(
    tiny_checkpoint: Path, engine: CausalEngine, tmp_path: Path, s3_options: dict[str, dict[str, Any]]
) -> None:
    """Input and output in a bucket, the state in a local folder; one arrives while others are heard."""
    s3 = s3fs.S3FileSystem(**s3_options["s3"])
    s3.mkdir("follow")
    clips = {"a.wav": noise(9.0, 40), "b.flac": noise(4.0, 41), "late.wav": noise(5.0, 42)}
    for name, pcm in clips.items():
        write_wav(tmp_path / name, pcm)
    for name in ("a.wav", "b.flac"):
        s3.put(str(tmp_path / name), f"follow/in/{name}")
    storage = {"options": s3_options}
    config = config_of(
        tiny_checkpoint,
        tmp_path,
        inputs=["s3://follow/in/*.wav", "s3://follow/in/*.flac"],
        output="s3://follow/out",
        state=str(tmp_path / "state"),
        storage=storage,
    )
    (tmp_path / "state").mkdir()
    output = Output(config.output, config.storage.access)
    follower = Follower(config, engine, output, "run", lambda segment: None)
    stop, ended = threading.Event(), time.monotonic() + TIMEOUT_S

    def look(counts: Any) -> None:
        if counts.done == 2 and not s3.exists("follow/in/late.wav"):
            s3.put(str(tmp_path / "late.wav"), "follow/in/late.wav")
        if counts.done == 3 or time.monotonic() > ended:
            stop.set()

    follower.run(stop, progress=look)
    table = ds.dataset("follow/out/transcripts", format="parquet", filesystem=s3).to_table()
    found = sorted(table.to_pylist(), key=lambda row: (row["recording_id"], row["offset"]))
    for name, pcm in clips.items():
        mine = [row for row in found if row["recording_id"] == f"s3://follow/in/{name}"]
        assert_heard(mine, expected(engine, pcm))
    assert not list((tmp_path / "state").glob("*.json"))

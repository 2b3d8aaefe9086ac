"""Outputs of jobs that never ran: rows and run records made by hand, in the files that a job would have written."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.commit import to_parquet
from pipeline.config import TranscribeConfig
from pipeline.engine.base import EngineInfo
from pipeline.output import Output, PlannedSplit, RunPlan
from pipeline.units import UnitKey

START = 1_790_000_000.0
INFO = EngineInfo(
    "reference", "embedded/student", "6f7ca6f577171ec7", "none", "bfloat16", "cuda", "windowed", 4_337_920
)
CONSTANTS = {"engine": "reference", "model_id": "embedded/student", "config_hash": "c0ffee", "run_id": "run"}
SENTENCES = {
    "English": ("the radio said it would be windy", "could you bring the blue envelope", "we walked home last night"),
    "Vietnamese": ("hôm nay trời có nắng nhẹ", "bà Linh lại rất chăm chỉ", "bảy con rùa ngủ ở vườn hoa"),
    "Arabic": ("كان الطقس جميلا هذا الصباح", "هل يمكنك أن تعيد ما قلت", "سنلتقي غدا في المحطة"),
}
ERRORS = (
    "truncated: WAV declares 960044 bytes of audio, 512000 are there",
    "not_audio: neither libsndfile nor FFmpeg can read it (Invalid data found when processing input)",
    "empty_file: the file has no bytes",
)


def config(output: str, inputs: Sequence[str] = ("nowhere/*.tar",), **sections: Any) -> TranscribeConfig:
    return TranscribeConfig.model_validate({"inputs": list(inputs), "output": output} | sections)


def start(
    url: str, splits: dict[str, float], job: TranscribeConfig | None = None, run_id: str = "run", at: float = START
) -> Output:
    """An output that a run of `job` has begun at `at`; `splits` are ids with estimated seconds."""
    output = Output(url, {})
    output.claim(job or config(url))
    planned = [PlannedSplit(split_id, seconds) for split_id, seconds in splits.items()]
    output.write_plan(RunPlan(run_id, at, 1800.0, planned))
    return output


def row(recording: str = "in/a.tar/a.wav", **values: Any) -> dict[str, Any]:
    """One row, all is well with it; `values` overrides."""
    defaults = {
        "segment_id": f"{recording}@0",
        "recording_id": recording,
        "audio_filepath": recording,
        "offset": 0.0,
        "duration": 2.0,
        "text": "some words",
        "text_raw": "",
        "language": "English",
        "avg_logprob": -0.25,
        "status": "ok",
        "keep": True,
        "filter_reasons": [],
        "unit_id": "unit",
    }
    return CONSTANTS | defaults | values


def failed(recording: str = "in/a.tar/b.wav", error: str = ERRORS[0], **values: Any) -> dict[str, Any]:
    caught = {"status": "failed", "error": error, "keep": False, "filter_reasons": ["failed"]}
    return row(recording, duration=0.0, text="", language=None, avg_logprob=None) | caught | values


def put(output: Output, key: UnitKey, rows: list[dict[str, Any]], **record: Any) -> None:
    """Commit a unit; its record is summed up from the rows as the commit step does."""
    languages: Counter[str] = Counter()
    for each in rows:
        if each["status"] != "failed":
            languages[each["language"]] += each["duration"]
    values = {
        "run_id": "run",
        "committed_at": START + 10,
        "busy_s": 1.0,
        "audio_s": sum(each["duration"] for each in rows),
        "num_retries": 0,
        "num_recordings": len({each["recording_id"] for each in rows}),
        "num_segments": len(rows),
        "status": Counter(each["status"] for each in rows),
        "errors": Counter(each["error"].partition(":")[0] for each in rows if each.get("error")),
        "audio_s_by_language": languages,
        "engine": asdict(INFO),
        "versions": {"shardscribe": "0.1.0", "torch": "2.13.0"},
    }
    output.commit_unit(key, to_parquet(rows, values | record))


def archive(url: str, num_shards: int = 40, num_groups: int = 6, missing: int = 0, seed: int = 0) -> Output:
    """A job on `num_shards` tars of `num_groups` units each, in two runs three days apart; three languages, a failure
    here and there, one slow shard. The last `missing` shards are not done."""
    rng = random.Random(seed)
    ids = [f"{rng.getrandbits(64):016x}" for _ in range(num_shards)]
    resumed = START + 3 * 86_400
    output = start(url, dict.fromkeys(ids, num_groups * 1500.0), run_id="20260924T101320-0fd2c1", at=resumed)
    clock, run_id = START + 40, "20260921T101320-51b70e"
    for number, split_id in enumerate(ids[: num_shards - missing]):
        if number == num_shards // 3:
            clock, run_id = resumed + 40, "20260924T101320-0fd2c1"
        tar = f"s3://archive/calls/2026/calls-{number:05d}.tar"
        for group in range(num_groups):
            rows = [_random_row(rng, f"{tar}/call-{group:02d}-{i:03d}.flac") for i in range(60)]
            busy_s = sum(each["duration"] for each in rows) / rng.uniform(280, 420) * (4 if number == 7 else 1)
            clock += busy_s / 2  # two units at once
            end = "z" if group == num_groups - 1 else "g"
            put(output, UnitKey(split_id, group, 0, end), rows, run_id=run_id, committed_at=clock, busy_s=busy_s)  # type: ignore[arg-type]
    return output


def _random_row(rng: random.Random, recording: str) -> dict[str, Any]:
    if rng.random() < 0.01:
        return failed(recording, rng.choices(ERRORS, (6, 3, 1))[0])
    language = rng.choices(list(SENTENCES), (7, 2, 1))[0]
    duration = rng.uniform(14, 30) if rng.random() < 0.6 else rng.gammavariate(2.5, 2.0) + 0.4
    logprob = -rng.gammavariate(1.6, 0.14)
    values = {"language": language, "duration": round(duration, 2), "avg_logprob": logprob}
    if rng.random() < 0.02:
        return row(recording, **values) | {"text": "", "status": "empty", "keep": False, "filter_reasons": ["empty"]}
    text = ". ".join(rng.choices(SENTENCES[language], k=max(1, round(duration / 5)))).capitalize() + "."
    reasons = ["low_logprob"] * (logprob < -0.8) + ["repetitive"] * (rng.random() < 0.01)
    reference = rng.choice(SENTENCES[language]).capitalize() + "." if rng.random() < 0.3 else None
    caught = {"keep": not reasons, "filter_reasons": reasons}
    offset = round(rng.choice([0.0, rng.uniform(0, 4000)]), 3)
    return row(recording, text=text, text_ref=reference, offset=offset, **values) | caught

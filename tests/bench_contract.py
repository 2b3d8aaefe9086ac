"""Systems under the streaming contract: `python -m tests.bench_contract DIR [--tower T] [--minutes N] [--two-hours]`.

The embedded long recording and an hour of generated talk in each language (kept in DIR), replayed live to each system
with one thread: error of what is published, operations in the first and the last minute, commit latency, and how many
streams a core keeps up with. `--two-hours` replays one stream of two hours instead, and says how flat it is by minute.
Prints Markdown, writes DIR/contract.json or two-hours.json. Needs espeak-ng and qwen3-asr-causal.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import EngineConfig
from pipeline.embedded.grammar import LANGUAGES
from pipeline.engine.causal.batch import StreamBatch
from pipeline.engine.causal.load import Causal, load_causal
from pipeline.engine.causal.tower_file import find_tower
from pipeline.evaluate import streaming_report as report
from pipeline.evaluate.replay import CHUNK_S, Replay, Talk, measure
from pipeline.evaluate.streaming_systems import CausalSystem, OfflineSystem
from pipeline.evaluate.upstream import UpstreamSystem
from pipeline.schema import SAMPLE_RATE_HZ
from tests import bench_segmentation

OFFLINE, WINDOWED, RUNTIME = "offline, policy sentence", "windowed re-compute, upstream", "causal, upstream's runtime"
OURS, UNTRAINED = "causal, ours, punctuation roll", "causal, ours, tower before distillation"
MARK, FIXED = "causal, ours, roll at any mark", "causal, ours, fixed-length roll"
ROWS = {
    "offline": OFFLINE,
    "windowed": WINDOWED,
    "runtime": RUNTIME,
    "ours": OURS,
    "mark": MARK,
    "fixed": FIXED,
    "untrained": UNTRAINED,
}
MAX_RATIO = 1.44
BEHIND_S = 1.92  # a block: who is further behind at the end does not keep up
_FIRST_NUM = 32


@dataclass(frozen=True, slots=True)
class Options:
    model: str
    tower: str
    count_every: int
    stream_s: float


def recordings(folder: Path, minutes: float, languages: Sequence[str], generated_only: bool) -> Iterator[Talk]:
    for each in bench_segmentation.talks(folder, minutes, languages)[generated_only:]:
        yield Talk(each.name, each.language, each.text, each.pcm, each.sentences)  # type: ignore[arg-type]


def causal(options: Options, tower: str, **streams: Any) -> Causal:
    """Without penalties, as upstream's windowed re-compute: the embedded model has few tokens, which come again."""
    streams = {"repetition_penalty": 1.0, "no_repeat_ngram": 0} | streams
    engine = {"name": "causal", "model": options.model, "tower": tower, "threads": 1, "untrained_languages": True}
    return load_causal(EngineConfig.model_validate(engine | {"streams": streams}))


def run_row(key: str, options: Options, talks: Sequence[Talk]) -> tuple[dict[str, Any], list[Replay], float | None]:
    """What the system is, its replays, and how many streams of it one core keeps up with (None: 1 / RTF)."""
    name, every = ROWS[key], options.count_every
    engine = EngineConfig(model=options.model, threads=1)
    if key == "offline":
        offline = OfflineSystem(name, engine)
        replays = [offline.measure(talk, every) for talk in talks]
        offline.close()
        return offline.about, replays, None
    if key in ("windowed", "runtime"):
        torch.set_num_threads(1)
        tower = str(find_tower(options.tower)[0]) if key == "runtime" else ""
        theirs = UpstreamSystem(name, engine, "causal" if tower else "windowed", tower)
        return theirs.about, [measure(theirs, talk, every) for talk in talks], None
    roll = key if key in ("mark", "fixed") else "sentence"
    found = causal(options, "offline" if key == "untrained" else options.tower, roll=roll)
    ours = CausalSystem(name, found.loaded, found.settings, found.info)
    replays = [measure(ours, talk, every) for talk in talks]
    return ours.about, replays, streams_per_core(found, talks[0], options.stream_s)


def streams_per_core(found: Causal, talk: Talk, seconds: float) -> float:
    """The largest number, to an eighth, of streams that a batch keeps up with."""
    num = _FIRST_NUM
    while behind_s(found, talk, seconds, num) < BEHIND_S:
        num *= 2
    low, high = num // 2, num
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if behind_s(found, talk, seconds, middle) < BEHIND_S else (low, middle)
    return float(low)


def behind_s(found: Causal, talk: Talk, seconds: float, num: int) -> float:
    """How long after the end of their audio `num` streams, each at another place of a talk and another moment of its
    block, are heard; on a clock of their own, as in replays."""
    batch = StreamBatch(found.loaded, replace(found.settings, slots=num, max_streams=num, max_waiting_s=1e6))
    streams = [batch.open(str(number), talk.language) for number in range(num)]
    size, length = round(CHUNK_S * SAMPLE_RATE_HZ), round(seconds * SAMPLE_RATE_HZ)
    first = np.linspace(0, max(0, len(talk.pcm) - length), num).astype(int)
    late_s = np.arange(num) / num * 1.92
    pushed, now = np.zeros(num, int), 0.0
    while True:
        for number, stream in enumerate(streams):
            heard = min(length, int(max(0.0, now - late_s[number]) / CHUNK_S) * size)
            if heard > pushed[number]:
                at = first[number]
                batch.push(stream, talk.pcm[at + pushed[number] : at + heard])
                pushed[number] = heard
        if batch.has_work:
            began = time.perf_counter()
            batch.turn()
            now += time.perf_counter() - began
            if now > 2 * (seconds + late_s[-1]):
                return float(now - seconds - late_s[-1])  # it will not catch up
        elif (pushed >= length).all():
            return float(now - seconds - late_s[-1])
        else:
            now += CHUNK_S / 4


def table(folder: Path, options: Options, keys: Sequence[str], talks: Sequence[Talk]) -> None:
    about: dict[str, Any] = {}
    replays: list[Replay] = []
    streams: dict[str, float] = {}
    for key in keys:
        began = time.perf_counter()
        about[ROWS[key]], found, per_core = run_row(key, options, talks)
        replays += found
        rtf = sum(each.rtf * each.audio_s for each in found) / sum(each.audio_s for each in found)
        streams[ROWS[key]] = 1 / rtf if per_core is None else per_core
        print(f"{ROWS[key]}: {time.perf_counter() - began:.0f} s", flush=True)
        gc.collect()
    rows = report.rows(replays, streams)
    print(report.markdown(report.HEADERS, [report.cells(row) for row in rows]))
    write(folder / "contract.json", report.to_json(about, replays, rows, 1))
    for line in targets(rows):
        print(line)


def targets(rows: Sequence[report.Row]) -> Iterator[str]:
    by_name = {(row.system, row.language): row for row in rows}
    for language in dict.fromkeys(row.language for row in rows):
        ours, windowed, fixed = (by_name.get((name, language)) for name in (OURS, WINDOWED, FIXED))
        if ours and windowed and windowed.errors.rate:
            ratio = ours.errors.rate / windowed.errors.rate
            yield f"{language}: causal / windowed error {ratio:.2f}, at most {MAX_RATIO}: {met(ratio <= MAX_RATIO)}"
        if ours and fixed:
            better = ours.errors.rate < fixed.errors.rate
            yield f"{language}: punctuation roll better than fixed-length: {met(better)}"
    taken = sum(row.num_retractions for row in rows if row.system in (OURS, MARK, FIXED, UNTRAINED))
    yield f"words taken back by ours: {taken}: {met(taken == 0)}"


def met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def two_hours(folder: Path, options: Options, talk: Talk) -> None:
    """One stream, by the minute."""
    found = causal(options, options.tower)
    system = CausalSystem(OURS, found.loaded, found.settings, found.info)
    replay = measure(system, talk, options.count_every)
    lines = [
        [str(each.number), f"{each.gflop:.4g}", f"{each.lm_head:.3g}", f"{minute.compute_s / minute.audio_s:.4f}",
         f"{minute.rss_bytes / 1e6:.1f}"]
        for each in report.computes_of(replay.minutes)
        for minute in [replay.minutes[each.number - 1]]
    ]  # fmt: skip
    print(report.markdown(["minute", "GFLOP/s of audio", "of it lm_head", "RTF", "RSS, MB"], lines))
    print(report.markdown(["", "first", "last", "drift", "spread"], report.flat_lines(report.curves(replay))))
    rows = report.rows([replay])
    print(report.markdown(report.HEADERS, [report.cells(row) for row in rows]))
    write(folder / "two-hours.json", report.to_json({OURS: system.about}, [replay], rows, 1))


def looped(talk: Talk, minutes: float, loop: float) -> Talk:
    """The first `loop` minutes again and again: what differs between minutes then is a stream's age, not what is said.
    The reference is that of whole talks, and fits no seam."""
    size, times = round(loop * 60 * SAMPLE_RATE_HZ), -(-round(minutes * 60) // round(loop * 60))
    pcm = np.tile(talk.pcm[:size], times)[: round(minutes * 60 * SAMPLE_RATE_HZ)]
    return Talk(f"{talk.name}, looped", talk.language, " ".join([talk.text] * times), pcm)


def write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, ensure_ascii=False, indent=1))
    print(f"written to {path}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="embedded/student")
    parser.add_argument("--tower", default="embedded/tower")
    parser.add_argument("--minutes", type=float, help="of a generated talk: 60, or 120 with --two-hours")
    parser.add_argument("--languages", nargs="*", default=list(LANGUAGES), help="none: the embedded recording alone")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--count-every", type=int, help="so many-th minute: 10, or 5 (15 s each)")
    parser.add_argument(
        "--stream-seconds", type=float, default=60.0, help="of each, to find how many a core keeps up with"
    )
    parser.add_argument("--two-hours", action="store_true")
    parser.add_argument("--loop", type=float, metavar="MINUTES", help="with --two-hours: so much again and again")
    parser.add_argument("--generated-only", action="store_true", help="without the embedded long recording")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    every = given.count_every or (5 if given.two_hours else 10)
    options = Options(given.model, given.tower, every, given.stream_seconds)
    if given.two_hours:
        minutes = given.minutes or 120
        (talk,) = recordings(given.folder, given.loop or minutes, given.languages[:1] or ["English"], True)
        talk = looped(talk, minutes, given.loop) if given.loop else talk
        two_hours(given.folder, options, talk)
    else:
        talks = list(recordings(given.folder, given.minutes or 60, given.languages, given.generated_only))
        table(given.folder, options, given.rows, talks)


if __name__ == "__main__":
    main()

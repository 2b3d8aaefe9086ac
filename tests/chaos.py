"""Kills the parts of running jobs at random moments and shows that nothing is lost, doubled or left behind.

    python -m tests.chaos --kills 100 --seed 7 --out build/chaos [--minutes 60] [--per-round 12]

Victims: the driver, an engine actor, a read task, a raylet with its workers and its objects, and the object store's
gateway, each with SIGKILL. A round is one job on a Ray cluster of three nodes (`ray.cluster_utils`) and a radosgw, with
an output of its own; it is killed and, where that ends the command, run again until it is done. Then its rows have to
be those of an undisturbed run, and nothing may be left: objects, multipart uploads, actors, processes, temporary files.

Exit code 1 when anything is otherwise. DIR gets kills.json, table.txt and what the drivers said.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests import conftest, counted, radosgw  # noqa: F401 (conftest comes before Ray and gives it a token)
from tests.chaos_bucket import Bucket, shards
from tests.chaos_cluster import ENGINE, LEDGER, READ, ChaosCluster, kill
from tests.chaos_findings import VICTIMS, Kill, Victim, blame, compare, may_be_redone, most_in_flight, table

ROOT = Path(__file__).parent.parent
BUCKET = "chaos"
ENGINES = (1, 2)  # of a job, by lot
UNITS_IN_FLIGHT = 2
PATIENCE_S = 300.0  # a job that begins and ends no unit for so long hangs
GRACE_S = 60.0  # until a job's actors and processes are gone
MAX_STARTS = 12  # of one job


@dataclass
class Job:
    """One job: its output, how many engines it has, and what has happened to it."""

    output: str
    engines: int
    driver: subprocess.Popen[bytes] | None = None
    starts: int = 0
    started_at: float = 0.0
    kills: list[Kill] = field(default_factory=list)


class Chaos:
    """`undisturbed()` first, then `round()` until there are kills enough."""

    def __init__(
        self, folder: Path, out: Path, seed: int, num_kills: int, server: radosgw.Server, cluster: ChaosCluster
    ) -> None:
        self._folder, self._out = folder, out
        self._gateway, self._cluster = server.gateway, cluster
        self._rng = random.Random(seed)
        self._deck = deck(num_kills, self._rng)
        self._bucket = Bucket(server, BUCKET)
        for name, data in shards():
            self._bucket.put(f"in/{name}", data)
        self._conf = folder / "conf.yaml"
        self._conf.write_text(yaml.safe_dump(configuration(server, cluster.address)))
        self.kills: list[Kill] = []
        self.violations: list[str] = []
        self.decoded_s = 0.0

    def undisturbed(self) -> None:
        """What rows and objects there have to be, and how long a job takes."""
        job = Job("undisturbed", 1)
        self._start(job)
        if code := self._wait(job):
            raise RuntimeError(f"exit {code} without a kill, see {self._log(job)}")
        self._life_s = time.time() - job.started_at
        units = list(self._bucket.units(job.output))
        self._rows = [row for rows, _ in units for row in rows]
        self._names = self._bucket.names(job.output)
        self._judge(job)
        cut = max(Counter(row["recording_id"] for row in self._rows).values())
        audio_s = sum(record["audio_s"] for _, record in units)
        print(f"undisturbed: {len(units)} units, {len(self._rows)} segments (one recording in {cut}), {audio_s:.1f} s "
              f"of audio, {self._life_s:.0f} s", flush=True)  # fmt: skip

    def round(self, number: int, most_kills: int) -> None:
        """One job, killed up to `most_kills` times, and run again until it is done."""
        job = Job(f"round-{number:03d}", self._rng.choice(ENGINES))
        self._start(job)
        while True:
            if len(job.kills) < most_kills and self._deck and self._moment_comes(job):
                self._kill(number, job)
                continue
            code = self._wait(job)
            if code == 0 or job.starts == MAX_STARTS:
                break
            if job.kills:
                job.kills[-1].outcome = f"{'killed' if code < 0 else f'exit {code}'}, run again"
            else:
                self._violation(f"{job.output}: exit {code} without a kill")
            self._start(job)
        if code:
            self._violation(f"{job.output}: not done after {job.starts} starts")
        self._judge(job)
        for each in job.kills:
            print(each, flush=True)

    def _start(self, job: Job) -> None:
        """The command as a user would run it, with engine actors that write down what they decode."""
        job.starts, job.started_at = job.starts + 1, time.time()
        temporary = self._folder / f"{job.output}-{job.starts}.tmp"
        temporary.mkdir()
        command = [sys.executable, "-c", "from tests.counted import main; main()", "transcribe", str(self._conf)]
        command += ["--set", f"output=s3://{BUCKET}/{job.output}", "--set", f"ray.engines={job.engines}"]
        environment = os.environ | {"TMPDIR": str(temporary)}
        with self._log(job).open("wb") as log:
            job.driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def _log(self, job: Job) -> Path:
        return self._out / f"{job.output}-{job.starts}.log"

    def _wait(self, job: Job) -> int:
        """The driver's exit code, once it ends."""
        assert job.driver is not None
        seen, since = 0, time.monotonic()
        while not _ends(job.driver, 0.5):
            count = len(counted.events(self._folder, job.output))
            if count != seen:
                seen, since = count, time.monotonic()
            elif time.monotonic() - since > PATIENCE_S:
                self._violation(f"{job.output}: nothing happens for {PATIENCE_S:.0f} s, driver ended, {self._log(job)}")
                job.driver.kill()
        return int(job.driver.returncode)

    def _moment_comes(self, job: Job) -> bool:
        """Waits for a random moment, soon or after the next unit begins; False when the driver ended before."""
        longest_s = self._life_s / 2
        if self._rng.random() < 0.5:
            known = len(counted.events(self._folder, job.output))
            if not self._until(job, lambda: len(counted.events(self._folder, job.output)) > known):
                return False
            longest_s = self._life_s / 8  # decoding is a part of that life
        moment = time.monotonic() + self._rng.uniform(0, longest_s)
        return self._until(job, lambda: time.monotonic() >= moment)

    @staticmethod
    def _until(job: Job, condition: Callable[[], bool]) -> bool:
        assert job.driver is not None
        began = time.monotonic()
        while job.driver.poll() is None and time.monotonic() - began < PATIENCE_S:
            if condition():
                return True
            time.sleep(0.02)
        return False

    def _kill(self, number: int, job: Job) -> None:
        """Kills the next victim of the deck that there is at this moment."""
        assert job.driver is not None
        workers = {"engine": self._cluster.workers(ENGINE), "read": self._cluster.workers(READ)}
        place = next((i for i, victim in enumerate(self._deck) if workers.get(victim, [None])), None)
        if place is None:
            return
        victim = self._deck[place]
        committed = sum(name.endswith(".parquet") for name in self._bucket.names(job.output))
        if job.driver.poll() is not None:
            return
        at = time.time()
        moment = f"round {number}, {at - job.started_at:.1f} s after the start, {committed} units committed"
        pids = [job.driver.pid]
        match victim:
            case "driver":
                job.driver.kill()
                job.driver.wait()
            case "engine" | "read":
                worker = self._rng.choice(workers[victim])
                pids = [worker.pid]
                if not kill(worker):
                    return
            case "raylet":
                if self._cluster.workers(LEDGER, can_be_lost=True):
                    self._violation(f"{job.output}: the ledger of attempts is on a node without its driver")
                pids = self._cluster.kill_node(self._rng)
                _ends(job.driver, self._rng.uniform(0, 3))
                self._cluster.add_missing_nodes()
            case "store":
                pids = [self._gateway.kill()]
                _ends(job.driver, self._rng.uniform(1, 5))
                self._gateway.start()
        self._deck.pop(place)
        done = Kill(len(self.kills) + 1, victim, at, moment, pids)
        job.kills.append(done)
        self.kills.append(done)
        self._look(job)

    def _look(self, job: Job) -> None:
        """What a reader finds in the middle: some rows, none of them twice or other than they should be."""
        found = compare([row for rows, _ in self._bucket.units(job.output) for row in rows], self._rows)
        job.kills[-1].doubled, job.kills[-1].different = found.doubled, found.different
        if found.doubled or found.different:
            self._violation(f"after kill {job.kills[-1].number}: {found}")

    def _judge(self, job: Job) -> None:
        """Holds what a finished job did and left against what it should."""
        found = compare([row for rows, _ in self._bucket.units(job.output) for row in rows], self._rows)
        if found:
            self._violation(f"{job.output}: {found}")
        if found and job.kills:
            last = job.kills[-1]
            last.lost, last.doubled, last.different = found.lost, found.doubled, found.different
        self._await_tidy(job)
        names = self._bucket.names(job.output)
        if names != self._names:
            self._violation(f"{job.output}: objects too many {names - self._names}, missing {self._names - names}")

        events = counted.events(self._folder, job.output)
        self.decoded_s += sum(event.audio_s for event in events if event.what == "begun")
        for unexplained in blame(events, job.kills):
            self._violation(f"{job.output}: {unexplained}")
        for each in job.kills:
            may_be = may_be_redone(each.victim, job.engines, UNITS_IN_FLIGHT)
            if len(each.redone) > may_be:
                self._violation(f"kill {each.number}: {len(each.redone)} units decoded again, {may_be} at most may be")
        if (most := most_in_flight(events)) > UNITS_IN_FLIGHT:
            self._violation(f"{job.output}: {most} units in one engine actor that has {UNITS_IN_FLIGHT} slots")

    def _await_tidy(self, job: Job) -> None:
        """Waits for the end of a job's actors and processes, then looks for what else it left."""
        deadline = time.monotonic() + GRACE_S
        while (left := self._cluster.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.2)
        left += [f"multipart upload {key}" for key in self._bucket.uploads()]
        left += [f"temporary file {path}" for path in self._folder.glob(f"{job.output}-*.tmp/*")]
        for each in left:
            self._violation(f"{job.output}: left behind: {each}")

    def _violation(self, text: str) -> None:
        self.violations.append(text)
        print(f"     VIOLATION {text}", flush=True)


def _ends(driver: subprocess.Popen[bytes], within_s: float) -> bool:
    try:
        driver.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def deck(num_kills: int, rng: random.Random) -> list[Victim]:
    """Victims in a random order, each as often as the others."""
    cards = list(VICTIMS) * (num_kills // len(VICTIMS)) + rng.sample(VICTIMS, num_kills % len(VICTIMS))
    rng.shuffle(cards)
    return cards


def configuration(server: radosgw.Server, address: str) -> dict[str, Any]:
    return {
        "inputs": [f"s3://{BUCKET}/in/*.tar"],
        "output": "given by --set",
        "units": {"target_s": 6},
        "segmentation": {"min_s": 3, "max_s": 8},
        "engine": {"name": "reference", "model": "embedded/student", "threads": 1, "batch_size": 2},
        "ray": {"address": address, "units_in_flight": UNITS_IN_FLIGHT, "read_tasks": 1},
        "storage": {"options": server.options},
    }


def run(folder: Path, out: Path, seed: int, num_kills: int, minutes: float, per_round: int) -> int:
    """The rounds, the table and the files; the exit code."""
    began = time.monotonic()
    with ExitStack() as stack:
        (folder / "radosgw").mkdir()
        server = stack.enter_context(radosgw.serve(folder / "radosgw"))
        cluster = stack.enter_context(ChaosCluster())
        chaos = Chaos(folder, out, seed, num_kills, server, cluster)
        chaos.undisturbed()
        number = 0
        while len(chaos.kills) < num_kills and time.monotonic() - began < 60 * minutes:
            number += 1
            chaos.round(number, per_round)
    minutes = (time.monotonic() - began) / 60
    text = (
        f"{table(chaos.kills)}\n{len(chaos.kills)} kills in {number} rounds, {chaos.decoded_s:.1f} s of audio decoded "
        f"in all, {len(chaos.violations)} violations, {minutes:.1f} min, seed {seed}\n"
    )
    print(text, *chaos.violations, sep="\n")
    (out / "table.txt").write_text(text)
    kills = [asdict(each) | {"redone_s": each.redone_s} for each in chaos.kills]
    figures = {"seed": seed, "minutes": minutes, "rounds": number, "decoded_s": chaos.decoded_s}
    (out / "kills.json").write_text(json.dumps(figures | {"violations": chaos.violations, "kills": kills}, indent=1))
    return int(bool(chaos.violations) or len(chaos.kills) < num_kills)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--out", type=Path, default=Path("build/chaos"))
    parser.add_argument("--minutes", type=float, default=75.0, help="begin no round after that")
    parser.add_argument("--per-round", type=int, default=12, help="kills of one job at most")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    # Ray's sockets and its note of the newest cluster go here: no other job on this machine joins this one
    os.environ |= {"RAY_TMPDIR": str(folder), counted.VARIABLE: str(folder), "PYTHONPATH": str(ROOT)}
    code = run(folder, options.out, options.seed, options.kills, options.minutes, options.per_round)
    if code:
        print(f"Ray's and the store's logs are in {folder}")
    else:
        shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())

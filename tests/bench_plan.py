"""How long a plan of a million audio files takes, and how much memory: `python -m tests.bench_plan FOLDER`.

Makes the files in FOLDER (sparse, about 10 s of wav each; a minute of work), plans them in a fresh process, prints one
line per shape of tree, and deletes them.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pipeline.config import InputConfig
from pipeline.sources.plan import plan


def make_files(folder: Path, num_files: int, files_a_folder: int) -> None:
    for start in range(0, num_files, files_a_folder):
        sub = folder / f"{start:08d}"
        sub.mkdir(parents=True)
        for i in range(start, min(start + files_a_folder, num_files)):
            with (sub / f"{i:08d}.wav").open("wb") as file:
                file.truncate(300_000 + i % 1_000)


def measure(folder: Path) -> None:
    start = time.perf_counter()
    num_splits = num_files = 0
    first_s = 0.0
    for split in plan([InputConfig(path=str(folder))], {}, 1800.0):
        first_s = first_s or time.perf_counter() - start
        num_splits += 1
        num_files += len(split.items)
        split.to_json()
    seconds = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{num_files} files, {num_splits} splits, {seconds:.1f} s ({first_s:.2f} s to the first), "
        f"peak RSS {peak_mb:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--measure", action="store_true", help="only plan what is in the folder")
    options = parser.parse_args()
    if options.measure:
        measure(options.folder)
        return
    for files_a_folder in (1_000, options.files):
        tree = options.folder / f"tree-{files_a_folder}"
        make_files(tree, options.files, files_a_folder)
        print(f"{files_a_folder} files a folder: ", end="", flush=True)
        subprocess.run([sys.executable, "-m", "tests.bench_plan", str(tree), "--measure"], check=True)
        shutil.rmtree(tree)


if __name__ == "__main__":
    main()

"""Speech without texts for the embedded student to learn from its teacher: what the recipe of the tables labels."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from pipeline.embedded.examples import Examples
from pipeline.embedded.grammar import LANGUAGES
from pipeline.embedded.recipe import SEED, digit_speakers
from pipeline.embedded.shards import Item, write_shard
from pipeline.embedded.speech import DIGITS_TEST_SPEAKER, Bank, speak_all, write_bank
from pipeline.schema import SAMPLE_RATE_HZ

_SEED = SEED + 1  # of other sentences than the checkpoints were trained on, but for those that are drawn twice
_SENTENCES = {"train": 1500, "dev": 150}  # a language
_HOURS = {"train": 4.0, "dev": 0.4}
_PER_SHARD = 250
_LONGEST_S = (0.0, 0.0, 12.0, 28.0)  # 0: a single sentence


def write_unlabeled(work: Path, fsdd: Path) -> dict[str, Path]:
    """Folders of shards by part: "train", and "dev", which holds other sentences in other voices. Folders that are
    there stay."""
    speakers = digit_speakers(fsdd)
    speakers.pop(DIGITS_TEST_SPEAKER)
    folders = {}
    for part, hours in _HOURS.items():
        folders[part] = work / "unlabeled" / part
        if folders[part].exists():
            continue
        banks = {}
        for language in LANGUAGES:
            bank = work / "banks" / part / language
            write_bank(bank, speak_all(language, part, _SENTENCES[part], _SEED))
            banks[language] = Bank(bank)
        draw, left = Examples(banks, speakers, _SEED), hours * 3600 * SAMPLE_RATE_HZ
        items: list[tuple[Item, str]] = []
        while left > 0:
            longest_s = draw.rng.choice(_LONGEST_S)
            example = draw.example(draw.rng.uniform(0.5, 1.0) * longest_s)
            items.append((Item(f"{part}-{len(items):05d}", example.audio, "", ""), "opus"))
            left -= len(example.audio)
        partial = folders[part].with_suffix(".part")
        rest = iter(items)
        for number in range(-(-len(items) // _PER_SHARD)):
            write_shard(partial / f"{part}-{number:03d}.tar", islice(rest, _PER_SHARD))
        partial.rename(folders[part])
    return folders

"""Which examples, in which order: drawn by a seed, balanced over languages, in batches of like length."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count

from pipeline.config import ConfigError
from pipeline.distill.examples import ExampleRef

_POOL_BATCHES = 64  # sorted by length together: more pads less, and mixes less


def draw(refs: Sequence[ExampleRef], per_language: int, seed: int) -> list[ExampleRef]:
    """So many examples of every language, in an order that mixes them. Raises ConfigError for one that has fewer."""
    drawn = []
    for language, its in _by_language(refs).items():
        if len(its) < per_language:
            raise ConfigError(f"{language} has {len(its)} examples; samples_per_language is {per_language}")
        drawn += random.Random(f"{seed} {language}").sample(its, per_language)
    random.Random(seed).shuffle(drawn)
    return drawn


def batches(
    refs: Sequence[ExampleRef],
    batch_audio_s: float,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    balance: float = 1.0,
) -> Iterator[list[ExampleRef]]:
    """The batches of an epoch that are for `rank`: the same for the same arguments, and equally many for every rank.

    A batch has up to `batch_audio_s` seconds, padded to its longest example. An epoch has about the seconds of `refs`,
    of which a language's share is proportional to its own to the power of `1 - balance`: with 1 all shares are equal (a
    small language comes several times, a large one in part), with 0 they are as in `refs`.
    """
    drawn = _epoch(refs, random.Random(f"{seed} {epoch}"), balance)
    rng = random.Random(f"{seed} {epoch} order")
    rng.shuffle(drawn)
    made: list[list[ExampleRef]] = []
    for pool in _pools(drawn, _POOL_BATCHES * batch_audio_s):
        pool.sort(key=lambda ref: ref.duration_s)
        filled = _filled(pool, batch_audio_s)
        rng.shuffle(filled)
        made += filled
    if len(made) < world:
        raise ConfigError(f"{len(made)} batches of {batch_audio_s:g} s for {world} processes: make batches smaller")
    yield from made[: len(made) // world * world][rank::world]


def _by_language(refs: Sequence[ExampleRef]) -> dict[str, list[ExampleRef]]:
    found: dict[str, list[ExampleRef]] = defaultdict(list)
    for ref in refs:
        found[ref.language].append(ref)
    return dict(sorted(found.items()))


def _epoch(refs: Sequence[ExampleRef], rng: random.Random, balance: float) -> list[ExampleRef]:
    languages = _by_language(refs)
    seconds = {language: sum(ref.duration_s for ref in its) for language, its in languages.items()}
    weights = {language: its ** (1.0 - balance) for language, its in seconds.items()}
    drawn = []
    for language, its in languages.items():
        left = sum(seconds.values()) * weights[language] / sum(weights.values())
        for place in count():
            if place % len(its) == 0:
                its = rng.sample(its, len(its))
            ref = its[place % len(its)]
            # to the nearest: with one language every example comes once
            if left < ref.duration_s / 2:
                break
            left -= ref.duration_s
            drawn.append(ref)
    return drawn


def _pools(refs: list[ExampleRef], pool_s: float) -> Iterator[list[ExampleRef]]:
    pool: list[ExampleRef] = []
    total_s = 0.0
    for ref in refs:
        pool.append(ref)
        total_s += ref.duration_s
        if total_s >= pool_s:
            yield pool
            pool, total_s = [], 0.0
    if pool:
        yield pool


def _filled(refs: list[ExampleRef], batch_audio_s: float) -> list[list[ExampleRef]]:
    """Runs of `refs`, which ascend in length; one that is longer than a batch is a batch of its own."""
    filled: list[list[ExampleRef]] = []
    for ref in refs:
        if not filled or (len(filled[-1]) + 1) * ref.duration_s > batch_audio_s:
            filled.append([])
        filled[-1].append(ref)
    return filled

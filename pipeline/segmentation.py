"""Where to cut a recording: pure functions on sample numbers. `speech` is always `[start, end)` spans of samples, in
order and without overlap; a pause is what lies between them."""

from __future__ import annotations

from bisect import bisect_right

from pipeline.schema import SAMPLE_RATE_HZ

Span = tuple[int, int]

_MIN_TAIL_S = 1.0  # shorter ends are too little for an engine to go by, and what it makes up counts as text


def longest_pause(speech: list[Span], lo: int, hi: int) -> Span | None:
    """The longest `[start, end)` without speech in `[lo, hi)`, the later one of equals; None when there is none.

    A pause that sticks out of the range counts with its part inside.
    """
    best: Span | None = None
    begin = lo
    for start, end in speech_in(speech, lo, hi) + [(hi, hi)]:
        if start > begin and (best is None or start - begin >= best[1] - best[0]):
            best = (begin, start)
        begin = end
    return best


def cut_at_pause(speech: list[Span], lo: int, hi: int) -> int:
    """The sample in `(lo, hi]` to cut before: the middle of the longest pause, or `hi` when all of it is speech.

    Raises ValueError unless `lo < hi`.
    """
    if lo >= hi:
        raise ValueError(f"no sample to cut at in ({lo}, {hi}]: lo must be below hi")
    pause = longest_pause(speech, lo, hi)
    return hi if pause is None else _middle(pause)


def segment_by_pause(num_samples: int, speech: list[Span], min_s: float, max_s: float) -> list[Span]:
    """Windows `[start, end)` of at most `max_s` seconds that tile `[0, num_samples)`: nothing dropped, nothing doubled.

    A recording up to `max_s` is one window, an empty one none. A longer one is cut from left to right at the longest
    pause between `min_s` and `max_s` after the window's start. The last window is at least a second long (half of
    `max_s` when that is less), unless only a shorter one spares a cut inside speech. Raises ValueError unless
    `0 < min_s < max_s`.
    """
    if not 0 < min_s < max_s:
        raise ValueError(f"windows need 0 < min_s < max_s, not min_s {min_s} and max_s {max_s}")
    min_samples = round(min_s * SAMPLE_RATE_HZ)
    max_samples = max(round(max_s * SAMPLE_RATE_HZ), 2)
    min_tail = min(round(_MIN_TAIL_S * SAMPLE_RATE_HZ), max_samples // 2)

    windows = []
    start = 0
    while num_samples - start > max_samples:
        lo, hi = start + min_samples, start + max_samples
        before_tail = min(hi, num_samples - min_tail)
        pause = longest_pause(speech, lo, before_tail) or longest_pause(speech, lo, hi)
        cut = before_tail if pause is None else _middle(pause)
        windows.append((start, cut))
        start = cut
    if start < num_samples:
        windows.append((start, num_samples))
    return windows


def segment_fixed(num_samples: int, window_s: float) -> list[Span]:
    """Windows `[start, end)` of `window_s` seconds that tile `[0, num_samples)` wherever they cut; the last one is at
    least a second long (half a window when that is less)."""
    window = max(round(window_s * SAMPLE_RATE_HZ), 2)
    min_tail = min(round(_MIN_TAIL_S * SAMPLE_RATE_HZ), window // 2)
    starts = list(range(0, num_samples, window))
    if len(starts) > 1 and num_samples - starts[-1] < min_tail:
        starts[-1] = num_samples - min_tail
    return list(zip(starts, [*starts[1:], num_samples], strict=True))


def speech_samples(speech: list[Span], lo: int, hi: int) -> int:
    """How many samples of `[lo, hi)` are speech."""
    return sum(end - start for start, end in speech_in(speech, lo, hi))


def speech_in(speech: list[Span], lo: int, hi: int) -> list[Span]:
    """The parts of `speech` inside `[lo, hi)`."""
    first = bisect_right(speech, lo, key=lambda span: span[1])
    inside = []
    for start, end in speech[first:]:
        if start >= hi:
            break
        inside.append((max(start, lo), min(end, hi)))
    return inside


def _middle(pause: Span) -> int:
    return (pause[0] + pause[1] + 1) // 2  # rounded up: a cut must lie past the range's start

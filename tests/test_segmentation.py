import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.segmentation import cut_at_pause, longest_pause, segment_by_pause, speech_samples

RATE = 16_000


@st.composite
def speech_and_length(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    """Up to four minutes of pauses and speech in turn, some of either length 1 sample."""
    lengths = draw(st.lists(st.integers(1, 400_000), max_size=40))
    spans, position = [], draw(st.integers(0, 200_000))
    for speech, pause in zip(lengths[::2], lengths[1::2], strict=False):
        spans.append((position, position + speech))
        position += speech + pause
    return spans, position + draw(st.integers(0, 1_000_000))


def inside_speech(speech: list[tuple[int, int]], cut: int) -> bool:
    return any(start < cut < end for start, end in speech)


def has_pause(speech: list[tuple[int, int]], lo: int, hi: int) -> bool:
    return speech_samples(speech, lo, hi) < hi - lo


@given(speech_and_length(), st.floats(0.1, 20), st.floats(0.01, 20))
def test_windows_tile_the_recording_within_the_limit(case, min_s, more_s):
    speech, num_samples = case
    windows = segment_by_pause(num_samples, speech, min_s, min_s + more_s)
    edges = [0] + [end for _, end in windows]
    assert [start for start, _ in windows] == edges[:-1]
    assert edges[-1] == num_samples
    assert all(0 < end - start <= round((min_s + more_s) * RATE) for start, end in windows)


@given(speech_and_length(), st.floats(0.1, 20), st.floats(0.01, 20))
def test_no_cut_in_speech_where_a_pause_is_in_range(case, min_s, more_s):
    speech, num_samples = case
    max_s = min_s + more_s
    for start, cut in segment_by_pause(num_samples, speech, min_s, max_s)[:-1]:
        if has_pause(speech, start + round(min_s * RATE), start + round(max_s * RATE)):
            assert not inside_speech(speech, cut)


@given(speech_and_length(), st.floats(0.1, 20), st.floats(1.1, 20))
def test_the_tail_is_a_sliver_only_to_spare_speech(case, min_s, more_s):
    speech, num_samples = case
    max_s = min_s + more_s
    windows = segment_by_pause(num_samples, speech, min_s, max_s)
    if len(windows) > 1 and windows[-1][1] - windows[-1][0] < min(RATE, max_s * RATE / 2 - 1):
        start = windows[-2][0]
        assert not has_pause(speech, start + round(min_s * RATE), num_samples - RATE)
        assert not inside_speech(speech, windows[-1][0])


@given(speech_and_length(), st.data())
def test_a_cut_lies_in_the_range_and_in_a_pause_when_there_is_one(case, data):
    speech, num_samples = case
    lo = data.draw(st.integers(0, num_samples))
    hi = data.draw(st.integers(lo + 1, num_samples + 1))
    cut = cut_at_pause(speech, lo, hi)
    assert lo < cut <= hi
    if has_pause(speech, lo, hi):
        assert not inside_speech(speech, cut)
    else:
        assert cut == hi


@given(speech_and_length(), st.data())
def test_no_pause_in_range_is_longer_than_the_longest(case, data):
    speech, num_samples = case
    lo = data.draw(st.integers(0, num_samples))
    hi = data.draw(st.integers(lo, num_samples))
    edges = [lo] + [min(max(edge, lo), hi) for span in speech for edge in span] + [hi]
    lengths = [end - start for start, end in zip(edges[::2], edges[1::2], strict=True)]
    pause = longest_pause(speech, lo, hi)
    assert max(lengths) == (0 if pause is None else pause[1] - pause[0])


@pytest.mark.parametrize(
    ("speech", "cut"),
    [
        ([(0, 20), (30, 100)], 25),
        ([(0, 20), (24, 50), (60, 100)], 55),
        ([(0, 20), (30, 50), (60, 100)], 55),  # of equals the later: longer windows
        ([(0, 100)], 80),  # all speech
        ([(0, 10), (20, 100)], 16),  # sticks out at the start: 12 to 20 counts
        ([(0, 70), (200, 300)], 75),  # sticks out at the end: 70 to 80 counts
        ([], 46),
    ],
)
def test_the_cut_is_the_middle_of_the_longest_pause_inside(speech, cut):
    assert cut_at_pause(speech, 12, 80) == cut


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 5\]"):
        cut_at_pause([], 5, 5)


def test_a_recording_up_to_the_limit_is_one_window():
    assert segment_by_pause(30 * RATE, [], 12, 30) == [(0, 30 * RATE)]
    assert segment_by_pause(1, [], 12, 30) == [(0, 1)]
    assert segment_by_pause(0, [], 12, 30) == []


def test_a_cut_falls_on_the_longest_pause_after_the_minimum():
    speech = [(0, 8 * RATE), (11 * RATE, 20 * RATE), (21 * RATE, 40 * RATE)]  # the 3 s pause comes before 12 s
    cut = 20 * RATE + RATE // 2
    assert segment_by_pause(40 * RATE, speech, 12, 30) == [(0, cut), (cut, 40 * RATE)]


def test_speech_without_pause_is_cut_at_the_limit_and_leaves_a_tail_of_a_second():
    num_samples = 30 * RATE + 100
    cut = 29 * RATE + 100
    assert segment_by_pause(num_samples, [(0, num_samples)], 12, 30) == [(0, cut), (cut, num_samples)]


def test_a_sliver_is_better_than_a_cut_word():
    num_samples = 30 * RATE + 8000
    speech = [(0, 30 * RATE - 4000), (30 * RATE, num_samples)]  # the only pause is in the last second
    cut = 30 * RATE - 2000
    assert segment_by_pause(num_samples, speech, 12, 30) == [(0, cut), (cut, num_samples)]


@pytest.mark.parametrize(("min_s", "max_s"), [(0, 30), (30, 30), (31, 30)])
def test_limits_out_of_order_are_refused(min_s, max_s):
    with pytest.raises(ValueError, match=f"min_s {min_s} and max_s {max_s}"):
        segment_by_pause(RATE, [], min_s, max_s)


def test_speech_samples_counts_only_what_is_inside():
    assert speech_samples([(0, 10), (20, 30), (40, 50)], 5, 45) == 5 + 10 + 5
    assert speech_samples([], 0, 10) == 0

"""The streaming contract: nothing is rewritten, the newest 250 ms stay hidden, the end flushes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluate.contract import Contract, Published, Update, latencies, spoken_words, without_tail


def test_it_publishes_what_goes_on_from_what_is_out_and_no_more() -> None:
    contract = Contract()
    texts = ["the quick", "the quick brown fox", "the quack brown fox", "the quick brown fox jumps over"]
    said = [contract.take(Update(at_s=i, heard_s=10.0, text=text, open_s=2.5)) for i, text in enumerate(texts)]
    assert said == ["the", " quick brown", "", " fox jumps"] and contract.num_refused == 1
    assert contract.take(Update(9.0, 10.0, "the quick brown fox jumps over it", is_final=True)) == " over it"
    assert contract.text == "the quick brown fox jumps over it"
    assert [part.at_s for part in contract.published] == [0, 1, 3, 9.0]


def test_a_final_text_that_changed_its_mind_adds_what_stands_behind_what_is_out() -> None:
    contract = Contract()
    contract.take(Update(1.0, 5.0, "we saw to cats sleeping", is_final=False, word_ends_s=[0.5, 1.0, 1.5, 2.0, 2.5]))
    assert contract.text == "we saw to cats sleeping"
    contract.take(Update(2.0, 6.0, "we saw two cats sleeping on the sofa", is_final=True))
    assert contract.text == "we saw to cats sleeping on the sofa"


def test_words_that_end_in_the_newest_250_ms_are_hidden() -> None:
    ends = [0.4, 1.1, 1.76, 1.9]
    assert without_tail(Update(2.0, 2.0, "one two three four", word_ends_s=ends)) == "one two"
    assert without_tail(Update(2.0, 2.02, "one two three four", word_ends_s=ends)) == "one two three"
    closed = Update(2.0, 12.0, "Done. one two three four", open_from=5, open_s=1.0)
    assert without_tail(closed) == "Done. one two three", "a quarter of the open text, up to a whole word"
    assert without_tail(Update(2.0, 1.0, "一二三四五六七八")) == "一二三四五六"
    assert without_tail(Update(0.2, 0.2, "one")) == ""


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999))
def test_what_is_out_is_never_taken_back(seed: int) -> None:
    rng = random.Random(seed)
    contract, before = Contract(), ""
    for step in range(12):
        text = " ".join(rng.choice(["a", "b", "cc"]) for _ in range(rng.randint(0, step + 1)))
        contract.take(Update(step, float(step + 1), text, is_final=step == 11))
        assert contract.text.startswith(before)
        before = contract.text
    assert "".join(part.text for part in contract.published) == contract.text


def test_latency_is_from_the_end_of_a_word_to_its_publication() -> None:
    spoken = spoken_words([
        {"text": "One two.", "offset": 1.0, "duration": 2.0},
        {"text": "你好。", "offset": 4.0, "duration": 1.0},
    ])  # fmt: skip
    assert [(word.word, word.end_s) for word in spoken] == [("one", 2.0), ("two", 3.0), ("你", 4.5), ("好", 5.0)]
    published = [Published("One", 2.5), Published(" tow", 4.0), Published(" 你好", 7.0)]
    assert latencies(published, spoken) == pytest.approx([0.5, 2.5, 2.0])


def test_a_word_in_two_parts_is_out_with_its_last_one() -> None:
    spoken = spoken_words([{"text": "wonderful day", "offset": 0.0, "duration": 2.0}])
    assert len(latencies([Published("wonder", 1.0), Published("ful day", 3.0)], spoken)) == 1

"""The commit policy against qwen3-asr-causal's, and what is its own: characters, and seams."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.causal.commit import CommitPolicy, Committer, between, num_matched
from pipeline.text import units
from tests.engine.causal.upstream import upstream

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d.", "e,"]), max_size=12).map(" ".join)


@given(
    hypotheses=st.lists(WORDS, min_size=1, max_size=12),
    hold_back=st.integers(1, 4),
    stable_iterations=st.integers(1, 3),
)
def test_it_publishes_what_upstream_commits(hypotheses: list[str], hold_back: int, stable_iterations: int) -> None:
    """But where nothing is held back: upstream takes a last word for another once a space follows it, for good."""
    theirs = upstream(".stable_commit")
    state, ours = theirs.StableTextCommitState(), Committer(CommitPolicy(hold_back, stable_iterations))
    for hypothesis in hypotheses:
        want = theirs.update_stable_text_commit(
            state, hypothesis, hold_back_units=hold_back, stable_iterations=stable_iterations
        )
        ours.take(hypothesis)
        assert "".join(ours.published).strip() == want.committed_text


@given(hypotheses=st.lists(WORDS, min_size=1, max_size=12), hold_back=st.integers(0, 3))
def test_what_is_published_stays_and_ends_with_the_last_hypothesis(hypotheses: list[str], hold_back: int) -> None:
    committer, out = Committer(CommitPolicy(hold_back)), ""
    for hypothesis in hypotheses:
        out += "".join(committer.take(hypothesis))
        assert "".join(committer.published) == out
    rest = committer.finish()
    assert "".join(committer.published) == out + "".join(rest)
    assert "".join(units(hypotheses[-1])).endswith("".join(rest))


def test_a_held_back_text_is_published_at_the_end() -> None:
    committer = Committer(CommitPolicy(2))
    assert committer.take("one two three four five") == []
    assert committer.take("one two three four five six") == ["one", " two"]
    assert committer.tail() == "three four five six"
    assert committer.finish() == [" three", " four", " five", " six"]


def test_published_text_stands_when_a_hypothesis_turns_against_it() -> None:
    committer = Committer(CommitPolicy(0))
    committer.take("one two three")
    assert committer.take("one two three four") == ["one", " two"]
    assert committer.take("won two three four five") == []
    assert committer.tail() == "three four five"
    assert committer.finish() == [" three", " four", " five"]


@pytest.mark.parametrize(
    ("published", "hypothesis", "rest"),
    [
        ("a b c", "a b c d", "d"),
        ("a b c", "a x c d", "d"),
        ("a b c", "a b d", ""),
        ("a b c", "a new b c d e", "d e"),  # upstream would publish "c d e"
        ("a b c d", "a c d e f", "e f"),  # upstream would publish "f"
        ("The man, he", "the man he went", "went"),
        ("a b c", "", ""),
        ("", "a b", "a b"),
        ("a b", "x y z", "z"),
    ],
)
def test_a_seam_neither_doubles_nor_drops(published: str, hypothesis: str, rest: str) -> None:
    found = units(hypothesis)
    assert "".join(found[num_matched(units(published), found) :]).strip() == rest


def test_scripts_without_spaces_go_by_characters() -> None:
    assert units("你好，世界。 The end") == ["你", "好，", "世", "界。", " The", " end"]
    assert units("“你好”他") == ["“", "你", "好”", "他"]
    committer = Committer(CommitPolicy(3))
    committer.take("今天天气很好")
    assert committer.take("今天天气很好，我们") == ["今", "天"]  # the mark makes another unit of the last
    assert units("  \n ") == [] and units("iPhone手机") == ["iPhone", "手", "机"]


@given(st.text(alphabet="ab .,你好。\nก", max_size=30))
def test_units_are_the_text(text: str) -> None:
    assert "".join(units(text)) == text.strip()


def test_texts_are_joined_as_their_script_wants() -> None:
    assert between("end.", "Next") == " "
    for before, after in (("好。", "我"), ("好", "OK"), ("", "a"), ("a", ""), ("a", " b"), ("a", "。")):
        assert between(before, after) == ""


def test_a_segment_that_goes_on_publishes_nothing_twice() -> None:
    committer = Committer(CommitPolicy(1), ["one", " two"])
    assert committer.take("one two three four five") == []
    assert committer.take("one two three four five six") == [" three"]


@pytest.mark.parametrize("policy", [(-1, 1), (0, 0)])
def test_a_policy_that_makes_no_sense_is_refused(policy: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="hold_back"):
        CommitPolicy(*policy)

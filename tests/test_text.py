"""Sentence ends: punctuation that ends a sentence, and punctuation that does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text import sentence_ends, split_sentences

CASES = [
    ("English", "She left. He stayed.", ["She left.", "He stayed."]),
    ("English", "Where is it? Here! Good.", ["Where is it?", "Here!", "Good."]),
    ("English", "It costs 3.50 dollars. Take 1,000.5 of them.", ["It costs 3.50 dollars.", "Take 1,000.5 of them."]),
    ("English", "Dr. Smith met Mrs. J. R. Jones. They talked.", ["Dr. Smith met Mrs. J. R. Jones.", "They talked."]),
    ("English", "See fig. 3, no. 12. He said no. Me too.", ["See fig. 3, no. 12.", "He said no.", "Me too."]),
    ("English", "Visit example.com. It is free.", ["Visit example.com.", "It is free."]),
    ("English", "He came at 5 p.m. and left.", ["He came at 5 p.m. and left."]),
    ("English", "Wait... what? Wait... No.", ["Wait... what?", "Wait...", "No."]),
    ("English", 'He said "Go." Then he went.', ['He said "Go."', "Then he went."]),
    ("English", "(It rained.) We stayed.", ["(It rained.)", "We stayed."]),
    ("English", "So am I. You too?", ["So am I.", "You too?"]),
    ("English", "Really?! Yes.", ["Really?!", "Yes."]),
    ("English", "and then he said", ["and then he said"]),
    ("English", "", []),
    ("German", "Am 3. Mai kam er. Dr. Meier, z.B., nicht.", ["Am 3. Mai kam er.", "Dr. Meier, z.B., nicht."]),
    ("English", "It was 1999. Everyone danced.", ["It was 1999.", "Everyone danced."]),
    ("Vietnamese", "TP. Hồ Chí Minh đông. Bạn khỏe không? Ừ.", ["TP. Hồ Chí Minh đông.", "Bạn khỏe không?", "Ừ."]),
    ("Vietnamese", "Anh ấy đến. Ông đi.", ["Anh ấy đến.", "Ông đi."]),
    ("Chinese", "你好。他来了吗？来了！好", ["你好。", "他来了吗？", "来了！", "好"]),
    ("Chinese", "价格是3.5元。", ["价格是3.5元。"]),
    ("Chinese", "他说：“走吧。”然后走了。", ["他说：“走吧。”", "然后走了。"]),
    ("Chinese", "好.他来了.", ["好.", "他来了."]),
    ("Japanese", "そうです。本当ですか？はい……そう。", ["そうです。", "本当ですか？", "はい……", "そう。"]),
    ("Spanish", "¿Qué? ¡Hola! Adiós.", ["¿Qué?", "¡Hola!", "Adiós."]),
    ("Hindi", "वह आया। वह गया।", ["वह आया।", "वह गया।"]),
    ("Arabic", "هل جاء؟ نعم.", ["هل جاء؟", "نعم."]),
]  # fmt: skip


@pytest.mark.parametrize(("language", "text", "sentences"), CASES, ids=[case[1] for case in CASES])
def test_sentences(language: str, text: str, sentences: list[str]) -> None:
    assert split_sentences(text, language) == sentences


@given(st.text(alphabet="aAbB 12.?!…。，,\"'”)中", max_size=60))
def test_nothing_is_lost_and_ends_are_in_order(text: str) -> None:
    ends = sentence_ends(text)
    assert ends == sorted(set(ends)) and all(0 < end <= len(text) for end in ends)
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())

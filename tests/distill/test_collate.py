"""Batches of teacher-forced examples: the prompt that qwen-asr makes, and the answer that its model would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen_asr import Qwen3ASRModel
from torch.nn.functional import cross_entropy

from pipeline.distill.audio import Example, Loader
from pipeline.distill.collate import NO_LOSS, collate
from pipeline.distill.examples import ExampleRef, read_examples
from pipeline.engine.checkpoint import EMBEDDED_FOLDER
from tests.distill.sources import write_manifest
from tests.engine.tiny import noise


@pytest.fixture(scope="module")
def student() -> Any:
    return Qwen3ASRModel.from_pretrained(str(EMBEDDED_FOLDER / "student"), dtype=torch.float32)


def example(seconds: float, text: str, language: str = "English") -> Example:
    return Example(ExampleRef("id", "a.wav", 0.0, seconds, text, language, "a.wav"), noise(seconds))


def test_prompt_and_features_are_qwen_asrs_and_the_answer_follows(student: Any) -> None:
    batch = collate(
        [example(2.0, "hello there"), example(0.2, "no"), example(9.0, "你好", "Chinese")], student.processor
    )
    tokenizer = student.processor.tokenizer
    for row, (seconds, answer) in enumerate(
        [
            (2.0, "language English<asr_text>hello there<|im_end|>"),
            (0.2, "language English<asr_text>no<|im_end|>"),
            (9.0, "language Chinese<asr_text>你好<|im_end|>"),
        ]
    ):
        audio = noise(seconds).astype(np.float32) / 32768
        audio = np.pad(audio, (0, max(0, 8000 - len(audio))))
        prompt = student._build_text_prompt("", None)
        expected = student.processor(text=[prompt], audio=[audio], return_tensors="pt", padding=True)
        length = int(batch["attention_mask"][row].sum())
        num_prompt = expected["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, :num_prompt], expected["input_ids"][0])
        assert tokenizer.decode(batch["input_ids"][row, num_prompt:length]) == answer
        labels = batch["labels"][row]
        assert torch.equal(labels[num_prompt:length], batch["input_ids"][row, num_prompt:length])
        assert (labels[:num_prompt] == NO_LOSS).all() and (labels[length:] == NO_LOSS).all()
        frames = int(batch["feature_attention_mask"][row].sum())
        assert frames == int(expected["feature_attention_mask"].sum())
        found = batch["input_features"][row, :, :frames]
        assert torch.allclose(found, expected["input_features"][0, :, :frames], atol=2e-3)
    assert collate([example(1.0, "a")], student.processor, torch.bfloat16)["input_features"].dtype == torch.bfloat16


@torch.no_grad()
def test_the_student_knows_the_answers_to_heldout_speech(student: Any, tmp_path: Path) -> None:
    """A batch that is shifted, masked or padded wrongly costs nats; the true answers cost 0.1 a token."""
    refs = read_examples([str(write_manifest(tmp_path / "m.jsonl", 4))], {})
    loader = Loader({})
    batch = collate([loader.load(ref) for ref in refs], student.processor)
    labels = batch.pop("labels")
    logits = student.model.thinker(**batch).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_LOSS)
    assert loss < 0.25

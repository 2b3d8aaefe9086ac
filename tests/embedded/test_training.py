"""Training a tiny checkpoint for a few steps: stages, learning rate, resume, and the mean of the minima."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from qwen_asr.core.transformers_backend import Qwen3ASRForConditionalGeneration
from torch import Tensor
from transformers import Qwen2TokenizerFast

from pipeline.embedded import training
from pipeline.embedded.examples import Example, Examples
from pipeline.embedded.speech import Bank, write_bank
from pipeline.embedded.training import Collator, Plan, Trainer, train
from tests.engine.tiny import TEXTS, noise

PLAN = Plan(
    ctc_steps=1, single_steps=1, mixed_steps=(2, 4), batch_audio_s=4, single_batch_audio_s=2, warmup_steps=1,
    save_every=1,
)  # fmt: skip
TEXT = TEXTS[0]


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    write_bank(tmp_path / "bank", (("English", TEXT, "v", noise(1.0 + i / 4, i)) for i in range(4)))
    bank = Bank(tmp_path / "bank")
    draw = Examples({"English": bank}, {}, 1)
    draw.example = lambda _: Example(bank.pcm(draw.rng.randrange(4)) / 32768.0, TEXT, "English")  # type: ignore[method-assign]
    return draw


@pytest.fixture
def trainer(tiny_checkpoint: Path) -> Trainer:
    torch.manual_seed(1)
    model = Qwen3ASRForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    collate = Collator(Qwen2TokenizerFast.from_pretrained(tiny_checkpoint), "".join(sorted(set(TEXT))))
    return Trainer(model, collate, PLAN)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


def test_the_learning_rate_is_lowest_where_the_weights_are_averaged(trainer: Trainer) -> None:
    trainer.plan = plan = Plan(ctc_steps=100, single_steps=100, mixed_steps=(300, 600), warmup_steps=10)
    assert plan.minima == [500, 800] and plan.steps == 800
    rate = [trainer.schedule(step) for step in range(plan.steps)]
    assert max(rate) <= 1.0
    assert rate[0] == rate[100] == pytest.approx(0.1), "warm-up at the start of either"
    assert rate[50] == rate[199] == 1.0
    for minimum in plan.minima:
        assert rate[minimum - 1] == pytest.approx(0.02, abs=1e-3) == min(rate[200:minimum])
    assert rate[500] == pytest.approx(0.51, abs=1e-2), "it rises to where a fall to the next minimum would be"


def test_a_run_ends_with_the_mean_of_the_minima(
    trainer: Trainer, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 2)
    at: dict[int, dict[str, Tensor]] = {0: weights(trainer)}
    step = trainer.step

    def remembered(batch: training.Batch) -> tuple[float, float, float]:
        losses = step(batch)
        at[trainer.step_number] = weights(trainer)
        return losses

    monkeypatch.setattr(trainer, "step", remembered)
    train(trainer, examples, {}, tmp_path / "state.pt", tmp_path / "log.jsonl")
    assert sorted(at) == list(range(7)) and trainer.num_minima == 2
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, (at[4][name] + at[6][name]) / 2, rtol=1e-5, atol=1e-6)
    name = "thinker.audio_tower.conv2d1.weight"
    assert not torch.equal(at[0][name], at[1][name]), "the tower learns with CTC alone"
    assert torch.equal(at[0]["thinker.model.norm.weight"], at[1]["thinker.model.norm.weight"]), "the decoder's end not"
    assert not torch.equal(at[1]["thinker.model.norm.weight"], at[2]["thinker.model.norm.weight"])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6] and all(line["ce"] > 0 for line in lines)


def test_an_interrupted_run_goes_on(
    trainer: Trainer, tiny_checkpoint: Path, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.step

    def interrupted(batch: training.Batch) -> tuple[float, float, float]:
        if trainer.step_number == 5:
            raise KeyboardInterrupt
        return step(batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "step", interrupted)
        train(trainer, examples, {}, tmp_path / "state.pt", tmp_path / "log.jsonl")
    first_minimum = trainer.mean
    fresh = Qwen3ASRForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    again = Trainer(fresh, trainer.collate, PLAN)
    train(again, examples, {}, tmp_path / "state.pt", tmp_path / "log.jsonl")
    assert again.step_number == 6 and again.num_minima == 2
    name = "thinker.model.norm.weight"
    assert not torch.equal(again.mean[name], first_minimum[name])
    assert torch.equal(fresh.state_dict()[name], again.mean[name])

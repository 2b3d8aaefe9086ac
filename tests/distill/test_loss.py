"""The loss of distillation against its definition, and stored likeliest tokens against the whole distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.distill.loss import Likeliest, distillation_loss

VOCABULARY = 50


def drawn(seed: int, num: int = 7, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(num, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def likeliest(logits: Tensor, num_top: int, dtype: torch.dtype = torch.float64) -> Likeliest:
    logprobs, ids = logits.log_softmax(-1).topk(num_top, dim=-1)
    return Likeliest(ids, logprobs.to(dtype))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999), alpha=st.floats(0, 1, allow_subnormal=False), temperature=st.sampled_from([1.0, 2.0, 4.0])
)
def test_it_is_kl_and_cross_entropy_by_definition(seed: int, alpha: float, temperature: float) -> None:
    student, teacher, targets = drawn(seed), drawn(seed + 1), torch.arange(7)
    loss = distillation_loss(student, targets, teacher, alpha, temperature)
    p, q = ((each / temperature).softmax(-1) for each in (teacher, student))
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    ce = -student.log_softmax(-1)[torch.arange(7), targets].mean()
    assert float(loss.kl) == pytest.approx(float(kl), rel=1e-4) and float(loss.ce) == pytest.approx(float(ce), rel=1e-5)
    assert float(loss.total) == pytest.approx(float(alpha * temperature**2 * kl + (1 - alpha) * ce), rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    logits, targets = drawn(3), torch.arange(7)
    assert float(distillation_loss(logits, targets, logits).kl) == pytest.approx(0, abs=1e-6)
    assert float(distillation_loss(logits, targets, likeliest(logits, 8)).kl) == pytest.approx(0, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999))
def test_more_stored_tokens_come_closer_to_the_whole_from_below(seed: int) -> None:
    student, teacher, targets = drawn(seed), drawn(seed + 1), torch.arange(7)
    whole = float(distillation_loss(student, targets, teacher).kl)
    found = [
        float(distillation_loss(student, targets, likeliest(teacher, num_top)).kl)
        for num_top in (1, 8, 32, VOCABULARY - 1, VOCABULARY)
    ]
    assert all(one <= other + 1e-5 for one, other in zip(found, [*found[1:], whole], strict=True))
    assert found[-2:] == pytest.approx([whole] * 2, rel=1e-4, abs=1e-6), "a tail of one token, and of none"


def test_as_stored_in_16_bits_it_is_the_same_loss_with_the_same_gradient() -> None:
    teacher, targets = drawn(1), torch.arange(7)
    gradients = []
    for stored in (likeliest(teacher, 16), likeliest(teacher, 16, torch.float16)):
        student = drawn(2).requires_grad_()
        distillation_loss(student, targets, stored).total.backward()
        assert student.grad is not None and student.grad.isfinite().all()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients, atol=2e-4, rtol=2e-2)


@pytest.mark.parametrize("mass", [1.0, 1.0005], ids=["all of it", "more by rounding"])
def test_no_tail_is_no_nan(mass: float) -> None:
    student = drawn(2, num=1).requires_grad_()
    stored = Likeliest(torch.tensor([[4, 5]]), torch.tensor([[0.75 * mass, 0.25 * mass]]).log())
    loss = distillation_loss(student, torch.tensor([4]), stored)
    loss.total.backward()
    assert loss.total.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_the_gradient_goes_the_way_of_the_teacher() -> None:
    """Descent on KL alone brings the student's distribution to the teacher's, whole or stored."""
    teacher = drawn(5, num=3)
    for of in (teacher, likeliest(teacher, 12)):
        student = drawn(6, num=3).requires_grad_()
        optimizer = torch.optim.Adam([student], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            distillation_loss(student, torch.zeros(3, dtype=torch.int64), of, alpha_kd=1.0).total.backward()
            optimizer.step()
        ids = likeliest(teacher, 5).ids
        p, q = (each.softmax(-1).gather(-1, ids) for each in (teacher, student))
        torch.testing.assert_close(p, q, atol=5e-3, rtol=0)


def test_another_temperature_is_refused_for_what_was_stored() -> None:
    with pytest.raises(ValueError, match="temperature 2: stored log-probabilities are those at 1"):
        distillation_loss(drawn(1), torch.arange(7), likeliest(drawn(2), 8), temperature=2.0)

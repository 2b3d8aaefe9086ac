"""What a student is trained on: KL divergence from its teacher, and cross-entropy with the teacher's text (Hinton et
al., 2015). The teacher is there live, with all its logits, or as the likeliest tokens that it stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Likeliest:
    """A teacher's distribution at N places: ids int64 [N, k] of its likeliest tokens, and their log-probabilities
    float [N, k]. What is left of the mass is one class more, the tail."""

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """Means over tokens, in nats; `total` is what to go down on."""

    total: Tensor
    kl: Tensor
    ce: Tensor


def distillation_loss(
    logits: Tensor, targets: Tensor, teacher: Tensor | Likeliest, alpha_kd: float = 0.5, temperature: float = 1.0
) -> Loss:
    """`alpha_kd * temperature**2 * KL(teacher || student) + (1 - alpha_kd) * CE`.

    logits float [N, vocabulary] of the student, targets int64 [N], `teacher` float logits [N, vocabulary] or what it
    stored. The temperature divides both sides' logits; stored tokens know the teacher at temperature 1 alone, so that
    another raises ValueError.
    """
    logits = logits.float()
    ce = F.cross_entropy(logits, targets)
    if isinstance(teacher, Likeliest):
        if temperature != 1:
            raise ValueError(f"temperature {temperature:g}: stored log-probabilities are those at 1")
        kl = _kl_of_likeliest(logits, teacher)
    else:
        # both sides are logs: where the teacher's probability is 0 nothing is added
        student, other = ((each.float() / temperature).log_softmax(-1) for each in (logits, teacher))
        kl = F.kl_div(student, other, log_target=True, reduction="none").sum(-1)
    kl_mean = kl.mean()
    return Loss(alpha_kd * temperature**2 * kl_mean + (1 - alpha_kd) * ce, kl_mean, ce)


def _kl_of_likeliest(logits: Tensor, teacher: Likeliest) -> Tensor:
    """[N]: a lower bound of the whole divergence, which it meets where the tails are alike in shape."""
    logprobs = teacher.logprobs.float()
    total = logits.logsumexp(-1, keepdim=True)
    student = logits.gather(-1, teacher.ids) - total
    rest = logits.scatter(-1, teacher.ids, -torch.inf)
    student_tail = rest.logsumexp(-1) - total[:, 0]
    tail = (1 - logprobs.exp().sum(-1)).clamp(min=0)  # float16 rounds to either side of it
    top = (logprobs.exp() * (logprobs - student)).sum(-1)
    # x log x goes to 0 with x; a student without a tail (k is the vocabulary) has nothing to compare
    has_tail = (tail > 0) & student_tail.isfinite()
    log_tail = torch.where(has_tail, tail, 1.0).log()
    return top + torch.where(has_tail, tail * (log_tail - torch.where(has_tail, student_tail, 0.0)), 0.0)

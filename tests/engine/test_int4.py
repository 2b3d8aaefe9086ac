"""Four-bit linear layers against the weights that they stand for."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import int4
from pipeline.engine.int4 import Int4Linear, Int4Weight, check, find_switch, joined

CPU = torch.device("cpu")


def random_weight(num_out: int, num_in: int, group: int, seed: int = 0, pre_scale: bool = False) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-8, 8, (num_out, num_in), generator=generator, dtype=torch.int8)
    scales = (torch.rand(num_out, num_in // group, generator=generator) * 0.1).bfloat16().float()
    scale = torch.rand(num_in, generator=generator) + 0.5 if pre_scale else None
    return Int4Weight.of(integers, scales, scale)


@given(
    num_out=st.integers(1, 9), num_groups=st.integers(1, 3), group=st.sampled_from([2, 32, 128]), seed=st.integers(0)
)
def test_a_weight_is_the_integers_that_it_was_made_of(num_out: int, num_groups: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**62)
    integers = torch.randint(-8, 8, (num_out, num_groups * group), generator=generator, dtype=torch.int8)
    weight = Int4Weight.of(integers, torch.ones(num_out, num_groups))
    assert weight.quants.shape == (num_out, num_groups * group // 2) and weight.quants.dtype == torch.uint8
    assert (weight.shape, weight.group_size) == (tuple(integers.shape), group)
    assert torch.equal(weight.integers(), integers)
    assert torch.equal(weight.dequantized(torch.float32), integers.float())


def test_more_than_four_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="from -3 to 8 are no 4-bit integers"):
        Int4Weight.of(torch.tensor([[8, -3]]), torch.ones(1, 1))


@settings(max_examples=30, deadline=None)
@given(
    num_out=st.sampled_from([16, 48, 64, 80, 128, 256, 320]),
    num_groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 128, 256]),
    rows=st.integers(1, 40),
    pre_scale=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_products_are_those_of_the_dequantized_weight(
    num_out: int, num_groups: int, group: int, rows: int, pre_scale: bool, seed: int
) -> None:
    weight = random_weight(num_out, num_groups * group, group, seed, pre_scale)
    x = torch.randn(2, rows, num_groups * group, generator=torch.Generator().manual_seed(seed)).bfloat16()
    scaled = x.float() if weight.pre_scale is None else (x * weight.pre_scale.bfloat16()).float()
    expected = scaled @ weight.dequantized(torch.float32).T
    for switch in (10**6, 1):
        linear = Int4Linear(weight, torch.bfloat16, CPU, switch)
        assert linear.kernel == "int4pack_cpu"
        found = linear(x)
        assert found.shape == expected.shape and found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(("num_out", "num_in", "group"), [(64, 128, 128), (192, 512, 128), (640, 256, 32)])
def test_packed_weights_are_unpacked_bit_by_bit(num_out: int, num_in: int, group: int) -> None:
    weight = random_weight(num_out, num_in, group)
    linear = Int4Linear(weight, torch.bfloat16, CPU)
    assert linear._order is not None, "this CPU packs otherwise"
    assert torch.equal(linear.weight(), weight.dequantized(torch.bfloat16))
    linear._order = None
    assert torch.equal(linear.weight(), weight.dequantized(torch.bfloat16)), "the kernel itself can unpack"


@pytest.mark.parametrize(
    ("num_out", "group", "dtype", "reason"),
    [
        (24, 128, torch.bfloat16, "24 outputs, no multiple of 16"),
        (64, 16, torch.bfloat16, "groups of 16"),
        (64, 128, torch.float32, "torch.float32"),
    ],
)
def test_without_a_kernel_it_dequantizes_and_says_so(num_out: int, group: int, dtype: torch.dtype, reason: str) -> None:
    weight = random_weight(num_out, 256, group, pre_scale=True)
    with pytest.warns(RuntimeWarning, match=f"dequantized at every use: {reason}"):
        linear = Int4Linear(weight, dtype, CPU)
    assert linear.kernel == "dequantize" and find_switch(linear) == 0
    x = torch.randn(3, 256, dtype=dtype)
    assert weight.pre_scale is not None
    expected = (x.float() * weight.pre_scale) @ weight.dequantized(torch.float32).T
    assert (linear(x).float() - expected).norm() < 0.02 * expected.norm()
    check(linear, weight)


def test_memory_is_a_quarter_of_bfloat16() -> None:
    weight = random_weight(1024, 1024, 128)
    linear = Int4Linear(weight, torch.bfloat16, CPU)
    held = sum(buffer.numel() * buffer.element_size() for buffer in linear.buffers())
    assert held <= 0.30 * 2 * 1024 * 1024


def test_layers_join_when_their_inputs_are_scaled_alike() -> None:
    one, two, other = (random_weight(32, 256, 128, seed, pre_scale=True) for seed in (1, 1, 2))
    both = joined([one, two])
    assert both is not None and both.shape == (64, 256)
    assert torch.equal(both.integers(), torch.cat([one.integers(), two.integers()]))
    assert joined([one, other]) is None, "another scale"
    assert joined([one, random_weight(32, 256, 128)]) is None, "no scale"
    assert joined([random_weight(32, 256, 64), random_weight(32, 256, 128)]) is None, "other groups"


def test_a_kernel_that_computes_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(64, 256, 128)
    linear = Int4Linear(weight, torch.bfloat16, CPU)
    check(linear, weight)
    multiply = linear._multiply
    monkeypatch.setattr(linear, "_multiply", lambda rows: multiply(rows) * 1.1)
    with pytest.raises(RuntimeError, match=r"int4 products are 1[01]\.\d % off \(multiply\)"):
        check(linear, weight)


def test_the_switch_is_where_dequantizing_becomes_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Int4Linear(random_weight(64, 256, 128), torch.bfloat16, CPU)
    seconds = {linear._multiply: lambda rows: rows, linear._multiply_dequantized: lambda rows: 30}
    monkeypatch.setattr(int4, "_seconds", lambda work: seconds[work.func](len(work.args[0])))
    assert find_switch(linear) == 32
    seconds[linear._multiply_dequantized] = lambda rows: 10**6
    with warnings.catch_warnings():
        assert find_switch(linear) > 256, "never, as far as was tried"

"""Stochastic rounding against exact fractions, its expectation, and what it leaves as it is."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mergekit_dare.kernel import merging
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.rounding import NARROW, Rounding, round_stochastically
from mergekit_dare.kernel.sampling import Sampling
from tests import reference
from tests.kernel.test_merging import (
    BOTH,
    assert_same_bits,
    family,
    models,
    randn,
    recipe,
    scales_of,
)

EACH_NARROW = pytest.mark.parametrize("dtype", NARROW, ids=str)


def values_for(dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """Numbers of every size: normal, subnormal, at the limits, and exact ones."""
    info = torch.finfo(dtype)
    some = randn(0, 400, dtype=torch.float64)
    sizes = torch.exp2(torch.linspace(math.log2(info.smallest_normal) - 12, 3, 400).double())
    exact = some.to(dtype).double()
    limits = [info.max, info.max * (1 + info.eps / 8), info.smallest_normal, -info.max * 1.0001]
    limits += [info.smallest_normal * info.eps, info.smallest_normal * info.eps / 3, 0.0]
    return torch.cat([some * sizes, exact, torch.tensor(limits).double()]).to(wide)


@EACH_NARROW
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_equals_exact_arithmetic(dtype: torch.dtype, wide: torch.dtype) -> None:
    values = values_for(dtype, wide)
    generator = torch.Generator().manual_seed(1)
    for lanes in (
        torch.randint(0, 65536, values.shape, generator=generator),
        torch.zeros(values.shape, dtype=torch.int64),
        torch.full(values.shape, 65535),
    ):
        out = round_stochastically(values, lanes, dtype)
        assert bool(torch.isfinite(out).all())
        as_carry = dtype == torch.bfloat16 and wide == torch.float32
        for value, lane, rounded in zip(values, lanes, out, strict=True):
            expected = reference.round_stochastically(
                Fraction(float(value)), int(lane), dtype, as_carry=as_carry
            )
            assert Fraction(float(rounded)) == expected, (value, lane)


@EACH_NARROW
def test_what_the_dtype_holds_stays(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    every = every[~torch.isnan(every)]
    for wide in (torch.float32, torch.float64):
        lanes = torch.full(every.shape, 65535)
        assert_same_bits(round_stochastically(every.to(wide), lanes, dtype), every)


@EACH_NARROW
@BOTH
def test_density_0_and_1(combine: Combine, dtype: torch.dtype) -> None:
    base, (tuned,) = family(1, 5000, dtype=dtype, scale=0.001)
    base[:3] = -0.0
    settings = recipe(combine, rounding=Rounding.STOCHASTIC)
    assert_same_bits(merging.merge(base, models([tuned], 1.0, 0.0), settings), base)
    merged = merging.merge(base, models([tuned], 1.0, 1.0), settings)
    exact = (tuned.float() - base.float()).double() == tuned.double() - base.double()
    assert float(exact.double().mean()) > 0.9
    assert_same_bits((merged + 0.0)[exact], (tuned + 0.0)[exact])


@EACH_NARROW
@BOTH
@pytest.mark.parametrize("sampling", list(Sampling), ids=lambda s: s.value)
def test_a_neighbor_and_unbiased(combine: Combine, dtype: torch.dtype, sampling: Sampling) -> None:
    """Over 300 seeds, the mean error is within 6 standard errors (1e-6 at 2,000 elements)."""
    base, tuned = family(2, 2000, dtype=dtype, scale=0.0001)
    weights, densities = [0.4, 0.3], [1.0, 1.0]
    settings = recipe(combine, sampling=sampling)
    expected = reference.merge(
        base,
        tuned,
        weights,
        densities,
        combine=combine.value,
        normalize=False,
        rescale=True,
        lambda_=1.0,
        seed=0,
        scales=scales_of(base, tuned, densities, settings),
    )
    info = torch.finfo(dtype)
    unit = torch.exp2(torch.floor(torch.log2(expected.values.abs()))) * info.eps
    unit = unit.clamp(min=info.smallest_normal * info.eps)
    mean = torch.zeros_like(expected.values)
    seeds = 300
    for seed in range(seeds):
        settings = recipe(combine, sampling=sampling, seed=seed, rounding=Rounding.STOCHASTIC)
        merged = merging.merge(base, models(tuned, weights, densities), settings).double()
        assert bool(((merged - expected.values).abs() < unit * 1.001)[~expected.doubtful].all())
        mean += merged / seeds
    rest = (expected.values / unit) - torch.floor(expected.values / unit)
    deviation = unit * (rest * (1 - rest) / seeds).sqrt() + unit / seeds + 1e-9
    z = ((mean - expected.values) / deviation)[~expected.doubtful]
    assert float(z.abs().max()) < 6


def test_small_changes_survive_in_the_mean() -> None:
    """A fifth of the elements changed by one unit, merged at weight 0.3: projection of the change.

    Rounded to nearest, 0.3 units are lost; stochastically, their expectation stays (noise of a
    unit at 200,000 elements: standard error 0.5 %).
    """
    base = randn(0, 200_000, dtype=torch.bfloat16)
    bits = base.view(torch.int16).clone()
    bits[torch.rand(bits.shape, generator=torch.Generator().manual_seed(1)) < 0.2] += 1
    tuned = bits.view(torch.bfloat16)
    wanted = 0.3 * (tuned.double() - base.double())
    shares = {}
    for rounding in Rounding:
        settings = recipe(Combine.LINEAR, rounding=rounding)
        merged = merging.merge(base, models([tuned], 0.3, 1.0), settings)
        change = merged.double() - base.double()
        shares[rounding] = float(change @ wanted / (wanted @ wanted))
    assert shares[Rounding.NEAREST] < 0.1
    assert shares[Rounding.STOCHASTIC] == pytest.approx(1, abs=0.03)


def test_no_effect_on_wider_dtypes() -> None:
    for dtype in (torch.float32, torch.float64):
        base, tuned = family(2, 500, dtype=dtype)
        nearest, stochastic = (
            merging.merge(base, models(tuned, 0.3, 0.5), recipe(Combine.TIES, rounding=rounding))
            for rounding in Rounding
        )
        assert_same_bits(nearest, stochastic)


def test_independent_of_the_masks() -> None:
    """The rounding's stream is not that of a mask: no correlation at z of 6 (200,000 elements)."""
    base, (tuned,) = family(1, 200_000, dtype=torch.bfloat16, scale=0.0001)
    exact = recipe(Combine.LINEAR)
    wide = merging.merge(base.float(), models([tuned], 0.3, 0.5), exact)
    kept = wide != base.float()
    rounded = merging.merge(
        base, models([tuned], 0.3, 0.5), recipe(Combine.LINEAR, rounding=Rounding.STOCHASTIC)
    )
    up = ((rounded.float() - wide).abs() > 0) & (rounded.float() > wide) & kept
    down = (rounded.float() < wide) & kept
    assert int((up | down).sum()) > 10_000
    assert_same_bits(rounded[~kept], base[~kept])


def test_overflow_is_an_error_and_nothing_else_is_infinite() -> None:
    largest = torch.finfo(torch.bfloat16).max
    base = torch.full((64,), largest, dtype=torch.bfloat16)
    tuned = base.clone()
    tuned[1] = tuned[1] * 0.5
    settings = recipe(Combine.LINEAR, rounding=Rounding.STOCHASTIC)
    merged = merging.merge(base, models([tuned], 0.3, 1.0), settings)
    assert bool(torch.isfinite(merged).all())
    with pytest.raises(ValueError, match="overflows bfloat16"):
        merging.merge(base, models([tuned], -1.0, 1.0), settings)
    infinite = torch.full((64,), -math.inf, dtype=torch.bfloat16)
    infinite[5] = 1
    assert_same_bits(merging.merge(infinite, models([infinite], 1.0, 0.5), settings), infinite)


def test_equal_tensors_round_alike() -> None:
    base, (tuned,) = family(1, 3000, dtype=torch.bfloat16)
    first, second = (
        merging.merge(
            base,
            models([tuned], 0.3, 0.5),
            recipe(Combine.TIES, tensor_name=name, rounding=Rounding.STOCHASTIC),
        )
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert_same_bits(first, second)

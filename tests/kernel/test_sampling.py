"""Sampling by magnitude: the density that is met, unbiasedness, the variance, exact properties."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergekit_dare.kernel import merging, sampling
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.sampling import Sampling, magnitude_scale
from tests import reference
from tests.kernel.test_merging import BOTH, assert_same_bits, models, randn, recipe

DENSITIES = [0.5, 0.1, 0.01, 0.003]


def exponential(seed: int, count: int) -> Tensor:
    return -torch.log(torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 1e-12)


def sign_of(seed: int, count: int) -> Tensor:
    return torch.sign(randn(seed + 1000, count))


def sparse(count: int, one_in: int) -> Tensor:
    chosen = torch.rand(count, generator=torch.Generator().manual_seed(3)) * one_in < 1
    return randn(4, count) * chosen


def rows(count: int) -> Tensor:
    """A matrix whose rows differ in size, a few by much, with 1024 columns."""
    matrix = randn(5, count // 1024, 1024)
    return (matrix * torch.exp(2 * randn(6, count // 1024, 1))).view(-1)


SHAPES: dict[str, Callable[[int], Tensor]] = {
    "gaussian": lambda n: randn(0, n),
    "laplace": lambda n: exponential(1, n) * sign_of(1, n),
    "student-3": lambda n: randn(0, n) / randn(1, 3, n).square().mean(0).sqrt(),
    "cauchy": lambda n: randn(0, n) / randn(1, n),
    "log-normal": lambda n: torch.exp(2 * randn(0, n)),
    "equal": lambda n: torch.ones(n),
    "two values": lambda n: 1 + 9 * (randn(0, n) > 2),
    "half zero": lambda n: randn(0, n) * (randn(1, n) > 0),
    "rows": rows,
}


def scale_of(deltas: Tensor, density: float) -> float | None:
    return magnitude_scale(deltas, torch.zeros_like(deltas), density, torch.float32)


def met(deltas: Tensor, scale: float | None) -> float:
    if scale is None:
        return float(torch.count_nonzero(deltas)) / deltas.numel()
    t = reference.thresholds_by_magnitude(deltas.double(), torch.float32, scale)
    return float((t * (deltas != 0)).sum()) / 65536 / deltas.numel()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1 << 16, 1 << 18, 3_000_000], ids=str)
def test_met_density(shape: str, count: int) -> None:
    deltas = SHAPES[shape](count // 1024 * 1024) * 0.003
    for density in DENSITIES:
        scale = scale_of(deltas, density)
        assert scale is not None
        assert met(deltas, scale) == pytest.approx(density, rel=0.01), density


@pytest.mark.parametrize("count", [1 << 16, 1 << 18, 3_000_000], ids=str)
def test_met_density_where_one_in_a_thousand_differs(count: int) -> None:
    deltas = sparse(count, 1000)
    for density in (0.0008, 0.0005, 0.0002, 0.0001):
        assert met(deltas, scale_of(deltas, density)) == pytest.approx(density, rel=0.1), density
    for density in (0.5, 0.01, 0.0012):
        assert scale_of(deltas, density) is None, density


def test_whole_rows_that_differ() -> None:
    """As of an embedding of which few tokens were trained."""
    deltas = randn(0, 4000, 1024)
    deltas[torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:3950]] = 0
    for density in (0.01, 0.001):
        assert met(deltas.view(-1), scale_of(deltas.view(-1), density)) == pytest.approx(
            density, rel=0.01
        )
    assert scale_of(deltas.view(-1), 0.0126) is None


def test_a_sample_will_do_for_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of several million elements is not looked at as a whole."""
    monkeypatch.setattr(sampling, "_Parts", None)
    assert scale_of(randn(0, 3_000_000), 0.1) is not None


@pytest.mark.parametrize(
    "deltas",
    [[0.0] * 9, [2.0], [0.0, 1e-3, 0.0, 0.0], [1e-45, 0.0, 0.0, 0.0]],
    ids=["zeros", "one", "one of four", "subnormal"],
)
def test_all_are_kept_where_few_differ(deltas: list[float]) -> None:
    assert scale_of(torch.tensor(deltas), 1.0) is None
    if len(deltas) > 1:
        assert scale_of(torch.tensor(deltas), 0.25) is None


@BOTH
@pytest.mark.parametrize("density", [0.3, 0.02])
def test_few_deltas_stay_as_they_are(combine: Combine, density: float) -> None:
    base = randn(1, 100_000)
    tuned = base.clone()
    tuned[:: int(1 / density) + 1] += 0.125
    settings = recipe(combine, sampling=Sampling.MAGNITUDE)
    merged = merging.merge(base, models([tuned], 1.0, density), settings)
    torch.testing.assert_close(merged, tuned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-30, 1e-3, 1e30], ids=str)
def test_any_size_of_deltas(scale: float) -> None:
    deltas = randn(0, 70_000) * scale
    found = scale_of(deltas, 0.1)
    assert found is not None
    t = torch.ceil(deltas.double().abs() * found).clamp(max=65536)
    assert float(t.mean()) / 65536 == pytest.approx(0.1, rel=0.01)
    base = torch.zeros_like(deltas)
    settings = recipe(Combine.LINEAR, sampling=Sampling.MAGNITUDE)
    merged = merging.merge(base, models([deltas], 1.0, 0.1), settings)
    assert float((merged != 0).double().mean()) == pytest.approx(0.1, rel=0.05)


def test_one_huge_delta() -> None:
    """It is kept as it is, and the others share the rest: no output is beyond max(delta, 1 / c)."""
    deltas = randn(0, 100_000)
    deltas[77] = 1e12
    settings = recipe(Combine.LINEAR, sampling=Sampling.MAGNITUDE)
    merged = merging.merge(torch.zeros_like(deltas), models([deltas], 1.0, 0.05), settings)
    assert merged[77] == deltas[77]
    scale = scale_of(deltas, 0.05)
    assert scale is not None
    limit = torch.maximum(deltas.abs(), torch.tensor(65536 / scale))
    assert bool((merged.abs() <= limit * 1.000001).all())
    assert float((merged != 0).double().mean()) == pytest.approx(0.05, rel=0.1)


def test_a_lower_density_keeps_a_subset() -> None:
    base = torch.zeros(300_000)
    deltas = randn(0, 300_000)
    settings = recipe(Combine.LINEAR, sampling=Sampling.MAGNITUDE)
    kept = [
        merging.merge(base, models([deltas], 1.0, density), settings) != 0
        for density in (0.003, 0.01, 0.1, 0.11, 0.5, 0.9, 1.0)
    ]
    for sparser, denser in itertools.pairwise(kept):
        assert bool((sparser <= denser).all())


@pytest.mark.parametrize(("shape", "power"), [("gaussian", 0.596), ("laplace", 0.444)])
def test_unbiased_and_noise_as_in_theory(shape: str, power: float) -> None:
    """Noise power over that of uniform sampling at density 0.1: (g / d - 1) / (1 / d - 1).

    With g = (E|delta|)**2 / E delta**2, 2 / pi for Gaussian and 1 / 2 for Laplace deltas. Means of
    64 seeds at 200,000 elements: the z scores of the means have variance 1 (false alarm under
    1e-6, within 0.5 %), and the ratio of powers is within 3 %.
    """
    deltas = SHAPES[shape](200_000).double()
    base = torch.zeros_like(deltas)
    scale = magnitude_scale(deltas, base, 0.1, torch.float64)
    assert scale is not None
    seeds = 64
    mean, powers = torch.zeros_like(deltas), {}
    for how in Sampling:
        powers[how] = 0.0
        for seed in range(seeds):
            settings = recipe(Combine.LINEAR, sampling=how, seed=seed)
            merged = merging.merge(base, models([deltas], 1.0, 0.1), settings)
            powers[how] += float((merged - deltas).square().sum())
            if how is Sampling.MAGNITUDE:
                mean += merged / seeds
    assert powers[Sampling.MAGNITUDE] / powers[Sampling.UNIFORM] == pytest.approx(power, rel=0.03)
    probability = torch.ceil(deltas.abs() * scale).clamp(1, 65536) / 65536
    variance = deltas.square() * (1 / probability - 1) / seeds
    drawn = probability < 1
    assert bool((mean == deltas)[~drawn].all())
    total = float((mean - deltas).sum()) / math.sqrt(float(variance.sum()))
    assert abs(total) < 4.9
    likely = drawn & (probability * seeds > 5)  # of the others, the distribution is too skewed
    z = ((mean - deltas) / variance.sqrt())[likely]
    assert float(z.square().mean()) == pytest.approx(1, abs=0.02)


@BOTH
def test_without_rescale_deltas_are_kept_as_they_are(combine: Combine) -> None:
    deltas = randn(0, 5000)
    settings = recipe(combine, sampling=Sampling.MAGNITUDE, rescale=False)
    merged = merging.merge(torch.zeros_like(deltas), models([deltas], 1.0, 0.2), settings)
    kept = merged != 0
    assert_same_bits(merged[kept], deltas[kept])
    assert 0.15 < float(kept.double().mean()) < 0.25


def test_equal_infinities_have_no_delta() -> None:
    deltas = randn(0, 5000)
    base = torch.zeros(5000)
    base[:100] = deltas[:100] = -math.inf
    settings = recipe(Combine.TIES, sampling=Sampling.MAGNITUDE)
    merged = merging.merge(base, models([deltas], 1.0, 0.2), settings)
    assert_same_bits(merged[:100], base[:100])
    assert bool(torch.isfinite(merged[100:]).all())


def test_a_merge_of_merges_does_not_empty() -> None:
    """Deltas of 0 are never drawn, so a sparse model keeps as many as are asked for."""
    base = torch.zeros(200_000)
    settings = recipe(Combine.LINEAR, sampling=Sampling.MAGNITUDE)
    once = merging.merge(base, models([randn(0, 200_000)], 1.0, 0.1), settings)
    twice = merging.merge(base, models([once], 1.0, 0.1), settings)
    assert float((twice != 0).double().mean()) > 0.095

"""The formula against the float64 reference, its exact properties, and every path through it."""

import itertools
import math
import tracemalloc

import pytest
import torch
from torch import Tensor

from mergekit_dare.kernel import cpu, merging
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.masks import threshold
from mergekit_dare.kernel.merging import FineTuned, Recipe
from mergekit_dare.kernel.rounding import Rounding
from mergekit_dare.kernel.sampling import Sampling, magnitude_scale
from tests import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BOTH = pytest.mark.parametrize("combine", list(Combine), ids=lambda combine: combine.value)
WAYS: dict[str, dict[str, object]] = {
    "uniform": {},
    "magnitude": {"sampling": Sampling.MAGNITUDE},
    "stochastic": {"sampling": Sampling.MAGNITUDE, "rounding": Rounding.STOCHASTIC},
}
EACH_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def family(
    count: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 0.01
) -> tuple[Tensor, list[Tensor]]:
    """A base and fine-tuned versions of it with small deltas, a tenth of them zero."""
    base = randn(1000, *shape, dtype=dtype, scale=0.02)
    tuned = []
    for seed in range(count):
        delta = randn(seed, *shape, dtype=torch.float64, scale=scale)
        delta[randn(seed + 500, *shape) > 1.28] = 0
        tuned.append((base.double() + delta).to(dtype))
    return base, tuned


def models(
    tensors: list[Tensor], weights: list[float] | float = 1.0, densities: list[float] | float = 1.0
) -> list[FineTuned]:
    if isinstance(weights, int | float):
        weights = [weights] * len(tensors)
    if isinstance(densities, int | float):
        densities = [densities] * len(tensors)
    return [
        FineTuned(f"model-{i}", tensor, weight, density)
        for i, (tensor, weight, density) in enumerate(zip(tensors, weights, densities, strict=True))
    ]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def recipe(combine: Combine, **settings: object) -> Recipe:
    defaults: dict[str, object] = {"tensor_name": "w", "seed": 42}
    return Recipe(combine, **(defaults | settings))  # type: ignore[arg-type]


def scales_of(
    base: Tensor, tuned: list[Tensor], densities: list[float], settings: Recipe
) -> list[float | None] | None:
    """The product's own c for each model, which tests/kernel/test_sampling.py checks."""
    if settings.sampling is Sampling.UNIFORM:
        return None
    dtypes = {base.dtype, *(theta.dtype for theta in tuned)}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    flat = base.contiguous().view(-1)
    return [
        magnitude_scale(theta.contiguous().view(-1), flat, density, wide) if density else None
        for theta, density in zip(tuned, densities, strict=True)
    ]


def assert_matches_reference(
    base: Tensor,
    tuned: list[Tensor],
    weights: list[float],
    densities: list[float],
    settings: Recipe,
    most_doubtful: float = 0.01,
) -> None:
    actual = merging.merge(base, models(tuned, weights, densities), settings)
    expected = reference.merge(
        base,
        tuned,
        weights,
        densities,
        combine=settings.combine.value,
        normalize=settings.normalize,
        rescale=settings.rescale,
        lambda_=settings.lambda_,
        seed=settings.seed,
        scales=scales_of(base, tuned, densities, settings),
    )
    assert actual.dtype == base.dtype
    sure = ~expected.doubtful
    assert float(expected.doubtful.double().mean()) <= most_doubtful
    off = (actual.double() - expected.values).abs()
    worst = float((off / expected.error)[sure].max())
    assert worst <= 1, f"{worst} times the error that rounding explains"


WEIGHTS = {
    1: [0.7],
    2: [0.6, -0.3],
    3: [1.0, 0.0, 0.5],
    5: [0.3, 0.3, -0.2, 1.5, 0.1],
    8: [0.5, 0.4, 0.3, -0.25, 0.2, 0.15, 0.0, 1.0],
}


@pytest.mark.parametrize("rescale", [True, False], ids=["rescale", "no-rescale"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "sum"])
@pytest.mark.parametrize("count", WEIGHTS)
@ALL_DTYPES
@BOTH
def test_reference(
    combine: Combine, dtype: torch.dtype, count: int, normalize: bool, rescale: bool
) -> None:
    base, tuned = family(count, 41, 53, dtype=dtype)
    for lambda_, density, sampling in itertools.product(
        [1.0, 0.6, -1.5], [0.0, 0.01, 0.1, 0.5, 0.9, 1.0], Sampling
    ):
        settings = recipe(
            combine, normalize=normalize, rescale=rescale, lambda_=lambda_, sampling=sampling
        )
        assert_matches_reference(base, tuned, WEIGHTS[count], [density] * count, settings)


@BOTH
@ALL_DTYPES
def test_reference_with_a_density_for_each_model(combine: Combine, dtype: torch.dtype) -> None:
    base, tuned = family(4, 999, dtype=dtype)
    densities = [0.0, 0.05, 0.6, 1.0]
    for normalize in (True, False):
        settings = recipe(combine, normalize=normalize)
        assert_matches_reference(base, tuned, [0.4, 0.3, 0.2, 0.1], densities, settings)


@BOTH
def test_unbiased(combine: Combine) -> None:
    """The mean over 400 seeds is the merge without dropping; false alarms under 1e-6.

    For linear it must be so at each of 2,000 elements (Bonferroni: z = 6.4). TIES elects a
    sign of what is left after dropping, so it is unbiased only where models cannot disagree.
    """
    base, tuned = family(3, 2000, dtype=torch.float64)
    if combine is Combine.TIES:
        tuned = [base + (theta - base).abs() for theta in tuned]
    weights, densities = [0.5, 0.3, 0.4], [0.1, 0.3, 0.7]
    mean = torch.zeros_like(base)
    for seed in range(400):
        merged = merging.merge(base, models(tuned, weights, densities), recipe(combine, seed=seed))
        mean += merged / 400
    expected = merging.merge(base, models(tuned, weights), recipe(combine))
    variance = sum(
        ((theta - base) * weight) ** 2 * (1 - density) / density
        for theta, weight, density in zip(tuned, weights, densities, strict=True)
    )
    z = (mean - expected) / torch.as_tensor(variance / 400 + 1e-30).sqrt()
    assert float(z.abs().max()) < 6.4
    assert abs(float(z.sum())) < 4.9 * math.sqrt(len(z))


@ALL_DTYPES
@BOTH
def test_one_model_whole_gives_it_back(combine: Combine, dtype: torch.dtype) -> None:
    base, (tuned,) = family(1, 5000, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    difference = tuned.to(wide) - base.to(wide)
    exact = difference.double() == tuned.double() - base.double()
    exact &= (difference + base.to(wide)) == tuned.to(wide)
    merged = merging.merge(base, models([tuned]), recipe(combine))
    assert int(exact.sum()) > 2000
    assert torch.equal(merged[exact], tuned[exact])


@ALL_DTYPES
@BOTH
def test_the_base_where_all_is_dropped(combine: Combine, dtype: torch.dtype) -> None:
    base, tuned = family(2, 4, 3000, dtype=dtype)
    base[0, :100] = 0.0
    base[0, 100:200] = -0.0
    nothing = merging.merge(base, models(tuned, 1.0, 0.0), recipe(combine))
    assert_same_bits(nothing, base)
    assert nothing.data_ptr() != base.data_ptr()

    sparse = recipe(combine, tensor_name="sparse")
    merged = merging.merge(base, models(tuned, [1.0, -1.0], 0.01), sparse)
    kept = torch.zeros(base.shape, dtype=torch.bool)
    for theta in tuned:
        key = reference.mask_key(42, theta)
        kept |= torch.tensor(reference.keep_mask(key, 0.01, base.numel())).view(base.shape)
    assert 0 < int(kept.sum()) < 0.04 * base.numel()
    assert_same_bits(merged[~kept], base[~kept])


@ALL_DTYPES
@BOTH
@pytest.mark.parametrize("normalize", [True, False])
def test_weight_zero_changes_nothing(combine: Combine, dtype: torch.dtype, normalize: bool) -> None:
    base, tuned = family(3, 3000, dtype=dtype)
    base[:50] = -0.0
    settings = recipe(combine, normalize=normalize)
    without = merging.merge(base, models(tuned[:2], 0.4, 0.3), settings)
    with_it = merging.merge(base, models(tuned, [0.4, 0.4, 0.0], 0.3), settings)
    assert_same_bits(with_it, without)


@ALL_DTYPES
@BOTH
def test_a_copy_of_the_base_changes_only_the_divisor_of_linear(
    combine: Combine, dtype: torch.dtype
) -> None:
    base, tuned = family(2, 3000, dtype=dtype)
    for normalize in (False, True):
        settings = recipe(combine, normalize=normalize)
        without = merging.merge(base, models(tuned, 0.5, 0.5), settings)
        copy = models([base.clone()], 1.0, 0.5)
        with_it = merging.merge(base, models(tuned, 0.5, 0.5) + copy, settings)
        if normalize and combine is Combine.LINEAR:
            halved = recipe(combine, normalize=False, lambda_=0.5)
            without = merging.merge(base, models(tuned, 0.5, 0.5), halved)
        assert_same_bits(with_it, without)


@ALL_DTYPES
@pytest.mark.parametrize("lambda_", [1.0, 0.5, 2.0])
def test_ties_of_one_model_is_linear(dtype: torch.dtype, lambda_: float) -> None:
    base, (tuned,) = family(1, 3000, dtype=dtype)
    one = models([tuned], -0.7, 0.4)
    linear, ties = (
        merging.merge(base, one, recipe(combine, lambda_=lambda_)) for combine in Combine
    )
    assert_same_bits(ties, linear)


@ALL_DTYPES
@BOTH
def test_equal_infinities(combine: Combine, dtype: torch.dtype) -> None:
    """As in a causal-mask buffer that every model has."""
    base, tuned = family(2, 64, 64, dtype=dtype)
    above = torch.ones(64, 64).triu(1).bool()
    finite = merging.merge(base, models(tuned, 0.5, 0.5), recipe(combine))
    for tensor in (base, *tuned):
        tensor[above] = -math.inf
    merged = merging.merge(base, models(tuned, 0.5, 1.0), recipe(combine))
    assert bool((merged[above] == -math.inf).all())
    assert bool(merged[~above].isfinite().all())
    whole = merging.merge(
        base.masked_fill(above, 0),
        models([theta.masked_fill(above, 0) for theta in tuned], 0.5, 1.0),
        recipe(combine),
    )
    assert torch.equal(merged[~above], whole[~above])
    assert finite.shape == merged.shape


@EACH_WAY
@BOTH
def test_the_order_of_models_does_not_matter(combine: Combine, way: dict[str, object]) -> None:
    base, tuned = family(5, 4000)
    entries = models(tuned, [0.3, 0.31, 0.32, -0.2, 0.5], [0.5, 0.1, 0.9, 0.3, 1.0])
    for normalize in (False, True):
        settings = recipe(combine, normalize=normalize, **way)
        expected = merging.merge(base, entries, settings)
        for order in list(itertools.permutations(entries))[::17]:
            assert_same_bits(merging.merge(base, order, settings), expected)


@BOTH
def test_another_seed_another_mask(combine: Combine) -> None:
    base, tuned = family(1, 10_000)
    first, second, again = (
        merging.merge(base, models(tuned, 1.0, 0.5), recipe(combine, seed=seed)) != base
        for seed in (1, 2, 1)
    )
    assert torch.equal(first, again)
    assert 0.4 < float((first ^ second).double().mean()) < 0.5  # 0.45: a tenth of deltas are 0


def test_a_lower_density_keeps_a_subset() -> None:
    base, tuned = family(1, 10_000)
    kept = [
        merging.merge(base, models(tuned, 1.0, density), recipe(Combine.LINEAR)) != base
        for density in (0.01, 0.1, 0.5, 0.9)
    ]
    for sparse, dense in itertools.pairwise(kept):
        assert bool((sparse <= dense).all())


def test_chained_merges_are_unbiased() -> None:
    """A merge's output merged again under its name is masked anew; false alarms 1e-6 each.

    A mask that repeated itself would keep d of the deltas and scale them by 1 / d**2.
    """
    base, tuned = family(1, 200_000, dtype=torch.float64)
    density = 0.25
    once = merging.merge(base, models(tuned, 1.0, density), recipe(Combine.LINEAR))
    twice = merging.merge(base, models([once], 1.0, density), recipe(Combine.LINEAR))
    moved = tuned[0] != base
    kept_once, kept_twice = once != base, twice != base
    assert bool((kept_twice <= kept_once).all())
    count = int(kept_once.sum())
    expected = count * density
    assert abs(int(kept_twice.sum()) - expected) < 4.9 * math.sqrt(expected * (1 - density))
    survivors = (twice - base)[kept_twice] / (tuned[0] - base)[kept_twice]
    torch.testing.assert_close(survivors, torch.full_like(survivors, 1 / density**2))
    # The sum of deltas is met up to the noise that DARE adds twice.
    deltas = (tuned[0] - base)[moved]
    noise = math.sqrt(float((deltas**2).sum()) * (1 / density**2 - 1))
    assert abs(float((twice - base).sum() - deltas.sum())) < 4.9 * noise


@EACH_WAY
@BOTH
@ALL_DTYPES
def test_borders_of_pieces(
    combine: Combine,
    dtype: torch.dtype,
    way: dict[str, object],
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, tuned = family(3, 3 * 1024 + 5, dtype=dtype)
    entries = models(tuned, [0.5, 0.3, -0.4], [0.5, 0.1, 1.0])
    module, name = (cpu, "PIECE") if engine == "loops" else (merging, "CPU_PIECE")
    for normalize in (False, True):
        settings = recipe(combine, normalize=normalize, **way)
        expected = merging.merge(base, entries, settings)
        for piece in (4, 8, 1020, 1024, 3076, 3080):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, piece)
                assert_same_bits(merging.merge(base, entries, settings), expected)


@EACH_WAY
@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("small_pieces")
def test_threads(combine: Combine, dtype: torch.dtype, way: dict[str, object]) -> None:
    base, tuned = family(3, (1 << 16) + 12345, dtype=dtype)
    entries = models(tuned, [0.5, 0.3, -0.4], [0.5, 0.1, 1.0])
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(merging.merge(base, entries, recipe(combine, normalize=True, **way)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@EACH_WAY
@BOTH
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1), (7,), (2, 3, 5)])
def test_shapes(combine: Combine, shape: tuple[int, ...], way: dict[str, object]) -> None:
    base, tuned = family(2, *shape)
    before = [base.clone(), *(theta.clone() for theta in tuned)]
    merged = merging.merge(base, models(tuned, 0.5, 0.5), recipe(combine, **way))
    assert merged.shape == shape
    assert_same_bits(
        merged.reshape(-1),
        merging.merge(base, models(tuned, 0.5, 0.5), recipe(combine, **way)).reshape(-1),
    )
    for tensor, copy in zip([base, *tuned], before, strict=True):
        assert_same_bits(tensor, copy)


@EACH_WAY
@BOTH
@ALL_DTYPES
def test_strides(combine: Combine, dtype: torch.dtype, way: dict[str, object]) -> None:
    base, tuned = family(2, 60, 40, dtype=dtype)
    expected = merging.merge(base, models(tuned, 0.5, 0.5), recipe(combine, **way))
    transposed = [tensor.t().contiguous().t() for tensor in (base, *tuned)]
    sliced = [
        torch.stack([tensor, tensor.new_zeros(tensor.shape)], dim=-1)[..., 0]
        for tensor in (base, *tuned)
    ]
    for first, *rest in (transposed, sliced, [base, *transposed[1:]], [sliced[0], *tuned]):
        assert_same_bits(
            merging.merge(first, models(rest, 0.5, 0.5), recipe(combine, **way)), expected
        )


def test_zero_stride_and_odd_offset() -> None:
    base = torch.zeros(1).expand(50, 3)
    tuned = torch.ones(151)[1:].view(50, 3)
    merged = merging.merge(base, models([tuned], 0.5), recipe(Combine.LINEAR))
    assert_same_bits(merged, torch.full((50, 3), 0.5))


@ALL_DTYPES
def test_a_tied_election_counts_as_positive(dtype: torch.dtype) -> None:
    """In both orders, with lambda of either sign: the model above the base wins."""
    base = torch.zeros(10, dtype=dtype)
    up, down = torch.full((10,), 0.5, dtype=dtype), torch.full((10,), -0.5, dtype=dtype)
    for lambda_ in (1.0, -2.0):
        for tuned in ([up, down], [down, up]):
            for normalize in (True, False):
                settings = recipe(Combine.TIES, lambda_=lambda_, normalize=normalize)
                merged = merging.merge(base, models(tuned, 0.5), settings)
                assert_same_bits(merged, up * lambda_ * (1.0 if normalize else 0.5))


@BOTH
def test_float16_beyond_its_norms(combine: Combine) -> None:
    """The L1 norm of these deltas is 2e6, beyond float16: mergekit's own method gives NaN."""
    base = randn(0, 1000, 1000, dtype=torch.float16)
    tuned = [(base.float() + 2.0).half(), (base.float() - randn(1, 1000, 1000).abs()).half()]
    merged = merging.merge(base, models(tuned, 1.0, 0.1), recipe(combine))
    assert bool(merged.isfinite().all())
    small = slice(0, 3)
    # The reference is slow: check rows on their own terms by recomputing them from the mask.
    key = reference.mask_key(42, tuned[0][small].contiguous())
    assert key != 0
    alone = merging.merge(base, models(tuned[:1], 1.0, 0.1), recipe(combine))
    moved = alone != base
    lift = (alone.float() - base.float())[moved]
    met = threshold(0.1) / 65536
    expected = (tuned[0].float() - base.float())[moved] / met
    torch.testing.assert_close(lift, expected, rtol=0, atol=0.03)
    assert abs(float(moved.double().mean()) - met) < 4.9 * math.sqrt(met * (1 - met) / 1e6)


@BOTH
def test_non_finite_deltas(combine: Combine) -> None:
    base, tuned = family(2, 300)
    tuned[1][7] = math.nan
    tuned[1][9] = math.inf
    with pytest.raises(ValueError, match=r"tensor w of model model-1 makes 2 of 300 deltas"):
        merging.merge(base, models(tuned, 1.0, 0.5), recipe(combine))
    # Dropped or not, kept or not: the mask must not hide it.
    with pytest.raises(ValueError, match=r"tensor w of model model-1 makes 2 of 300 deltas"):
        merging.merge(base, models(tuned, 1.0, 0.001), recipe(combine))
    merged = merging.merge(base, models(tuned, [1.0, 0.0], 0.5), recipe(combine))
    assert bool(merged.isfinite().all())


@BOTH
def test_non_finite_base(combine: Combine) -> None:
    base, tuned = family(1, 300)
    base[5] = math.inf
    with pytest.raises(ValueError, match=r"tensor w of the base model makes 1 of 300 deltas"):
        merging.merge(base, models(tuned, 1.0, 0.5), recipe(combine))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@BOTH
def test_overflow(combine: Combine, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    base = torch.zeros(100, dtype=dtype)
    tuned = torch.full((100,), largest / 2, dtype=dtype)
    whole = merging.merge(base, models([tuned], 2.0), recipe(combine))
    assert_same_bits(whole, torch.full((100,), largest, dtype=dtype))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"merged tensor w overflows {name} .* in 100 of 100"):
        merging.merge(base, models([tuned], 2.1), recipe(combine))


def test_overflow_limit_is_where_rounding_overflows() -> None:
    for dtype, wide in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ):
        limit = torch.tensor(merging._overflow_limit(dtype), dtype=wide)
        below = torch.nextafter(limit, torch.tensor(0.0, dtype=wide))
        assert limit.to(dtype).isinf()
        assert below.to(dtype).isfinite()


def test_overflow_of_a_dtype_narrower_than_the_arithmetic() -> None:
    base = torch.full((100,), 3.4e38)
    tuned = base.double() * 1.5
    with pytest.raises(ValueError, match=r"overflows float32 .* in 100 of 100"):
        merging.merge(base, models([tuned]), recipe(Combine.LINEAR))


def test_unsupported_dtype() -> None:
    base = torch.zeros(4, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"dtype float8_e4m3fn.*is quantized.*dequantize it first"):
        merging.merge(base, models([base]), recipe(Combine.LINEAR))


@pytest.mark.usefixtures("engine")
def test_other_shapes_and_devices() -> None:
    base = torch.zeros(4, 5)
    for other, found in ((torch.zeros(20), r"\(20,\) on cpu"), (base.to("meta"), "on meta")):
        with pytest.raises(ValueError, match=f"tensor w of model model-0 has shape .*{found}, but"):
            merging.merge(base, models([other]), recipe(Combine.LINEAR))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_torchs_default_dtype_plays_no_part(dtype: torch.dtype) -> None:
    base, tuned = family(2, 5000, dtype=torch.bfloat16)
    for way in WAYS.values():
        settings = recipe(Combine.TIES, normalize=True, **way)
        expected = merging.merge(base, models(tuned, 0.5, 0.3), settings)
        torch.set_default_dtype(dtype)
        try:
            merged = merging.merge(base, models(tuned, 0.5, 0.3), settings)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same_bits(merged, expected)


@pytest.mark.usefixtures("engine")
@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot do that")
def test_flushed_subnormal_numbers_change_no_float16() -> None:
    """As any library may set for a whole process, for speed."""
    base, tuned = family(2, 5000, dtype=torch.float16)
    base[::2] /= 1024
    tuned[0][::2] = base[::2] * 1.5
    expected = merging.merge(base, models(tuned, 0.5, 0.3), recipe(Combine.LINEAR))
    assert torch.set_flush_denormal(True)
    try:
        merged = merging.merge(base, models(tuned, 0.5, 0.3), recipe(Combine.LINEAR))
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(merged, expected)


def test_mixed_dtypes() -> None:
    base, (tuned,) = family(1, 500)
    merged = merging.merge(base.bfloat16(), models([tuned], 1.0), recipe(Combine.LINEAR))
    assert_same_bits(merged, tuned.bfloat16())
    merged = merging.merge(base, models([tuned.double()]), recipe(Combine.LINEAR))
    assert merged.dtype == torch.float32


def test_torchs_generator_and_settings_are_left_alone() -> None:
    base, tuned = family(2, 5000)
    state = torch.get_rng_state()
    expected = merging.merge(base, models(tuned, 0.5, 0.5), recipe(Combine.TIES))
    assert torch.equal(torch.get_rng_state(), state)
    assert not expected.is_inference()
    assert torch.is_grad_enabled()
    torch.set_default_dtype(torch.float64)
    try:
        wide = merging.merge(base, models(tuned, 0.5, 0.5), recipe(Combine.TIES))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(wide, expected)
    with torch.inference_mode():
        inside = merging.merge(base, models(tuned, 0.5, 0.5), recipe(Combine.TIES))
    assert torch.equal(inside, expected)


def peak_beside_output(base: Tensor, entries: list[FineTuned], settings: Recipe) -> int:
    """The most bytes that a merge has allocated at once, beside its inputs and its output.

    By torch and by numpy; the loops themselves allocate one array of 768 bytes a piece.
    """
    tracemalloc.start()
    with torch.profiler.profile(profile_memory=True) as profile:
        merged = merging.merge(base, entries, settings)
        _, of_numpy = tracemalloc.get_traced_memory()  # before the profiler's own
    tracemalloc.stop()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + of_numpy - merged.nbytes


@pytest.mark.parametrize(
    "way", [{}, {"sampling": Sampling.MAGNITUDE}], ids=["uniform", "magnitude"]
)
@pytest.mark.usefixtures("engine")
def test_memory_beside_inputs_and_output(way: dict[str, object]) -> None:
    """No buffer grows with the tensor or with the number of models."""
    peaks = []
    for count, elements in ((1, 1_000_000), (6, 4_000_000)):
        base = torch.zeros(elements, dtype=torch.bfloat16)
        tuned = [torch.full((elements,), 0.01 * k, dtype=torch.bfloat16) for k in range(count)]
        entries = models(tuned, 0.1, 0.5)
        peaks.append(peak_beside_output(base, entries, recipe(Combine.TIES, **way)))
    assert all(peak < 16 << 20 for peak in peaks), peaks

"""The keep mask: known answers, statistics, and what it depends on.

Statistical tests state their false-alarm rate. Since masks are a function of fixed seeds, a
test that passes once passes always: the rate says how likely an honest generator would have
failed when the seeds were chosen.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from mergekit_dare.kernel import cpu
from mergekit_dare.kernel.masks import (
    checksums,
    lanes_of,
    largest_lane,
    mask_key,
    splitmix64,
    threshold,
)
from tests import reference

CPU = torch.device("cpu")
# Two-sided 1e-6 quantile of the normal distribution: each assertion's false-alarm rate.
Z = 4.9


def mask_of(key: int, density: float, count: int, start: int = 0) -> Tensor:
    if density == 0:
        return torch.zeros(count)
    lanes = lanes_of(key, slice(start, start + count), CPU)
    return (lanes <= largest_lane(threshold(density))).float()


def weights(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def test_published_splitmix64_outputs() -> None:
    words = splitmix64(1234567, slice(0, 5), CPU)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [word % 2**64 for word in words.tolist()] == published
    assert reference.splitmix64(1234567, 5) == published


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15])
def test_any_word_without_the_words_before_it(key: int) -> None:
    expected = reference.splitmix64(key, 1000)
    words = splitmix64(key, slice(900, 1000), CPU)
    assert [word % 2**64 for word in words.tolist()] == expected[900:]


@pytest.mark.parametrize("density", [0.0, 1e-9, 0.001, 0.1, 0.5, 0.9, 0.999999, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 1021])
def test_equals_the_plain_python_mask(density: float, count: int) -> None:
    assert mask_of(99, density, count).bool().tolist() == reference.keep_mask(99, density, count)


def test_a_part_of_a_mask_is_that_part() -> None:
    whole = mask_of(7, 0.3, 4096)
    assert torch.equal(mask_of(7, 0.3, 1001, start=1024), whole[1024:2025])


@pytest.mark.parametrize(
    ("density", "t"),
    [(0, 0), (1e-12, 1), (2**-16, 1), (0.1, 6554), (0.5, 32768), (0.9999999, 65536), (1, 65536)],
)
def test_threshold(density: float, t: int) -> None:
    assert threshold(density) == t


def test_masks_are_nested() -> None:
    densities = [0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0]
    masks = [mask_of(3, density, 100_000) for density in densities]
    for sparse, dense in itertools.pairwise(masks):
        assert bool((sparse <= dense).all())
        assert sparse.sum() < dense.sum()


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_kept_fraction(density: float) -> None:
    """Bernoulli counts of 2**24 elements, for 4 keys; false alarms 1e-6 each."""
    count = 1 << 24
    met = threshold(density) / 65536
    for key in range(4):
        kept = float(mask_of(mask_key(key, weights(key, 8)), density, count).double().sum())
        assert abs(kept - count * met) < Z * math.sqrt(count * met * (1 - met))


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 1024, 4096, 2**18, 2**20])
def test_no_correlation_at_a_lag(density: float, lag: int) -> None:
    """Products of elements ``lag`` apart over 2**23 pairs; false alarms 1e-6 each."""
    met = threshold(density) / 65536
    mask = mask_of(20231107, density, (1 << 23) + lag) - met
    pairs = mask[lag:] * mask[:-lag]
    deviation = met * (1 - met) * math.sqrt(len(pairs))
    assert abs(float(pairs.double().sum())) < Z * deviation


def test_lanes_are_uniform() -> None:
    """Chi-square over 256 classes of the high byte of each of the four lanes; false alarms 1e-6."""
    words = splitmix64(5, slice(0, 1 << 21), CPU)
    lanes = words.view(torch.int16).view(-1, 4)
    for lane in range(4):
        counts = torch.bincount((lanes[:, lane].int() + 32768) >> 8, minlength=256).double()
        expected = len(lanes) / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        # Wilson and Hilferty: (chi2 / 255) ** (1/3) is close to normal.
        normal = ((chi_square / 255) ** (1 / 3) - (1 - 2 / (9 * 255))) / math.sqrt(2 / (9 * 255))
        assert abs(normal) < Z


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_models_are_independent(density: float) -> None:
    """Covariance of the masks of every pair of 8 models, 2**20 elements; false alarms 1e-6 each."""
    count = 1 << 20
    met = threshold(density) / 65536
    keys = [mask_key(42, weights(k, 64)) for k in range(8)]
    masks = [mask_of(key, density, count) - met for key in keys]
    deviation = met * (1 - met) * math.sqrt(count)
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs(float((first * second).double().sum())) < Z * deviation


def test_keys_differ_in_every_part() -> None:
    tensor = weights(0, 64, 64)
    changed = tensor.clone()
    changed[63, 63] += 1
    swapped = tensor.clone()
    swapped[0, 0], swapped[0, 1] = tensor[0, 1], tensor[0, 0]
    keys = [
        mask_key(0, tensor),
        mask_key(1, tensor),
        mask_key(0, tensor.view(32, 128)),
        mask_key(0, tensor.view(torch.int32).view(torch.float32).bfloat16()),
        mask_key(0, changed),
        mask_key(0, swapped),
    ]
    assert len(set(keys)) == len(keys)
    assert mask_key(0, tensor.clone()) == keys[0]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (40_001,), (16_384,), (3, 16_384)])
def test_key_equals_the_plain_python_key(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = weights(4, *shape, dtype=dtype)
    assert mask_key(2**70, tensor) == reference.mask_key(2**70, tensor)


def test_key_depends_on_values_not_on_layout() -> None:
    tensor = weights(1, 300, 200, dtype=torch.bfloat16)
    key = mask_key(0, tensor)
    assert mask_key(0, tensor.t().contiguous().t()) == key
    odd_offset = torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(300, 200)
    assert odd_offset.storage_offset() == 1
    assert mask_key(0, odd_offset) == key
    single = torch.arange(4, dtype=torch.bfloat16).view(2, 2)[1:, 1]
    assert single.is_contiguous()  # though its stride is 2
    assert single.stride() == (2,)
    assert mask_key(0, single) == mask_key(0, single.clone())


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("offset", [0, 1])
def test_checksums_by_loops(offset: int) -> None:
    """Of tensors of several sizes at once, by several threads, also where no word begins."""
    vectors = [weights(k, 1000 * k**3).bfloat16()[offset:] for k in range(1, 9)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    found = cpu.checksums(vectors)
    torch.set_num_threads(before)
    assert found == [checksums(vector) for vector in vectors]
    assert len(found[-1]) == (512_000 - offset) * 2 // 32768 * 8

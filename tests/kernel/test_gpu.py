"""On an accelerator: the same bytes as on the CPU, from a workspace that does not grow."""

from __future__ import annotations

import pytest
import torch

from mergekit_dare.kernel import merging
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.masks import mask_key
from tests.kernel.test_merging import ALL_DTYPES, BOTH, assert_same_bits, family, models, recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@BOTH
@ALL_DTYPES
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "sum"])
@pytest.mark.parametrize("elements", [1, 1023, 100_003, merging.ACCELERATOR_PIECE + 5])
def test_the_bytes_of_the_cpu(
    combine: Combine, dtype: torch.dtype, normalize: bool, elements: int
) -> None:
    base, tuned = family(3, elements, dtype=dtype)
    base[::97] = -0.0
    weights, densities = [0.5, 0.3, -0.4], [0.5, 0.1, 1.0]
    settings = recipe(combine, normalize=normalize, lambda_=0.7)
    expected = merging.merge(base, models(tuned, weights, densities), settings)
    on_gpu = models([theta.cuda() for theta in tuned], weights, densities)
    merged = merging.merge(base.cuda(), on_gpu, settings)
    assert merged.is_cuda
    assert_same_bits(merged.cpu(), expected)


@ALL_DTYPES
def test_the_key_of_the_cpu(dtype: torch.dtype) -> None:
    (tensor, _) = family(1, 300_001, dtype=dtype)
    assert mask_key(1, tensor.cuda()) == mask_key(1, tensor)


@BOTH
def test_errors(combine: Combine) -> None:
    base, tuned = family(1, 300)
    tuned[0][7] = float("nan")
    with pytest.raises(ValueError, match="makes 1 of 300 deltas NaN or infinite"):
        merging.merge(base.cuda(), models([tuned[0].cuda()], 1.0, 0.5), recipe(combine))


def test_workspace() -> None:
    peaks = []
    for count, elements in ((1, 20_000_000), (6, 80_000_000)):
        base = torch.zeros(elements, dtype=torch.bfloat16, device="cuda")
        tuned = [torch.full_like(base, 0.01 * k) for k in range(count)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        merged = merging.merge(base, models(tuned, 0.1, 0.5), recipe(Combine.TIES))
        peaks.append(torch.cuda.max_memory_allocated() - before - merged.nbytes)
    assert all(peak < 400 << 20 for peak in peaks), peaks

"""The kernel on fake CUDA tensors: devices, dtypes and synchronizations, without a GPU.

torch's fake tensors know a device and a dtype and hold no data. Where an operation mixes devices,
lacks a dtype, or asks for a value, which on a GPU would wait for it, they raise. Only a build of
torch with CUDA has the kernels that they ask.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mergekit_dare.kernel.buffers import Buffers
from mergekit_dare.kernel.formula import Combine, Numbers, Steps, merge_chunk
from mergekit_dare.kernel.rounding import NARROW
from tests.kernel.test_merging import ALL_DTYPES, BOTH


def needs_a_driver() -> bool:
    """Tell whether this torch asks the CUDA driver even for fake tensors; torch 2.4 does."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            narrow = torch.empty(1, dtype=torch.bfloat16, device="cuda")
            torch.empty(1, device="cuda").copy_(narrow)
    except RuntimeError:
        return True
    return False


pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA"),
    pytest.mark.skipif(
        torch.version.cuda is not None and needs_a_driver(), reason="it asks the CUDA driver"
    ),
]

ELEMENTS, MODELS = 1 << 12, 3


@BOTH
@ALL_DTYPES
@pytest.mark.parametrize("by_magnitude", [False, True], ids=["uniform", "magnitude"])
@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "normalize"])
@pytest.mark.parametrize("equal_infinities", [False, True], ids=["finite", "infinities"])
def test_a_chunk(
    combine: Combine,
    dtype: torch.dtype,
    by_magnitude: bool,
    normalize: bool,
    equal_infinities: bool,
) -> None:
    ties = combine is Combine.TIES
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = Steps(
        combine,
        wide,
        by_magnitude=by_magnitude,
        normalize=ties and normalize,
        scale=ties,
        stochastic=dtype in NARROW,
        equal_infinities=equal_infinities,
    )
    numbers = Numbers(
        states=[11, 22, 33, 44],
        thresholds=[1 if by_magnitude else 20_000] * MODELS,
        scales=[1e4] * MODELS,
        factors=[0.5, 0.3, -0.2],
        weights=[0.5, 0.3, -0.2],
        lambda_=0.7,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(ELEMENTS, dtype=dtype, device="cuda") for _ in range(MODELS + 1)]
        out = torch.empty_like(tensors[0])
        b = Buffers.allocate(ELEMENTS, out.device, wide)
        norm = merge_chunk(out, tensors[0], tensors[1:], numbers, steps, b)
    assert (norm.device.type, norm.dtype) == ("cuda", wide)
    assert (out.device.type, out.dtype) == ("cuda", dtype)

"""The kernel on fake CUDA tensors: devices, dtypes and synchronizations, without a GPU.

torch's fake tensors know a device and a dtype and hold no data. Where an operation mixes devices,
lacks a dtype, or asks for a value, which on a GPU would wait for it, they raise. Only a build of
torch with CUDA has the kernels that they ask.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mergekit_dare.kernel.formula import Combine, Job, Term, merge
from mergekit_dare.kernel.merging import rounded
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
def test_a_piece(combine: Combine, dtype: torch.dtype, by_magnitude: bool, normalize: bool) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ties, piece = combine is Combine.TIES, slice(0, ELEMENTS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        theta_0, *thetas = (
            torch.empty(ELEMENTS, dtype=dtype, device="cuda") for _ in range(MODELS + 1)
        )
        terms = [
            Term("", k, theta, 2**63 + 11 * k, 20_000, 1e4, 0.5 - k / 3, 0.5 - k / 3)
            for k, theta in enumerate(thetas)
        ]
        rounding_key = 44 if dtype in NARROW else None
        job = Job(
            theta_0, terms, wide, ties, ties and normalize, by_magnitude, True, 0.7, rounding_key
        )
        result = merge(job, piece)
        out = rounded(result, job, piece)
    assert (result.device.type, result.dtype) == ("cuda", wide)
    assert (out.device.type, out.dtype) == ("cuda", dtype)

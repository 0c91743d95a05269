"""The two ways to run the formula: loops that Numba compiles, and torch."""

from __future__ import annotations

import pytest
import torch

from mergekit_dare.kernel import cpu, merging, threads


@pytest.fixture(params=["loops", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with either."""
    if request.param == "torch":
        monkeypatch.setattr(merging, "compiled_cpu", lambda dtype: None)
    return str(request.param)


@pytest.fixture(autouse=True)
def _numba_works() -> None:
    """Otherwise all tests of the loops would test torch."""
    assert merging.compiled_cpu(torch.float32) is cpu
    assert merging.compiled_cpu(torch.float64) is cpu


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors of a few thousand elements be worked on in many pieces, by many threads."""
    monkeypatch.setattr(threads, "cores", lambda: 8)
    for module, name, size in (
        (cpu, "PIECE", 1 << 10),
        (cpu, "SUMS", 1),
        (cpu, "LEAST_WORK", 1 << 10),
        (cpu, "LEAST_SUMS", 1),
        (merging, "CPU_PIECE", 1 << 10),
    ):
        monkeypatch.setattr(module, name, size)

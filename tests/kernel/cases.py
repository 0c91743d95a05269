"""Merges with which other ways to run the formula are compared with the formula itself."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.merging import FineTuned, Recipe
from mergekit_dare.kernel.rounding import Rounding
from mergekit_dare.kernel.sampling import Sampling
from tests.kernel.test_merging import family, models, recipe

LINEAR, TIES = Combine.LINEAR, Combine.TIES
NORMALIZED: dict[str, Any] = {"normalize": True, "lambda_": -0.7}
DRAWN: dict[str, Any] = {"sampling": Sampling.MAGNITUDE, "rounding": Rounding.STOCHASTIC}
# Of theta_0, of each theta_k, and what is done.
CASES: dict[str, tuple[torch.dtype, list[torch.dtype], Recipe]] = {
    "linear": (torch.bfloat16, [torch.bfloat16] * 4, recipe(LINEAR)),
    "ties": (torch.bfloat16, [torch.bfloat16] * 2, recipe(TIES)),
    "normalized": (torch.bfloat16, [torch.bfloat16] * 4, recipe(TIES, **NORMALIZED)),
    "float16": (torch.float16, [torch.float16] * 4, recipe(LINEAR, **DRAWN)),
    "float32": (torch.float32, [torch.float32] * 4, recipe(TIES)),
    "float64": (torch.float64, [torch.float64] * 4, recipe(TIES, **NORMALIZED)),
    "mixed": (
        torch.float16,
        [torch.float16, torch.bfloat16, torch.float32],
        recipe(TIES),
    ),
    "drawn": (
        torch.bfloat16,
        [torch.bfloat16] * 3,
        recipe(TIES, **DRAWN, normalize=True, rescale=False),
    ),
}


def entries_of(name: str, elements: int) -> tuple[Tensor, list[FineTuned], Recipe]:
    """Tensors with zeros of both signs, subnormals, equal weights, all and nothing dropped."""
    dtype, dtypes, settings = CASES[name]
    base, tuned = family(len(dtypes), elements, dtype=dtype)
    base[::97] = -0.0
    base[1::97] = 0.0
    tiny = torch.finfo(dtype).smallest_normal
    base[2:2000:7] = torch.linspace(-tiny, tiny, len(base[2:2000:7]), dtype=dtype)
    tuned[1][2:2000:7] = base[2:2000:7].flip(0)
    tuned[1][3::5] = (2 * base.double() - tuned[0].double()).to(dtype)[3::5]  # election ties
    tuned = [theta.to(own) for theta, own in zip(tuned, dtypes, strict=True)]
    count = len(tuned)
    weights, densities = [0.5, 0.5, 0.3, -0.4][:count], [0.5, 0.5, 1.0, 1e-9][:count]
    return base, models(tuned, weights, densities), settings


def watch(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    asked: Callable[[], None],
    merged: Callable[[bool], None],
) -> None:
    """Tell when ``module.merge_function`` is asked, and whether what it returns merges a chunk."""
    merge_function = module.merge_function

    def watched(*arguments: Any) -> Any:
        function = merge_function(*arguments)
        asked()
        if function is None:
            return None

        def merge_and_tell(*chunk: Any) -> float | None:
            norm: float | None = function(*chunk)
            merged(norm is not None)
            return norm

        return merge_and_tell

    monkeypatch.setattr(module, "merge_function", watched)

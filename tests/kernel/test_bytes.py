"""The bytes of 0.1.0 stay: hashes of merges, stored by that version, for both engines.

Its engines are gone; what they made of these inputs is in ``bytes.json``. The inputs come from
integers alone, so that they are the same on every machine. ``python -m tests.kernel.test_bytes``
writes the file anew, which is right only where the version of the masks changes (``person`` of the
hash in masks.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from mergekit.merge_methods import merge_tensors
from torch import Tensor

STORED = Path(__file__).with_name("bytes.json")
BLOCK, CHUNK = 1 << 12, 1 << 18  # sizes at whose borders something could go wrong
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES["fp64"] = torch.float64
METHODS = ("dare_linear", "dare_ties")


class Case(NamedTuple):
    """A merge.

    Attributes:
        method: Its name in mergekit.
        dtypes: Of the base and each fine-tuned model.
        elements: How many.
        layout: ``plain``, ``strided``, ``negated``, or ``special`` for -0.0, infinities, subnormal
            numbers, and elements that are equal or opposite.
        parameters: Those of the method.

    """

    method: str
    dtypes: tuple[str, ...]
    elements: int
    layout: str
    parameters: dict[str, Any]

    @property
    def name(self) -> str:
        """Return what the file calls it."""
        given = ",".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.method} {'+'.join(self.dtypes)} {self.elements} {self.layout} {given}"


def cases() -> Iterator[Case]:
    """Every way of merging with every dtype, and every size, mixture and layout with some way."""
    weights, densities = [0.5, 0.3, -0.4], [0.5, 0.1, 1.0]
    usual: dict[str, Any] = {"weight": weights, "density": densities, "seed": 7}
    ways: list[dict[str, Any]] = [
        {},
        {"normalize": True},
        {"rescale": False, "lambda": 0.7},
        {"sampling": "magnitude"},
        {"sampling": "magnitude", "rescale": False, "normalize": True},
        {"rounding": "stochastic"},
        {"sampling": "magnitude", "rounding": "stochastic", "normalize": True, "lambda": -1.5},
    ]
    sizes = (0, 1, 3, 5, BLOCK - 1, BLOCK, BLOCK + 1, 32769, CHUNK - 1, CHUNK, 2 * CHUNK + 4099)
    drawn = {"sampling": "magnitude", "rounding": "stochastic", "normalize": True}
    for method in METHODS:
        for dtype in NAMES:
            for way in ways:
                yield Case(method, (dtype,) * 4, 70_001, "plain", usual | way)
            yield Case(method, (dtype,) * 4, 20_003, "special", usual | {"normalize": True})
            yield Case(method, (dtype,) * 4, 20_003, "special", usual | {"lambda": 0.0})
            yield Case(method, (dtype,) * 4, 20_003, "special", usual | drawn)
        for elements in sizes:
            for way in ({}, drawn):
                yield Case(method, ("bf16",) * 4, elements, "plain", usual | way)
        for mixture in (
            ("fp16", "fp16", "bf16", "fp32"),
            ("bf16", "fp16", "fp64", "bf16"),
            ("fp32", "bf16", "bf16", "fp16"),
            ("fp64", "fp32", "bf16", "fp16"),
        ):
            for way in ({}, drawn):
                yield Case(method, mixture, 40_009, "plain", usual | way)
        for layout in ("strided", "negated"):
            for dtype in ("bf16", "fp16", "fp32"):
                yield Case(method, (dtype,) * 4, 40_000, layout, usual)
        one = {"weight": [0.7], "density": [0.2], "seed": -3}
        yield Case(method, ("bf16",) * 2, 70_001, "plain", one)
        yield Case(method, ("bf16",) * 2, 70_001, "plain", one | {"density": [1.0]})
        yield Case(method, ("bf16",) * 2, 70_001, "plain", one | {"density": [0.0]})
        eight = {
            "weight": [0.1 * k - 0.2 for k in range(8)],
            "density": [0.02 * 2**k for k in range(6)],
        }
        eight["density"] += [1e-9, 0.0]
        for way in ({}, drawn, {"normalize": True, "lambda": 1e-30}):
            yield Case(method, ("bf16",) * 9, 70_001, "plain", eight | {"seed": 2**70} | way)


def numbers(key: int, count: int) -> Any:
    """Nearly normal numbers, exact in float64: sums of the 16-bit lanes of SplitMix64."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    lanes = z.view(np.uint16).reshape(-1, 4).astype(np.int64)
    return (lanes.sum(1) - 131_070) / 2.0**15


def tensors(case: Case) -> list[Tensor]:
    """The base and the fine-tuned models; a tenth of the deltas are zero."""
    base = numbers(1, case.elements) * 2.0**-5
    made = [torch.tensor(base).to(NAMES[case.dtypes[0]])]
    for k, dtype in enumerate(case.dtypes[1:]):
        delta = numbers(100 + k, case.elements) * 2.0 ** -(7 + k % 3)
        delta[numbers(200 + k, case.elements) > 0.7] = 0
        made.append((made[0].double() + torch.tensor(delta)).to(NAMES[dtype]))
    if case.layout == "strided":
        made = [tensor.view(200, -1).t() for tensor in made]
        made[0] = made[0].contiguous()
    elif case.layout == "negated":
        made = [torch._neg_view(-tensor) for tensor in made]
    elif case.layout == "special":
        _make_special(*made)
    return made


def _make_special(base: Tensor, *tuned: Tensor) -> None:
    tiny = torch.finfo(base.dtype).smallest_normal
    base[::97], base[1::97] = -0.0, 0.0
    of_size = len(base[2:2000:7])
    from_minus_1_to_1 = torch.arange(of_size).double() / 2**7 - 1
    base[2:2000:7] = (from_minus_1_to_1 * tiny).to(base.dtype)
    tuned[1][2:2000:7] = base[2:2000:7].flip(0)
    opposite = 2 * base.double() - tuned[0].double()
    tuned[1][3::5] = opposite.to(base.dtype)[3::5]
    for tensor in (base, *tuned):
        tensor[5000:5040], tensor[5040:5050] = -math.inf, math.inf


def digest(case: Case) -> str:
    """Merge, and return the hash of dtype, shape and bytes."""
    inputs = tensors(case)
    with torch.no_grad():
        merged = merge_tensors(
            inputs, case.method, base_index=0, parameters=case.parameters, name="w"
        )
    found = hashlib.blake2b(f"{merged.dtype} {tuple(merged.shape)}".encode(), digest_size=8)
    found.update(merged.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


STORED_HASHES: dict[str, str] = json.loads(STORED.read_text()) if STORED.exists() else {}


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
@pytest.mark.usefixtures("small_pieces")
def test_the_bytes_of_0_1_0(case: Case, engine: str) -> None:
    before = torch.get_num_threads()
    for count in (1, 2, 7) if engine == "loops" else (2,):
        torch.set_num_threads(count)
        try:
            assert digest(case) == STORED_HASHES[case.name], count
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("case", [c for c in cases() if c.elements > CHUNK], ids=lambda c: c.name)
@pytest.mark.usefixtures("engine")
def test_the_bytes_of_0_1_0_in_usual_pieces(case: Case) -> None:
    assert digest(case) == STORED_HASHES[case.name]


if __name__ == "__main__":
    STORED.write_text(json.dumps({case.name: digest(case) for case in cases()}, indent=0) + "\n")

"""One warning for each model whose deltas turn out to be too large for DARE during a merge.

``mergekit-dare inspect`` measures every delta before a merge; this watch looks at blocks of the
tensors that are merged anyway, so that nobody has to learn it from a broken model. mergekit does
not tell a merge method when a merge ends, so the warnings are logged when the process ends: what
stands out is known only then, and the last lines of a long log are the ones that are read.
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dare.diagnostics.deltas.verdict import LARGE, LARGE_SHARE
from mergekit_dare.kernel import threads
from mergekit_dare.kernel.merging import FineTuned

LOG = logging.getLogger("mergekit_dare")

# Elements that are looked at in each tensor: this many blocks, evenly spaced, of this length, or
# all of it.
BLOCKS, BLOCK = 64, 128
# Tensors under LARGE_TENSOR hold few of a model's deltas, and looking at one takes a good part of
# the time of merging it. They are looked at until a larger one comes: the first FEW, and one in
# EVERY of the others. Those under SMALLEST are left out.
LARGE_TENSOR = 1 << 19
SMALLEST = 1 << 10
FEW, EVERY = 64, 8
# Fine-tuning moves a model by a few percent of its norm.
TOO_LARGE_NORM = 0.5


@dataclass
class Seen:
    """What was seen of one model.

    Attributes:
        elements: Number of deltas in the tensors that were looked at.
        large: Estimated number of them above ``LARGE``.
        square_sum: Estimated sum of their squares.
        base_square_sum: The same of the base's elements.
        worst_tensor: The tensor with the largest share of large deltas or, if none has any, with
            the largest norm.
        worst: That tensor's share and norm.

    """

    elements: int = 0
    large: float = 0.0
    square_sum: float = 0.0
    base_square_sum: float = 0.0
    worst_tensor: str = ""
    worst: tuple[float, float] = (0.0, 0.0)


class RangeWatch:
    """Collects what is seen of each model; may be used by several threads."""

    def __init__(self) -> None:
        self._seen: dict[str, Seen] = {}
        self._small = 0  # tensors under LARGE_TENSOR so far
        self._has_large = False
        self._lock = threading.Lock()

    def look(self, base: Tensor, models: Sequence[FineTuned], tensor_name: str) -> None:
        """Look at some of one tensor's deltas.

        Args:
            base: theta_0: any shape and floating-point dtype.
            models: Those with density 1 or weight 0 are passed over: nothing of them is dropped.
            tensor_name: The output tensor's name.

        """
        dropped = [model for model in models if model.density < 1 and model.weight != 0]
        if not dropped or not self._is_due(base.numel()):
            return
        with torch.inference_mode(), threads.single():
            blocks = torch.stack([_blocks(base), *(_blocks(model.tensor) for model in dropped)])
            theta_0, *_ = blocks = blocks.float().flatten(1)
            blocks[1:] -= theta_0
            magnitudes = blocks.abs_()
            norms = torch.linalg.vector_norm(magnitudes, dim=1)
            large = magnitudes.gt_(LARGE).sum(
                1
            )  # in place: with a bool tensor, it takes five times as long
            (_, *large_counts), (base_norm, *delta_norms) = torch.stack([large, norms]).tolist()
        size = blocks.shape[1]
        scale = base.numel() / size
        with self._lock:
            for model, count, norm in zip(dropped, large_counts, delta_norms, strict=True):
                seen = self._seen.setdefault(model.name, Seen())
                seen.elements += base.numel()
                seen.large += count * scale
                seen.square_sum += norm**2 * scale
                seen.base_square_sum += base_norm**2 * scale
                found = (count / size, norm)
                if found > seen.worst:
                    seen.worst_tensor, seen.worst = tensor_name, found

    def _is_due(self, elements: int) -> bool:
        """Tell whether a tensor of that size is looked at."""
        if elements >= LARGE_TENSOR:
            self._has_large = True
            return True
        if elements < SMALLEST or self._has_large:
            return False
        with self._lock:
            self._small += 1
            return self._small <= FEW or self._small % EVERY == 0

    def warnings(self) -> list[str]:
        """Return one sentence for each model that left the range, and forget everything."""
        with self._lock:
            sentences = [
                f"model {name}: {problem}{_where(seen)}; inspect it with: "
                "mergekit-dare inspect CONFIG"
                for name, seen in self._seen.items()
                if (problem := _problem(seen)) is not None
            ]
            self._seen.clear()
            self._small, self._has_large = 0, False
        return sentences

    def report(self) -> None:
        """Log the warnings."""
        for sentence in self.warnings():
            LOG.warning("%s", sentence)


def _blocks(tensor: Tensor) -> Tensor:
    """Return evenly spaced blocks of a tensor in row order, shape (blocks, length)."""
    vector = tensor.detach().reshape(-1).contiguous()
    if vector.numel() < BLOCKS * BLOCK:
        return vector.unsqueeze(0)
    stride = vector.numel() // BLOCKS
    return vector.as_strided((BLOCKS, BLOCK), (stride, 1))


def _problem(seen: Seen) -> str | None:
    if seen.square_sum > TOO_LARGE_NORM**2 * seen.base_square_sum:
        norm = math.sqrt(seen.square_sum / seen.base_square_sum) if seen.base_square_sum else 1.0
        what = f"the norm of its deltas is {norm:.0%} of the base model's"
    elif (share := seen.large / seen.elements) > LARGE_SHARE:
        what = f"about {share:.1%} of its deltas are above {LARGE}"
    else:
        return None
    return (
        f"{what}, too large for DARE, or its base model is a different one "
        "(arXiv 2311.03099, section 4.5)"
    )


def _where(seen: Seen) -> str:
    """Name the worst tensor; it may have no name in merges by mergekit's functions for Python."""
    return f", most of all in tensor {seen.worst_tensor}" if seen.worst_tensor else ""


WATCH = RangeWatch()
atexit.register(WATCH.report)

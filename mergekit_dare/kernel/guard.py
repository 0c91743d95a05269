"""Trust what merges chunks in another way only after it gave the same bits.

Compiled code and recordings come out of parts of torch that change from release to release; their
first results are compared with those of :func:`mergekit_dare.kernel.formula.merge_chunk` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mergekit_dare.kernel import formula, threads
from mergekit_dare.kernel.buffers import Buffers
from mergekit_dare.kernel.formula import Numbers, Steps

# Merges a chunk of the result, theta_0 and each theta_k, and returns what formula.merge_chunk does,
# as a number; None if it cannot.
MergeChunk = Callable[[Sequence[Tensor], Numbers], float | None]


def gives_the_same(
    code: MergeChunk,
    vectors: Sequence[Tensor],
    numbers: Numbers,
    steps: Steps,
    sizes: Iterable[int],
) -> bool | None:
    """Compare what a function merges with what the formula does.

    Args:
        code: The function.
        vectors: theta_0 and each theta_k, of one chunk.
        numbers: Those of the chunk.
        steps: What is done.
        sizes: How many elements of the chunk, from its begin, the function shall merge.

    Returns:
        Whether all bits are equal; None if nothing can be told of it, as the result is not finite.

    """
    theta_0, *thetas = vectors
    with threads.single():
        out, expected = torch.empty_like(theta_0), torch.empty_like(theta_0)
        with Buffers.lent(theta_0.device, steps.dtype) as b:
            part = b.first(theta_0.numel())
            norm = formula.merge_chunk(expected, theta_0, thetas, numbers, steps, part)
        if not norm.isfinite():
            return None
        for elements in sizes:
            code([vector[:elements] for vector in (out.zero_(), *vectors)], numbers)
            if not torch.equal(*(v[:elements].view(torch.int8) for v in (out, expected))):
                return False
    return True


def reason_of(error: Exception) -> str:
    """Return the first line of what an error says, for the log."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]

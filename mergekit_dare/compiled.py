"""The formula compiled by torch for CPUs, for those who ask: ``MERGEKIT_DARE_COMPILE=1``.

:func:`mergekit_dare.formula.merge_chunk` itself is what is compiled, once for each combination of
dtypes, number of models and steps. The result is the same to the bit, in a third of the time; a
compilation takes seconds, and needs a C++ compiler. Where it fails, one line in the log says so,
and the formula runs as without it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from mergekit_dare.buffers import Buffers, chunks
from mergekit_dare.formula import Numbers, Steps, merge_chunk
from mergekit_dare.masks import state_before

SWITCH = "MERGEKIT_DARE_COMPILE"
# Elements in a chunk, which are compiled in. Compiled code keeps but the masks of a chunk in
# memory, 2 bytes for each element and model: these limits hold them to 32 MiB.
CHUNK, MOST_MODELS = 1 << 20, 16

LOG = logging.getLogger(__name__)


def is_switched_on() -> bool:
    """Tell whether the environment variable ``MERGEKIT_DARE_COMPILE`` asks for compiled code."""
    return os.environ.get(SWITCH, "").strip().lower() in ("1", "true", "yes", "on")


def merge_chunks(
    out: Tensor,
    theta_0: Tensor,
    thetas: Sequence[Tensor],
    keys: Sequence[int],
    numbers: Numbers,
    steps: Steps,
    dtype: torch.dtype,
) -> tuple[int, Tensor]:
    """Merge as many elements as are to be merged by compiled code, from the first one on.

    Args:
        out: Shape (elements,): the merged elements are written.
        theta_0: The base model: shape and dtype of ``out``.
        thetas: The fine-tuned models, one or more, of this shape.
        keys: The keys of their masks.
        numbers: Their numbers, without states.
        steps: What is done.
        dtype: The dtype of the arithmetic.

    Returns:
        How many elements were merged, and the largest chunk's sum of squares before rounding.

    """
    merged, largest = 0, torch.zeros((), dtype=dtype, device=out.device)
    whole = out.numel() // CHUNK * CHUNK
    # On accelerators, torch's compiler fuses roundings that must stay apart.
    suits = out.device.type == "cpu" and len(thetas) <= MOST_MODELS and not steps.equal_infinities
    if whole == 0 or not suits or not is_switched_on():
        return merged, largest
    case = (steps, dtype, out.dtype, *(theta.dtype for theta in thetas))
    numbers = _tensors(numbers)
    vectors = [vector[:whole] for vector in (out, theta_0, *thetas)]
    for start, (out_chunk, base_chunk, *theta_chunks) in chunks(CHUNK, *vectors):
        states = torch.tensor([state_before(key, start) for key in keys], dtype=torch.int64)
        with_states = numbers._replace(states=states)
        square_sum = _try(case, out_chunk, base_chunk, theta_chunks, with_states, steps, dtype)
        if square_sum is None:
            break
        torch.maximum(largest, square_sum, out=largest)
        merged += CHUNK
    return merged, largest


def _tensors(numbers: Numbers) -> Numbers:
    """Return the numbers as tensors: Python numbers would be compiled in."""
    return numbers._replace(
        thresholds=torch.tensor(numbers.thresholds, dtype=torch.int64),
        factors=torch.tensor(numbers.factors, dtype=torch.float64),
        weights=torch.tensor(numbers.weights, dtype=torch.float64),
        lambda_=torch.tensor(numbers.lambda_, dtype=torch.float64),
    )


# What is called for each case; None where it failed.
_COMPILED: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}


def _try(case: tuple[Any, ...], *arguments: Any) -> Tensor | None:
    """Merge a chunk with the compiled code of a case, or return ``None`` if there is none."""
    if case not in _COMPILED:
        _COMPILED[case] = _compile()
    function = _COMPILED[case]
    if function is None:
        return None
    try:
        return function(*arguments)
    except Exception as error:  # whatever the compiler does, the merge must go on
        if None not in _COMPILED.values():
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            LOG.warning("%s: merging without compiled code: %s", SWITCH, reason)
        _COMPILED[case] = None
        return None


def _compile() -> Callable[..., Tensor]:
    """Return a function that is compiled when it is first called.

    torch compiles the same code no more than eight times, so each case gets its own copy of it.
    """
    # Said of float16 models, for their masks are bfloat16, which does no harm.
    warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed in the scheduler node")
    code = _merge_chunk.__code__.replace()
    function = FunctionType(code, _merge_chunk.__globals__)
    compiled: Callable[..., Tensor] = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled


def _merge_chunk(
    out: Tensor,
    theta_0: Tensor,
    thetas: Sequence[Tensor],
    numbers: Numbers,
    steps: Steps,
    dtype: torch.dtype,
) -> Tensor:
    """With buffers that the compiler sees come and go, so that it need not fill them."""
    b = Buffers.allocate(out.numel(), out.device, dtype)
    return merge_chunk(out, theta_0, thetas, numbers, steps, b)

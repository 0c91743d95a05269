"""The formula compiled by torch for CPUs, for those who ask: ``MERGEKIT_DARE_COMPILE=1``.

:func:`mergekit_dare.kernel.formula.merge_chunk` itself is what is compiled, once for each
combination of dtypes, number of models and steps. The result is the same to the bit, in a third of
the time; a compilation takes seconds, and needs a C++ compiler. The first chunk of each is compared
with what comes out without it. Where it fails, one line in the log says so, and the formula runs as
without.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from mergekit_dare.kernel import formula
from mergekit_dare.kernel.buffers import Buffers, chunks
from mergekit_dare.kernel.formula import Numbers, Steps
from mergekit_dare.kernel.masks import state_before

SWITCH = "MERGEKIT_DARE_COMPILE"
# Elements in a chunk, which are compiled in. Compiled code keeps but the masks of a chunk in
# memory, 2 bytes for each element and model: these limits hold them to 16 MiB.
CHUNK, MOST_MODELS = 1 << 20, 8

# The oldest that this is tested with. The compiler of torch 2.4 makes the whole process flush
# subnormal numbers to zero (PyTorch issue 135758).
OLDEST_TORCH = (2, 13)

LOG = logging.getLogger(__name__)


def is_switched_on() -> bool:
    """Tell whether the environment variable ``MERGEKIT_DARE_COMPILE`` asks for compiled code."""
    return os.environ.get(SWITCH, "").strip().lower() in ("1", "true", "yes", "on")


def is_torch_too_old() -> bool:
    """Tell whether this torch is older than what compiled code is tested with."""
    return tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH


def merge_function(
    out: Tensor,
    vectors: Sequence[Tensor],
    steps: Steps,
) -> Callable[[Sequence[Tensor], Numbers], Tensor | None] | None:
    """Return what merges a chunk of :data:`CHUNK` elements by compiled code, if that can be.

    Args:
        out: The merged vector.
        vectors: theta_0, and each theta_k.
        steps: What is done.

    Returns:
        A function of a chunk of ``out`` and ``vectors`` and its numbers, which returns what
        :func:`.formula.merge_chunk` does, or ``None`` where it cannot merge. ``None`` instead if
        compiled code is not asked for, or does not suit the case.

    """
    # On accelerators, torch's compiler fuses roundings that must stay apart.
    suits = out.device.type == "cpu" and len(vectors) <= MOST_MODELS + 1
    if out.numel() < CHUNK or not suits or steps.equal_infinities or not is_switched_on():
        return None
    case = (steps, out.dtype, *(v.dtype for v in vectors), torch.get_num_threads())
    if is_torch_too_old():
        _give_up(case, f"it needs torch {'.'.join(map(str, OLDEST_TORCH))} or later")
        return None

    def merge_one(chunk: Sequence[Tensor], numbers: Numbers) -> Tensor | None:
        out_chunk, theta_0, *thetas = chunk
        norm = _try(case, out_chunk, theta_0, thetas, _tensors(numbers), steps)
        if norm is None or case in _CHECKED or not norm.isfinite():
            return norm
        _CHECKED.add(case)
        expected = torch.empty_like(out_chunk)
        with Buffers.lent(out.device, steps.dtype) as b:
            for first, (out_, base, *tuned) in chunks(b.capacity, expected, theta_0, *thetas):
                states = [state_before(state, first) for state in numbers.states]
                of_part = numbers._replace(states=states)
                formula.merge_chunk(out_, base, tuned, of_part, steps, b.first(out_.numel()))
        if not torch.equal(expected.view(torch.int8), out_chunk.view(torch.int8)):
            _give_up(case, "it gives other results here, which is an error of the compiler")
            return None
        return norm

    return merge_one


def _tensors(numbers: Numbers) -> Numbers:
    """Return the numbers as tensors: Python numbers would be compiled in."""
    # Of the CPU, whatever the default device of the program is.
    integers = partial(torch.tensor, dtype=torch.int64, device="cpu")
    floats = partial(torch.tensor, dtype=torch.float64, device="cpu")
    return Numbers(
        states=integers(numbers.states),
        thresholds=integers(numbers.thresholds),
        scales=floats(numbers.scales),
        factors=floats(numbers.factors),
        weights=floats(numbers.weights),
        lambda_=floats(numbers.lambda_),
    )


# What is called for each case; None where it failed.
_COMPILED: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}
# Cases of which a chunk was compared with the one that comes out without compiled code.
_CHECKED: set[tuple[Any, ...]] = set()


def _try(case: tuple[Any, ...], *arguments: Any) -> Tensor | None:
    """Merge a chunk with the compiled code of a case, or return ``None`` if there is none."""
    try:
        if case not in _COMPILED:
            _COMPILED[case] = _compile()
        function = _COMPILED[case]
        return None if function is None else function(*arguments)
    except Exception as error:  # whatever the compiler does, the merge must go on
        _give_up(case, f"{type(error).__name__}: {error}".strip().splitlines()[0])
        return None


def _give_up(case: tuple[Any, ...], reason: str) -> None:
    if None not in _COMPILED.values():
        LOG.warning("%s: merging without compiled code: %s", SWITCH, reason)
    _COMPILED[case] = None


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
) -> Tensor:
    """With buffers that the compiler sees come and go, so that it need not fill them."""
    b = Buffers.allocate(out.numel(), out.device, steps.dtype)
    return formula.merge_chunk(out, theta_0, thetas, numbers, steps, b)

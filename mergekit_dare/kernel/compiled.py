"""The formula as compiled code, where the user's cache has a package of it for the case.

The result is the same to the bit in about half of the time. It is
:func:`mergekit_dare.kernel.formula.merge_chunk` itself that torch compiles ahead of time
(:mod:`.building`); a package is used unasked, and takes milliseconds to load. The first chunk of
each case is compared with what comes out without it. Where anything fails, one line in the log says
so, and the formula runs as without. ``MERGEKIT_DARE_COMPILE=0`` leaves all packages alone, and
``=1`` makes those that are missing.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mergekit_dare.kernel import building, formula, native, packages, threads
from mergekit_dare.kernel.buffers import CPU_CHUNK, Buffers
from mergekit_dare.kernel.formula import Numbers, Steps
from mergekit_dare.kernel.packages import Case, NoPackageError

SWITCH = "MERGEKIT_DARE_COMPILE"
# Compiled code keeps but the masks of a chunk in memory, 2 bytes for each element and model.
MOST_MODELS = 8

# The oldest that this is tested with. The compiler of torch 2.4 makes the whole process flush
# subnormal numbers to zero (PyTorch issue 135758).
OLDEST_TORCH = (2, 13)

# Merges a chunk of CPU_CHUNK elements, of the result, theta_0 and each theta_k, and returns what
# formula.merge_chunk does; None if it cannot.
MergeChunk = Callable[[Sequence[Tensor], Numbers], Tensor | None]

LOG = logging.getLogger(__name__)

# What runs a case's package; None where there is none that can be used.
_LOADED: dict[Case, native.Code | None] = {}
_LOCK = threading.Lock()
_WARNED = threading.Event()  # one line in a process


def _forget() -> None:
    """Start anew in a forked child: another thread may have been at work, which is not there."""
    global _LOCK
    _LOCK = threading.Lock()
    _LOADED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def is_switched_on() -> bool:
    """Tell whether the environment asks that missing packages be made."""
    return _switch() in ("1", "true", "yes", "on")


def is_switched_off() -> bool:
    """Tell whether the environment asks that no package be used."""
    return _switch() in ("0", "false", "no", "off")


def _switch() -> str:
    return os.environ.get(SWITCH, "").strip().lower()


def why_not_here() -> str:
    """Return why compiled code is for no merge with this torch on this system, else nothing."""
    if sys.platform != "linux":
        return "it is for Linux"
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"it needs torch {'.'.join(map(str, OLDEST_TORCH))} or later"
    return ""


def suits(vectors: Sequence[Tensor], steps: Steps) -> bool:
    """Tell whether compiled code is for a merge of theta_0 and each theta_k.

    On accelerators, torch's compiler fuses roundings that must stay apart.
    """
    theta_0 = vectors[0]
    return (
        theta_0.numel() >= CPU_CHUNK
        and theta_0.device.type == "cpu"
        and 2 <= len(vectors) <= MOST_MODELS + 1
        and not steps.equal_infinities
    )


def merge_function(
    vectors: Sequence[Tensor], steps: Steps, numbers: Callable[[int], Numbers]
) -> MergeChunk | None:
    """Return what merges the chunks of a tensor by compiled code, if there is any.

    Args:
        vectors: theta_0, and each theta_k.
        steps: What is done.
        numbers: Returns the formula's numbers of the chunk that begins with an element.

    """
    if not suits(vectors, steps) or is_switched_off():
        return None
    case = Case.of(vectors, steps)
    code = _code(case, [vector[:CPU_CHUNK] for vector in vectors], numbers)
    return None if code is None else partial(_merge_chunk, case, code)


def _code(
    case: Case, first: Sequence[Tensor], numbers: Callable[[int], Numbers]
) -> native.Code | None:
    """Return what runs a case's package, which is loaded and tried once in a process."""
    with _LOCK:
        if case not in _LOADED:
            try:
                code = _load(case)
                if not _may_be_tried(case, code, first, numbers(0)):
                    return None
                _LOADED[case] = code
            except Exception as error:  # whatever it is, the merge must go on
                _give_up(case, error)
        return _LOADED[case]


def _load(case: Case) -> native.Code:
    """Load a case's package; make it before that if it is missing, and asked for."""
    if reason := why_not_here():
        raise NoPackageError(reason if is_switched_on() else "")
    try:
        package = packages.read(case)
    except NoPackageError:
        if not is_switched_on():
            raise
        LOG.warning("compiling %s for this machine: once, half a minute or so", case)
        building.build([case])
        package = packages.read(case)
    return native.load(package, case.steps.dtype)


def _may_be_tried(case: Case, code: native.Code, first: Sequence[Tensor], numbers: Numbers) -> bool:
    """Compare the first chunk with what comes out without compiled code.

    Returns:
        False if nothing can be told of it, as the result is not finite.

    Raises:
        NoPackageError: it differs.

    """
    theta_0, *thetas = first
    out, expected = torch.empty_like(theta_0), torch.empty_like(theta_0)
    with threads.single(), Buffers.lent(theta_0.device, case.steps.dtype) as b:
        norm = formula.merge_chunk(expected, theta_0, thetas, numbers, case.steps, b)
    if not norm.isfinite():
        return False
    code([out, *first, *_tensors(numbers)])
    if not torch.equal(expected.view(torch.int8), out.view(torch.int8)):
        raise NoPackageError("it gives other results here, which is an error of the compiler")
    return True


def _merge_chunk(
    case: Case, code: native.Code, chunk: Sequence[Tensor], numbers: Numbers
) -> Tensor | None:
    if _LOADED.get(case) is None:  # it has failed meanwhile
        return None
    try:
        norm = code([*chunk, *_tensors(numbers)])
    except Exception as error:  # whatever it is, the merge must go on
        _give_up(case, error)
        return None
    return torch.tensor(norm, dtype=case.steps.dtype, device="cpu")


def _give_up(case: Case, error: Exception) -> None:
    """Merge without compiled code from now on; say why, if there is more to say than "missing"."""
    reason = str(error)
    if not isinstance(error, NoPackageError):
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if reason and not _WARNED.is_set():
        LOG.warning("merging without compiled code: %s", reason)
        _WARNED.set()
    _LOADED[case] = None


def _tensors(numbers: Numbers) -> list[Tensor]:
    """Return the numbers as tensors: Python numbers would be compiled in."""
    # Of the CPU, whatever the default device of the program is.
    dtypes = (torch.int64,) * 2 + (torch.float64,) * 4
    return [torch.tensor(n, dtype=d, device="cpu") for n, d in zip(numbers, dtypes, strict=True)]

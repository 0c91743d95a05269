"""The formula as compiled code, where the user's cache has a package of it for the case.

The result is the same to the bit in about half of the time. It is
:func:`mergekit_dare.kernel.formula.merge_chunk` itself that torch compiles ahead of time
(:mod:`.building`); a package is used unasked, and takes milliseconds to load. The first chunk of
each case, and each larger one, is compared with what comes out without it. Where anything fails,
one line in the log says so, and the formula runs as without. ``MERGEKIT_DARE_COMPILE=0`` leaves all
packages alone, and ``=1`` makes those that are missing.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mergekit_dare.kernel import building, guard, native, packages
from mergekit_dare.kernel.buffers import CPU_CHUNK
from mergekit_dare.kernel.formula import Numbers, Steps
from mergekit_dare.kernel.guard import MergeChunk
from mergekit_dare.kernel.masks import LANES_PER_WORD
from mergekit_dare.kernel.packages import Case, NoPackageError
from mergekit_dare.kernel.per_process import PerProcess

SWITCH = "MERGEKIT_DARE_COMPILE"
# Compiled code keeps but the masks of a chunk in memory, 2 bytes for each element and model.
MOST_MODELS = 8

# The oldest that this is tested with. The compiler of torch 2.4 makes the whole process flush
# subnormal numbers to zero (PyTorch issue 135758).
OLDEST_TORCH = (2, 13)

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class _Package:
    """The package of a case, in this process.

    Attributes:
        code: What runs it; None where there is none that can be used.
        compared: Elements of the largest chunk that was compared with what comes out without it.

    """

    code: native.Code | None
    compared: int = 0


# By the case, and whether the package was to be made if it was missing.
_LOADED: PerProcess[tuple[Case, bool], _Package] = PerProcess()
_WARNED = threading.Event()  # one line in a process


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
    return (
        vectors[0].device.type == "cpu"
        and 2 <= len(vectors) <= MOST_MODELS + 1
        and not steps.equal_infinities
    )


def is_worth_making(elements: int) -> bool:
    """Tell whether a package is made for a tensor; one that is there is for any."""
    return elements >= CPU_CHUNK


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
    package = _package(Case.of(vectors, steps), vectors, numbers)
    return None if package is None else partial(_merge_chunk, package)


def _package(
    case: Case, vectors: Sequence[Tensor], numbers: Callable[[int], Numbers]
) -> _Package | None:
    """Return a case's package, which is loaded once in a process, if this tensor can have it."""
    elements = min(vectors[0].numel(), CPU_CHUNK)
    if not building.takes(elements):
        return None
    make = is_worth_making(elements) and is_switched_on()
    with _LOADED.lock:
        package = _LOADED.get((case, make))
        try:
            if package is None:
                package = _LOADED[case, make] = _Package(_load(case, make))
            if package.code is not None and elements > package.compared:
                first = [vector[:elements] for vector in vectors]
                if not _may_be_tried(case, package.code, first, numbers(0)):
                    return None
                package.compared = elements
        except Exception as error:  # whatever it is, the merge must go on
            package = _LOADED.setdefault((case, make), _Package(None))
            _give_up(package, error)
    return package if package.code is not None else None


def _load(case: Case, make: bool) -> native.Code:
    """Load a case's package; if asked to, make it before that where it is missing."""
    if reason := why_not_here():
        raise NoPackageError(reason if make else "")
    try:
        package = packages.read(case)
    except NoPackageError:
        if not make:
            raise
        LOG.warning("compiling %s for this machine: once, half a minute or so", case)
        building.build([case])
        package = packages.read(case)
    return native.load(package, case.steps.dtype)


def _may_be_tried(case: Case, code: native.Code, chunk: Sequence[Tensor], numbers: Numbers) -> bool:
    """Compare a chunk with what comes out without compiled code.

    Returns:
        False if nothing can be told of it, as the result is not finite.

    Raises:
        NoPackageError: it differs.

    """
    # Loops over vectors have another end if there is a rest.
    elements = chunk[0].numel()
    sizes = filter(building.takes, (elements, elements - 3 * LANES_PER_WORD))
    same = guard.gives_the_same(code, chunk, numbers, case.steps, sizes)
    if same is False:
        raise NoPackageError("it gives other results here, which is an error of the compiler")
    return same is not None


def _merge_chunk(package: _Package, chunk: Sequence[Tensor], numbers: Numbers) -> float | None:
    code = package.code
    # It may have failed meanwhile; and the last chunk of a tensor has any size.
    if code is None or not building.takes(chunk[0].numel()):
        return None
    try:
        return code(chunk, numbers)
    except Exception as error:  # whatever it is, the merge must go on
        _give_up(package, error)
        return None


def _give_up(package: _Package, error: Exception) -> None:
    """Merge without compiled code from now on; say why, if there is more to say than "missing"."""
    reason = str(error) if isinstance(error, NoPackageError) else guard.reason_of(error)
    if reason and not _WARNED.is_set():
        LOG.warning("merging without compiled code: %s", reason)
        _WARNED.set()
    package.code = None

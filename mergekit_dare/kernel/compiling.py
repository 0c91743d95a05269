"""How Numba compiles :mod:`mergekit_dare.kernel.loops`, and where it keeps compiled code."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

try:
    import numba

    is_switched_off = numba.config.DISABLE_JIT
except Exception as error:  # an ImportError, too, where Numba does not fit numpy
    remedy = "pip install --upgrade numba, or the numpy that it requires"
    raise ImportError(f"{str(error).rstrip('.')}; {remedy}") from error
if is_switched_off:  # loops that are not compiled take thousands of times as long
    raise ImportError("NUMBA_DISABLE_JIT is set; unset it in the environment")

LOG = logging.getLogger(__name__)

# Held while something is compiled. A fork waits for it: in the child, nothing would release Numba's
# own lock.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release
    )

_OPTIONS = {"nogil": True, "error_model": "numpy"}  # a division by 0 does not raise


# For functions that compiled ones call; the latter become part of their caller, since a call with
# several arrays takes 20 ns.
loop = numba.njit(**_OPTIONS)
inlined = numba.njit(inline="always", **_OPTIONS)


def entry(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, once for all processes of a user."""
    if cache_folder() is None:
        return loop(function)
    before = numba.config.CACHE_DIR
    # Otherwise Numba would keep it beside the source, where ``pip uninstall`` leaves it behind.
    numba.config.CACHE_DIR = str(cache_folder())
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    finally:
        numba.config.CACHE_DIR = before


@cache
def cache_folder() -> Path | None:
    """Return the folder in which compiled code is kept, or None if none can be written to.

    It is in NUMBA_CACHE_DIR, if that is set, else among the user's caches. Its name is a hash of
    everything that decides what is compiled, as Numba itself checks only one file's date: the
    content of this file, of the loops and of their numbers, and Numba's settings.
    """
    sources = [Path(__file__).with_name(f"{n}.py") for n in ("compiling", "loops", "numbers")]
    settings = {name: value for name, value in os.environ.items() if name.startswith("NUMBA_")}
    for unrelated in ("NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS"):
        settings.pop(unrelated, None)
    decides = [
        *(source.read_text(encoding="utf-8") for source in sources),
        sorted(settings.items()),
    ]
    content = hashlib.sha256(repr([numba.__version__, *decides]).encode()).hexdigest()[:12]
    try:
        folder = Path(numba.config.CACHE_DIR or _caches() / "mergekit-dare") / content
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # the latter if the user's home is unknown
        warn_of_no_cache(error)
        return None
    return folder


def warn_of_no_cache(error: Exception) -> None:
    """Say why compiled code cannot be kept, and what to do about it."""
    LOG.warning(
        "Numba compiles again in each process, which takes some seconds, unless NUMBA_CACHE_DIR "
        "is set to a folder that can be written to: %s",
        error,
    )


def _caches() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"


def clear_cache(*entries: Any) -> bool:
    """Remove the compiled code of functions, which may be damaged; tell whether there was any."""
    if cache_folder() is None:
        return False
    files = [file for one in entries for file in Path(one.stats.cache_path).glob("*.nb?")]
    for file in files:
        file.unlink(missing_ok=True)
    return bool(files)


@contextmanager
def announced(seconds: float = 1.0) -> Iterator[None]:
    """Log what is being done, if this block takes longer than that."""
    often = "" if cache_folder() is None else ", once on this machine"
    said = f"Numba is compiling the merge loops, which takes some seconds{often}"
    timer = threading.Timer(seconds, LOG.warning, (said,))
    timer.daemon = True
    with suppress(RuntimeError):  # no thread can be started
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if timer.ident is not None:  # it was started
            timer.join()

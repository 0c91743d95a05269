"""Running work in several threads, which wait for one another only at the end.

Each thread takes one piece after the other from a common supply. Work on a piece must not hold the
interpreter's lock, and its result must not depend on which thread does it. The threads end with the
work: nothing is left running, and a process may fork between merges.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def run(work: Callable[[T], R], pieces: Iterable[T], most: int) -> list[R]:
    """Call ``work`` with each piece, in this thread and as many others as are useful.

    Args:
        work: Takes a piece; it runs in several threads at once.
        pieces: What is to be done.
        most: The greatest number of threads; never more than torch has (``torch.set_num_threads``,
            mergekit's ``-j``, OMP_NUM_THREADS) or than this process has :func:`cores`.

    Returns:
        What each call returned, in the order of the pieces.

    Raises:
        BaseException: the first that a call raised, or an interruption of this thread; either
            way, no more pieces were handed out, and all threads have ended, unless this thread
            was interrupted again while it waited for them.

    """
    supply = deque(enumerate(pieces))
    others = min(most, len(supply)) - 1
    if others > 0:
        others = min(others, torch.get_num_threads() - 1, cores() - 1)
    if others < 1:
        return [work(piece) for _, piece in supply]
    results: dict[int, R] = {}

    def take() -> None:
        try:
            while supply:
                try:
                    number, piece = supply.popleft()
                except IndexError:  # another took the last one
                    break
                results[number] = work(piece)
        except BaseException:
            supply.clear()
            raise

    with ThreadPoolExecutor(others, "mergekit-dare") as pool:
        try:
            started: list[Future[None]] = []
            with suppress(RuntimeError):  # no thread can be started: work alone
                started += (pool.submit(take) for _ in range(others))
            take()
            for other in started:
                other.result()
        finally:  # this thread may have been interrupted, wherever it was
            supply.clear()
    return [results[number] for number in sorted(results)]


@contextmanager
def single() -> Iterator[None]:
    """Let torch use only one thread in this block.

    For operations that torch would split: a forked child does not have torch's other threads, and
    would wait for them forever.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Return the number of cores that this process may use, by affinity and by cgroup quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        allowed = os.cpu_count() or 1
    quota = _quota()
    return allowed if quota is None else min(allowed, max(1, math.ceil(quota)))


@cache
def _quota(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Return how many cores the smallest quota of this process's cgroups grants, if any."""
    quotas = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        # A container sees its own group as the root, whatever the path says.
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            with suppress(OSError, ValueError, ZeroDivisionError):
                quotas += _quota_of(root / controllers / group)
    return min(quotas, default=None)


def _quota_of(group: Path) -> list[float]:
    """Read a cgroup's quota, of version 2 or 1: microseconds of time in microseconds."""
    files = (
        ["cpu.max"] if (group / "cpu.max").exists() else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    )
    time, period = " ".join((group / file).read_text() for file in files).split()
    return [] if time == "max" or int(time) <= 0 else [int(time) / int(period)]

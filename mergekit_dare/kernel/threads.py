"""Work in several threads that do not wait for one another before the end.

torch splits every single operation among its threads, and all of them wait for the slowest after
each. Where other programs want the cores, too, most of the time is spent in that wait. Here, each
thread takes one piece after the other from a common supply, and does it alone: torch is set to one
thread in it. What is computed must not depend on which thread does what.

The threads end with the work: nothing is left running, and a process may fork between merges.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

# Each has buffers of its own: 60 MB in all. And with more, the interpreter's lock, which each call
# of torch takes for a moment, would become what all wait for.
MOST = 6


def run(worker: Callable[[Iterator[T]], R], items: Iterable[T], most: int = MOST) -> list[R]:
    """Call ``worker`` in as many threads as suit, each with an iterator over the same items.

    Args:
        worker: Takes items until there are no more; each item goes to one call only. It runs in
            inference mode, and with one thread of torch.
        items: Generated one by one, as they are asked for.
        most: At most so many threads, and at most :func:`count`; with one, ``worker`` is called
            here.

    Returns:
        What each call returned, in any order.

    Raises:
        BaseException: the first that a call raised, or an interruption of this thread; either
            way, all threads have ended, for no more items were given out.

    """
    supply = _Supply(items)
    results: list[R] = []
    errors: list[BaseException] = []
    ready = threading.Semaphore(0)

    def work() -> None:
        torch.get_num_threads()  # a thread's first call of torch would undo what is set before
        torch.set_num_threads(1)
        ready.release()
        try:
            with torch.inference_mode():
                results.append(worker(supply))
        except BaseException as error:  # raised by the thread that waits
            supply.end()
            errors.append(error)

    wanted = min(count(), most)
    started: list[threading.Thread] = []
    try:
        with _torch_restored():
            if wanted > 1:
                started = _started(work, wanted)
            for _ in started:
                ready.acquire()
            if not started:
                work()
        for thread in started:
            thread.join()
    finally:
        supply.end()  # this thread may have been interrupted
        for thread in started:
            thread.join()
    if errors:
        raise errors[0]
    return results


@contextmanager
def single() -> Iterator[None]:
    """Let torch do all with one thread in this block."""
    with _torch_restored():
        torch.set_num_threads(1)
        yield


def _started(work: Callable[[], None], wanted: int) -> list[threading.Thread]:
    """Start threads, or as many as the system allows."""
    threads: list[threading.Thread] = []
    try:
        for number in range(wanted):
            thread = threading.Thread(target=work, name=f"mergekit-dare-{number}")
            thread.start()
            threads.append(thread)
    except RuntimeError:  # there is a limit of their number, or the interpreter is about to end
        pass
    return threads


class _Supply(Generic[T]):
    """Gives each item to one of the threads that ask."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items, self._lock = iter(items), threading.Lock()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            return next(self._items)

    def end(self) -> None:
        """Give out no more."""
        with self._lock:
            self._items = iter(())


def count() -> int:
    """Return how many threads suit: as many as torch has, and as there are cores for us.

    torch's number is what ``torch.set_num_threads``, mergekit's ``-j`` and OMP_NUM_THREADS set.
    """
    with _STATE.lock:
        of_torch = _STATE.threads_of_torch if _STATE.users else torch.get_num_threads()
    return max(1, min(of_torch, cores(), MOST))


def cores() -> int:
    """Return the number of cores that this process may use, by affinity and by cgroup's quota."""
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
    """Return how many cores' time the least quota of this process's cgroups grants, if any."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container sees its own group as the root, whatever the path says.
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            quotas.append(_quota_of(root / controllers / group))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    """Read one cgroup's, of version 2 or 1: microseconds of time in microseconds."""
    try:
        if (group / "cpu.max").exists():
            time, period = (group / "cpu.max").read_text().split()
        else:
            time = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return None if time == "max" or int(time) <= 0 else int(time) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


class _State:
    """Which number of threads torch had before threads of ours set it to one.

    torch keeps the number for each thread, but gives a new thread the last one that any was set
    to. So what others start in the moment in which threads of ours start may get one, too.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.threads_of_torch = 1


_STATE = _State()
if hasattr(os, "register_at_fork"):
    # A child has none of its parent's other threads, which might hold the lock.
    os.register_at_fork(after_in_child=lambda: _STATE.__init__())  # type: ignore[misc]


@contextmanager
def _torch_restored() -> Iterator[None]:
    """Set torch's number of threads back at the end, also if such blocks overlap."""
    with _STATE.lock:
        if _STATE.users == 0:
            _STATE.threads_of_torch = torch.get_num_threads()
        _STATE.users += 1
    try:
        yield
    finally:
        with _STATE.lock:
            _STATE.users -= 1
            torch.set_num_threads(_STATE.threads_of_torch)

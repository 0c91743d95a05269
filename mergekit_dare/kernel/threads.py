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

from mergekit_dare.kernel.per_process import PerProcess

T = TypeVar("T")
R = TypeVar("R")

# Each has buffers of its own: 60 MB in all where there is no recording. And there, with more, the
# interpreter's lock, which each call of torch takes for a moment, would become what all wait for.
MOST = 6
# Elements up to which torch does not split an operation among threads.
TORCHS_LEAST = 1 << 15


def run(worker: Callable[[Iterator[T]], R], items: Iterable[T], most: int = MOST) -> list[R]:
    """Call ``worker`` in as many threads as suit, each with an iterator over the same items.

    Args:
        worker: Takes items until there are no more; each item goes to one call only. It runs in
            inference mode, and with one thread of torch.
        items: Generated one by one, as they are asked for.
        most: At most so many threads, and at most :func:`count`; with 1, ``worker`` is called here,
            and with 0 also without inference mode or a change of torch's threads.

    Returns:
        What each call returned, in any order.

    Raises:
        BaseException: the first that a call raised, or an interruption of this thread; either
            way, all threads have ended, for no more items were given out.

    """
    if most == 0:  # in small merges, all that follows is what takes the time
        return [worker(iter(items))]
    supply = _Supply(items)
    results: list[R] = []
    errors: list[BaseException] = []
    ready = threading.Semaphore(0)

    def work() -> None:
        torch.get_num_threads()  # a thread's first call of torch would undo what is set before
        with _BEFORE.lock:
            too_late = supply.has_ended  # after an error, or an interruption of who starts us
            if not too_late:
                torch.set_num_threads(1)
        ready.release()
        if too_late:
            return
        try:
            with torch.inference_mode():
                results.append(worker(supply))
        except BaseException as error:  # raised by the thread that waits
            supply.end()
            errors.append(error)

    wanted = min(count(), most)
    started: list[_Thread] = []
    try:
        before = _remember_threads_of_torch()
        if wanted > 1:
            _start(started, work, wanted)
        for _ in started:
            ready.acquire()
        torch.set_num_threads(before)  # for what others start meanwhile
        if not started:
            work()
        for thread in started:
            thread.wait()
    finally:  # this thread may have been interrupted, wherever it was
        supply.end()
        for thread in started:
            if thread.ident is not None:  # else it has not begun, and will end at once
                thread.wait()
        _restore_threads_of_torch()
    if errors:
        raise errors[0]
    return results


@contextmanager
def single() -> Iterator[None]:
    """Let torch do all with one thread in this block.

    For what :func:`run` does not do and torch would split: a forked child has no other threads of
    torch, and would wait for them for ever.
    """
    if torch.get_num_threads() == 1:  # as in a worker
        yield
        return
    try:
        _remember_threads_of_torch()
        torch.set_num_threads(1)
        yield
    finally:
        _restore_threads_of_torch()


class _Thread(threading.Thread):
    """Tells when it has ended, also after Ctrl-C.

    Python up to 3.12 takes a thread for ended, and does not wait for it again, once an interruption
    came while ``join`` waited for it.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(name=name)
        self._work, self._has_ended = work, threading.Event()

    def run(self) -> None:
        try:
            self._work()
        finally:
            self._has_ended.set()

    def wait(self) -> None:
        """Wait for its end, and see a Ctrl-C meanwhile.

        Python sees none as long as it waits, if the system gave the signal to another thread, or
        to this one just before it began to wait.
        """
        while not self._has_ended.wait(0.1):
            pass


def _start(started: list[_Thread], work: Callable[[], None], wanted: int) -> None:
    """Start threads, or as many as the system allows; each is in the list before it runs."""
    for number in range(wanted):
        started.append(_Thread(work, f"mergekit-dare-{number}"))
        try:
            started[-1].start()
        except RuntimeError:  # there is a limit of their number, or the interpreter is about to end
            started.pop()
            return


class _Supply(Generic[T]):
    """Gives each item to one of the threads that ask."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items, self._lock = iter(items), threading.Lock()
        self.has_ended = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            return next(self._items)

    def end(self) -> None:
        """Give out no more."""
        with self._lock:
            self._items, self.has_ended = iter(()), True


def count() -> int:
    """Return how many threads suit: as many as torch has, and as there are cores for us.

    torch's number is what ``torch.set_num_threads``, mergekit's ``-j`` and OMP_NUM_THREADS set.
    """
    with _BEFORE.lock:
        of_torch = _remembered()
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


# torch keeps its number of threads for each thread, but gives a new thread the last one that any
# was set to. So what others start in the moment in which threads of ours start may get one, too.
# Here is the number before, by the thread that has work done.
_BEFORE: PerProcess[int, int] = PerProcess()


def _remembered() -> int:
    # What this thread has may be of another's making, in such a moment.
    return next(iter(_BEFORE.values()), 0) or torch.get_num_threads()


def _remember_threads_of_torch() -> int:
    with _BEFORE.lock:
        before = _BEFORE[threading.get_ident()] = _remembered()
    return before


def _restore_threads_of_torch() -> None:
    """Set torch's number of threads back, unless that is done; can be interrupted and repeated."""
    this = threading.get_ident()
    with _BEFORE.lock:
        if this in _BEFORE:
            torch.set_num_threads(_BEFORE[this])
            del _BEFORE[this]

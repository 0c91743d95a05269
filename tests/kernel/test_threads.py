"""Threads of our own: each item once, errors and Ctrl-C come through, nothing is left behind."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import TensorGroup

from mergekit_dare.kernel import buffers, merging, recorded, threads
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.plugin.methods import dare_ties
from tests.kernel.test_merging import assert_same_bits, family, models, recipe


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the machine has; and nothing may be left as it was not."""
    monkeypatch.setattr(threads, "cores", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    running = set(threading.enumerate())
    yield
    patience = time.monotonic() + 10  # one that was just being started at Ctrl-C has yet to end
    while set(threading.enumerate()) != running and time.monotonic() < patience:
        time.sleep(0.01)
    assert set(threading.enumerate()) == running
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as new_thread:
        assert new_thread.submit(torch.get_num_threads).result() == 3
    torch.set_num_threads(before)


def test_each_item_goes_to_one_thread() -> None:
    together = threading.Barrier(3, timeout=60)

    def work(items: Iterator[int]) -> tuple[list[int], int, bool]:
        taken = [next(items)]
        together.wait()  # three are there, and have one each
        taken += items
        return taken, torch.get_num_threads(), torch.is_inference_mode_enabled()

    results = threads.run(work, iter(range(1000)))
    assert len(results) == 3
    assert sorted(item for taken, _, _ in results for item in taken) == list(range(1000))
    assert {found[1:] for found in results} == {(1, True)}


@pytest.mark.parametrize(
    ("of_torch", "cores", "most", "expected"),
    [
        (3, 4, 6, 3),
        (3, 2, 6, 2),
        (1, 4, 6, 1),
        (3, 4, 2, 2),
        (3, 4, 1, 1),
        (64, 64, 64, threads.MOST),
    ],
)
def test_how_many(
    of_torch: int, cores: int, most: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "cores", lambda: cores)
    torch.set_num_threads(of_torch)

    def work(items: Iterator[int]) -> tuple[str, int]:
        return threading.current_thread().name, torch.get_num_threads()

    found = threads.run(work, range(1), most)
    assert torch.get_num_threads() == of_torch
    torch.set_num_threads(3)
    assert len(found) == expected
    assert {count for _, count in found} == {1}
    if expected == 1:  # without another thread
        assert found[0][0] == threading.current_thread().name


def test_small_work_is_done_as_it_is() -> None:
    def work(items: Iterator[int]) -> tuple[list[int], int, threading.Thread]:
        return list(items), torch.get_num_threads(), threading.current_thread()

    assert threads.run(work, range(3), most=0) == [([0, 1, 2], 3, threading.current_thread())]


def test_a_single_thread_of_torch() -> None:
    with threads.single():
        assert torch.get_num_threads() == 1
        assert threads.count() == 3
    with pytest.raises(ValueError, match="invalid literal"), threads.single():
        int("x")


def test_an_error_ends_all() -> None:
    given = []

    def items() -> Iterator[int]:
        for item in range(10**9):
            given.append(item)
            yield item

    def work(items: Iterator[int]) -> None:
        for item in items:
            if item == 20:
                raise ValueError("item 20")

    with pytest.raises(ValueError, match="item 20"):
        threads.run(work, items())
    assert len(given) < 10**6


def test_an_error_of_the_items() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        threads.run(list, items())


@pytest.mark.parametrize("when", [0, 1, 5, 50])
def test_ctrl_c(when: int) -> None:
    """Also while threads are being started."""

    def work(items: Iterator[int]) -> None:
        for item in items:
            if item == when:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        threads.run(work, iter(range(10**9)))


def test_ctrl_c_that_another_thread_was_given() -> None:
    """It does not wake the thread that waits for the others."""

    def work(items: Iterator[int]) -> None:
        for item in items:
            if item == 5:
                signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        threads.run(work, iter(range(10**9)))


def test_ctrl_c_waits_for_what_was_begun() -> None:
    """Python up to 3.12 takes a thread for ended when an interruption ends the wait for it."""
    under_way: list[int] = []

    def work(items: Iterator[int]) -> None:
        for item in items:
            under_way.append(item)
            if item == 5:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.6 if threading.current_thread().name.endswith("0") else 0.1)
            under_way.remove(item)

    with pytest.raises(KeyboardInterrupt):
        threads.run(work, iter(range(10**9)))
    assert not under_way


def test_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert threads.run(list, range(5)) == [[0, 1, 2, 3, 4]]


def test_several_merges_at_once() -> None:
    """As in mergekit's threads for several devices: each is right, and the number is restored."""
    base, tuned = family(3, buffers.CPU_CHUNK * 3 + 12345, dtype=torch.bfloat16)
    entries = models(tuned, 0.5, 0.3)
    recipes = [recipe(combine, seed=seed) for combine in Combine for seed in (1, 2)]
    expected = [merging.merge(base, entries, of_one) for of_one in recipes]
    there = threading.Barrier(4, timeout=60)
    with ThreadPoolExecutor(
        4, initializer=lambda: there.wait(torch.get_num_threads() * 20)
    ) as pool:
        for _ in range(3):
            found = pool.map(lambda of_one: merging.merge(base, entries, of_one), recipes)
            for one, other in zip(found, expected, strict=True):
                assert_same_bits(one, other)
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {3}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("in_a_merge", [False, True])
def test_after_a_fork(in_a_merge: bool) -> None:
    """Also where it came in the middle of a merge of the parent, whose threads the child lacks.

    No thread of the parent is in a call of torch at that moment: of locks in there, which a child
    would wait for in vain, nobody can say more than POSIX does.
    """
    base, tuned = family(2, buffers.CPU_CHUNK * 4, dtype=torch.bfloat16)
    entries, of_one = models(tuned, 0.5, 0.3), recipe(Combine.TIES)

    def merged() -> bytes:
        merged_ = merging.merge(base, entries, of_one)
        return bytes(merged_.view(torch.uint8).numpy().tobytes())

    def code_of_child(of_torch: int) -> int:
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends a child that waits for ever
            as_ever = merged() == expected and torch.get_num_threads() == of_torch
            os._exit(7 if as_ever else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    torch.ones(1 << 22).add_(1)  # torch's own threads wait in the parent, and are not in the child
    expected = merged()
    if in_a_merge:
        with threads.single(), threads._BEFORE.lock:
            assert code_of_child(1) == 7
    else:
        assert code_of_child(3) == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("of_base", "of_first", "parameters"),
    [
        (lambda base: base, lambda theta: theta, {}),
        (lambda base: base[:20_000], lambda theta: theta[:20_000], {}),
        (lambda base: base, lambda theta: theta, {"density": 0.0}),
        (lambda base: base.view(-1, 1024).t(), lambda theta: theta.view(1024, -1), {}),
        (lambda base: torch._neg_view(base), lambda theta: theta, {"normalize": True}),
        (lambda base: base.view(1024, -1), lambda theta: theta.view(-1, 1024).t(), {}),
        (lambda base: base, lambda theta: theta, {"sampling": "magnitude"}),
        (lambda base: base, lambda theta: theta, {"rounding": "stochastic"}),
        (lambda base: base, lambda theta: theta / 0, {}),
    ],
    ids=["usual", "small", "nothing", "rows", "negated", "columns", "magnitude", "drawn", "bad"],
)
def test_a_forked_child_waits_for_no_thread_of_torch(
    of_base: Callable[[torch.Tensor], torch.Tensor],
    of_first: Callable[[torch.Tensor], torch.Tensor],
    parameters: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not in what mergekit calls, whatever the tensors are, with buffers that are made there."""
    monkeypatch.setattr(buffers, "_KEPT", {})
    size = 1 << 19  # torch splits every operation on so many
    base, tuned = family(8, size, dtype=torch.bfloat16)
    base, first = of_base(base), of_first(tuned[0])
    others = [theta[: base.numel()].view(base.shape) for theta in tuned[1:]]
    group = TensorGroup.from_tensors([base, first.view(base.shape), *others], base_index=0)
    torch.ones(1 << 22).add_(1)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        code = 1
        try:
            dare_ties((group,), parameters={"weight": 0.5, "density": 0.5} | parameters)
            code = 7
        except ValueError:
            code = 8
        finally:
            os._exit(code)
    is_bad = not first.isfinite().all()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (8 if is_bad else 7)


@pytest.mark.parametrize("with_recordings", [False, True])
def test_memory_with_64_threads(monkeypatch: pytest.MonkeyPatch, with_recordings: bool) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 64)
    kept: dict[tuple[torch.device, torch.dtype, int], list[buffers.Buffers]] = {}
    monkeypatch.setattr(buffers, "_KEPT", kept)
    if not with_recordings:
        monkeypatch.setattr(recorded, "merge_function", lambda *arguments: None)
    base, tuned = family(3, buffers.CPU_CHUNK * 20, dtype=torch.bfloat16)
    torch.set_num_threads(64)
    merging.merge(base, models(tuned, 0.5, 0.3), recipe(Combine.TIES, normalize=True))
    torch.set_num_threads(3)
    size = recorded.BLOCK if with_recordings else buffers.CPU_CHUNK
    lent = kept[torch.device("cpu"), torch.float32, size]
    every = itertools.chain.from_iterable(kept.values())
    tensors = [t for b in every for t in (*vars(b).values(), *vars(b.mask_buffers).values())]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, torch.Tensor)
    }
    assert 1 < len(lent) <= threads.MOST
    assert sum(storages.values()) < 64 << 20


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({}, "0::/", None),
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "50000 100000"}, "0::/somewhere/else", 0.5),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 2.0),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "100000 100000"}, "0::/a/b", 1.0),
        (
            {"cpu,cpuacct/d/cpu.cfs_quota_us": "300000", "cpu,cpuacct/d/cpu.cfs_period_us": "1e5"},
            "3:cpu,cpuacct:/d",
            None,
        ),
        (
            {"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            "12:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/x",
            3.0,
        ),
        (
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            "3:cpu:/",
            None,
        ),
        ({"cpu.max": "12"}, "0::/", None),
        ({"cpu.max": "1 0"}, "0::/", None),
    ],
)
def test_quota(files: dict[str, str], own: str, expected: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert threads._quota(tmp_path / "root", tmp_path / "own") == expected


def test_cores_under_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    allowed = threads.cores()
    assert 1 <= allowed <= (os.cpu_count() or 1)
    for quota, expected in ((0.2, 1), (1.0, 1), (1e9, allowed), (None, allowed)):
        monkeypatch.setattr(threads, "_quota", lambda quota=quota: quota)
        assert threads.cores() == expected

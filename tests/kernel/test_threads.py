"""Threads of our own: each piece once, errors and Ctrl-C come through, nothing is left behind."""

from __future__ import annotations

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

from mergekit_dare.kernel import cpu, merging, threads
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.plugin.methods import dare_ties
from tests.kernel.test_merging import assert_same_bits, family, models, recipe

MANY = range(10**5)


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the machine has; everything must be left as it was."""
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
    torch.set_num_threads(before)


def test_each_piece_goes_to_one_thread() -> None:
    together = threading.Barrier(3, timeout=60)

    def work(piece: int) -> tuple[int, str]:
        if piece < 3:
            together.wait()  # three are there, and have one each
        return piece, threading.current_thread().name

    results = threads.run(work, range(1000), most=9)
    assert sorted(piece for piece, _ in results) == list(range(1000))
    names = {name for _, name in results}
    assert threading.current_thread().name in names
    assert len(names) == 3


@pytest.mark.parametrize(
    ("of_torch", "cores", "most", "pieces", "expected"),
    [
        (3, 4, 9, 9, 3),
        (3, 2, 9, 9, 2),
        (1, 4, 9, 9, 1),
        (3, 4, 2, 9, 2),
        (3, 4, 9, 2, 2),
        (3, 4, 1, 9, 1),
        (3, 4, 0, 9, 1),
        (64, 64, 99, 99, 64),
    ],
)
def test_how_many(
    of_torch: int,
    cores: int,
    most: int,
    pieces: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "cores", lambda: cores)
    made = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, others: int, *more: Any) -> None:
            made.append(others)
            super().__init__(others, *more)

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Pool)
    torch.set_num_threads(of_torch)
    assert sorted(threads.run(lambda piece: piece, range(pieces), most)) == list(range(pieces))
    torch.set_num_threads(3)
    assert made == ([expected - 1] if expected > 1 else [])


def test_a_single_thread_of_torch() -> None:
    with threads.single():
        assert torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="invalid literal"), threads.single():
        int("x")


def test_an_error_ends_all() -> None:
    done = []

    def work(piece: int) -> None:
        done.append(piece)
        time.sleep(1e-4)
        if piece == 20:
            raise ValueError("piece 20")

    with pytest.raises(ValueError, match="piece 20"):
        threads.run(work, MANY, most=3)
    assert len(done) < 1000


def test_an_index_error_is_an_error() -> None:
    with pytest.raises(IndexError):
        threads.run(lambda piece: [][piece], range(9), most=3)


@pytest.mark.parametrize("when", [0, 1, 5, 50])
@pytest.mark.parametrize("to_this_thread", [False, True])
def test_ctrl_c(when: int, to_this_thread: bool) -> None:
    """Also if the system gives the signal to another thread than the first."""

    def work(piece: int) -> None:
        if piece == when:
            if to_this_thread:
                signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            else:
                os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        threads.run(work, MANY, most=3)
    assert time.monotonic() - begin < 10  # of 33 seconds that it would take


def test_ctrl_c_waits_for_what_was_begun() -> None:
    under_way: list[int] = []

    def work(piece: int) -> None:
        under_way.append(piece)
        if piece == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.6 if threading.current_thread().name.endswith("0") else 0.1)
        under_way.remove(piece)

    with pytest.raises(KeyboardInterrupt):
        threads.run(work, MANY, most=3)
    assert len(under_way) <= 1  # what this thread was at when it was interrupted


def test_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread, *more: Any, **named: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert threads.run(lambda piece: piece, range(5), most=3) == [0, 1, 2, 3, 4]


def test_several_merges_at_once() -> None:
    """As in mergekit's threads for several devices."""
    base, tuned = family(3, cpu.PIECE * 3 + 12345, dtype=torch.bfloat16)
    entries = models(tuned, 0.5, 0.3)
    recipes = [recipe(combine, seed=seed) for combine in Combine for seed in (1, 2)]
    expected = [merging.merge(base, entries, of_one) for of_one in recipes]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = pool.map(lambda of_one: merging.merge(base, entries, of_one), recipes)
            for one, other in zip(found, expected, strict=True):
                assert_same_bits(one, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("engine")
def test_after_a_fork() -> None:
    """A child has none of the parent's threads, and none of torch's."""
    base, tuned = family(2, cpu.PIECE * 4, dtype=torch.bfloat16)
    entries, of_one = models(tuned, 0.5, 0.3), recipe(Combine.TIES)

    def merged() -> bytes:
        merged_ = merging.merge(base, entries, of_one)
        return bytes(merged_.view(torch.uint8).numpy().tobytes())

    torch.ones(1 << 22).add_(1)  # torch's own threads wait in the parent, and are not in the child
    expected = merged()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for ever
        os._exit(7 if merged() == expected and torch.get_num_threads() == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


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
        (lambda base: base, lambda theta: theta.requires_grad_(), {}),
        (lambda base: base, lambda theta: theta, {"rounding": "stochastic"}),
        (lambda base: base, lambda theta: theta / 0, {}),
    ],
    ids=[
        "usual",
        "small",
        "nothing",
        "rows",
        "negated",
        "columns",
        "magnitude",
        "gradients",
        "drawn",
        "bad",
    ],
)
@pytest.mark.usefixtures("engine")
def test_a_forked_child_waits_for_no_thread_of_torch(
    of_base: Callable[[torch.Tensor], torch.Tensor],
    of_first: Callable[[torch.Tensor], torch.Tensor],
    parameters: dict[str, Any],
) -> None:
    """Not in what mergekit calls, whatever the tensors."""
    size = 1 << 19  # torch splits every operation on so many
    base, tuned = family(8, size, dtype=torch.bfloat16)
    base, first = of_base(base), of_first(tuned[0])
    others = [theta[: base.numel()].view(base.shape) for theta in tuned[1:]]
    group = TensorGroup.from_tensors([base, first.view(base.shape), *others], base_index=0)
    torch.ones(1 << 22).add_(1)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
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

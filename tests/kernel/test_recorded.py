"""Recordings of the formula: the bytes that come out without one, and what happens without one."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergekit_dare.kernel import buffers, compiled, guard, merging, recorded, threads
from mergekit_dare.kernel.formula import merge_chunk
from mergekit_dare.kernel.merging import FineTuned, Recipe
from mergekit_dare.kernel.per_process import PerProcess
from tests.kernel.cases import CASES, LINEAR, TIES, entries_of, watch
from tests.kernel.test_merging import assert_same_bits, bits, family, models, recipe
from tests.running import run_command

BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and chunks of which small tensors have many; nothing recorded yet."""
    monkeypatch.setenv(compiled.SWITCH, "0")
    monkeypatch.setattr(recorded, "BLOCK", BLOCK)
    monkeypatch.setattr(recorded, "LEAST", 1)
    monkeypatch.setattr(buffers, "CPU_CHUNK", 8 * BLOCK)
    monkeypatch.setattr(recorded, "_RECORDINGS", PerProcess())


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each chunk that had a recording was merged by it, but for those of the proof."""
    answers: list[bool] = []
    watch(monkeypatch, recorded, lambda: None, answers.append)
    return answers


def merge_both_ways(
    base: Tensor, entries: list[FineTuned], settings: Recipe
) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded, "merge_function", lambda *arguments: None)
        plain = merging.merge(base, entries, settings)
    return plain, merging.merge(base, entries, settings)


def the_only_recording() -> recorded._Recording:
    (recording,) = recorded._RECORDINGS.values()
    return recording


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name: str, used: list[bool]) -> None:
    """Of whole blocks, with a rest of any size, and of less than a block."""
    count = 0
    for elements in (2000, 2048, 2049, 2111, 512, 513, 575, *range(1, 131)):
        base, entries, settings = entries_of(name, max(elements, 2000))
        part = [FineTuned(m.name, m.tensor[:elements], m.weight, m.density) for m in entries]
        plain, merged = merge_both_ways(base[:elements], part, settings)
        assert_same_bits(merged, plain)
        count += -(-elements // (8 * BLOCK))
        assert used == [True] * count
        assert elements < 100 or not torch.equal(bits(plain), bits(base[:elements]))


def test_large_blocks(monkeypatch: pytest.MonkeyPatch, used: list[bool]) -> None:
    """As users have them."""
    monkeypatch.undo()
    monkeypatch.setenv(compiled.SWITCH, "0")
    monkeypatch.setattr(recorded, "_RECORDINGS", PerProcess())
    for combine in (LINEAR, TIES):
        for elements in (recorded.LEAST - 1, recorded.LEAST, 2 * buffers.CPU_CHUNK + 31):
            base, tuned = family(3, elements, dtype=torch.bfloat16)
            entries = models(tuned, [0.5, 0.3, -0.2], [0.3, 0.01, 1.0])
            plain, merged = merge_both_ways(base, entries, recipe(combine))
            assert_same_bits(merged, plain)
            assert len(recorded._RECORDINGS) == (elements >= recorded.LEAST) + (combine is TIES)
    assert all(recording.is_proven for recording in recorded._RECORDINGS.values())


@pytest.mark.parametrize("settings", [recipe(LINEAR), recipe(TIES), recipe(TIES, lambda_=-0.0)])
def test_other_numbers_need_no_other_recording(settings: Recipe, used: list[bool]) -> None:
    base, tuned = family(3, 1000)
    base[::5] = -0.0
    tuned[0][::10] = -0.0
    for weights, densities, seed in (
        ([0.5, 0.3, -0.2], [0.3, 0.01, 0.999], 1),
        ([-1e9, 0.3, 1e-9], [1e-9, 0.5, 0.1], 2),
        ([-0.5, -0.5, -0.5], [0.3, 0.3, 0.3], 3),
    ):
        entries = models(tuned, weights, densities)
        plain, merged = merge_both_ways(
            base, entries, recipe(settings.combine, lambda_=settings.lambda_, seed=seed)
        )
        assert_same_bits(merged, plain)
    assert used == [True] * 6
    assert the_only_recording().is_proven


@pytest.mark.parametrize("count", [1, 9, 32, 33])
def test_many_models(count: int, used: list[bool]) -> None:
    base, tuned = family(count, 700, dtype=torch.bfloat16)
    for combine in (LINEAR, TIES):
        plain, merged = merge_both_ways(base, models(tuned, 0.3, 0.5), recipe(combine))
        assert_same_bits(merged, plain)
    assert used == ([True] * 4 if count <= recorded.MOST_MODELS else [])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads(count: int, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "LEAST_MERGED", 1)
    monkeypatch.setattr(threads, "TORCHS_LEAST", 1)
    monkeypatch.setattr(threads, "cores", lambda: 3)
    base, entries, settings = entries_of("normalized", 40_000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        plain, merged = merge_both_ways(base, entries, settings)
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert_same_bits(merged, plain)
    assert used == [True] * 79


def test_merges_at_once_share_recordings(used: list[bool]) -> None:
    base, entries, settings = entries_of("ties", 3000)
    expected, _ = merge_both_ways(base, entries, settings)
    recorded._RECORDINGS.clear()
    results: list[Tensor] = []

    def work() -> None:
        results.extend(merging.merge(base, entries, settings) for _ in range(10))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80
    for result in results:
        assert_same_bits(result, expected)
    assert len(recorded._RECORDINGS) == 1
    assert all(used)


def test_nothing_else_is_changed_or_said(used: list[bool]) -> None:
    base, entries, settings = entries_of("drawn", 3000)
    state, count = torch.get_rng_state(), torch.get_num_threads()
    with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
        warnings.simplefilter("always")
        merging.merge(base, entries, settings)
    assert not caught
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == count
    assert used == [True] * 6


def test_errors(used: list[bool]) -> None:
    """In the first block, of which nothing can be told then, and after it."""
    base, entries, settings = entries_of("float32", 1000)
    base[7] = entries[0].tensor[7] = -torch.inf
    for model in entries:
        model.tensor[7] = -torch.inf
    for _ in range(2):
        merging.merge(base, entries, settings)  # equal infinities are no error
    assert used == []
    assert not the_only_recording().is_proven
    assert not the_only_recording().has_failed
    base, entries, settings = entries_of("float32", 1000)
    for _ in range(2):
        merging.merge(base, entries, settings)
        assert the_only_recording().is_proven
        entries[1].tensor[900] = torch.nan
        with pytest.raises(ValueError, match="model model-1 gives 1 of 1000 deltas that are NaN"):
            merging.merge(base, entries, settings)
        entries[1].tensor[900] = 0.5
    assert all(used)


def test_overflow(used: list[bool]) -> None:
    base, tuned = family(2, 1000, dtype=torch.float16)
    base[999] = 60000.0
    tuned[0][999] = tuned[1][999] = 62000.0
    with pytest.raises(ValueError, match="overflows float16"):
        merging.merge(base, models(tuned, 3.0, 1.0), recipe(LINEAR))
    assert used == [True] * 2


@pytest.mark.parametrize("name", ["trace", "script"])
def test_without_torch_jit(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, used: list[bool]
) -> None:
    monkeypatch.delattr(torch.jit, name)
    caplog.set_level("INFO")
    base, entries, settings = entries_of("linear", 3000)
    for _ in range(3):
        plain, merged = merge_both_ways(base, entries, settings)
        assert_same_bits(merged, plain)
    assert used == []
    (message,) = caplog.messages
    assert message.startswith("merging without a recording, which takes longer: AttributeError")


def test_where_torch_jit_is_switched_off() -> None:
    """Then it gives functions back as they are, and Python would call torch for each block."""
    program = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from mergekit_dare.kernel import merging, recorded
from tests.kernel.cases import entries_of
recorded.LEAST = 1
merging.merge(*entries_of('linear', 3000))
"""
    said = run_command(sys.executable, "-c", program, PYTORCH_JIT="0").stderr
    assert said.endswith("PYTORCH_JIT=0 switches torch.jit off\n")


def test_another_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, used: list[bool]
) -> None:
    """As if torch's interpreter had an error."""

    def merge_wrong(out: Tensor, *others: Any) -> Tensor:
        norm = merge_chunk(out, *others)
        if torch._C._get_tracing_state() is not None:
            out.mul_(1 + 2**-6)
        return norm

    monkeypatch.setattr(recorded, "merge_chunk", merge_wrong)
    caplog.set_level("INFO")
    base, entries, settings = entries_of("ties", 3000)
    plain, merged = merge_both_ways(base, entries, settings)
    assert_same_bits(merged, plain)
    assert used == []
    (message,) = caplog.messages
    assert message.endswith("it gives other results here")


def test_an_error_in_the_middle(caplog: pytest.LogCaptureFixture, used: list[bool]) -> None:
    """After some of the chunk is written."""
    caplog.set_level("INFO")
    base, entries, settings = entries_of("normalized", 3000)
    plain, _ = merge_both_ways(base, entries, settings)
    recording, calls = the_only_recording(), 0
    merge_blocks = recording.merge_blocks

    def fail(vectors: list[Tensor], *others: Any) -> Tensor:
        nonlocal calls
        calls += 1
        norm = merge_blocks(vectors, *others)
        if calls == 3:
            raise RuntimeError("no memory\nat all")
        return norm

    recording.merge_blocks = fail
    used.clear()
    assert_same_bits(merging.merge(base, entries, settings), plain)
    assert sorted(used) == [False] * (6 - 2) + [True] * 2
    assert_same_bits(merging.merge(base, entries, settings), plain)
    assert len(used) == 6
    (message,) = caplog.messages
    assert message.endswith("which takes longer: RuntimeError: no memory")


def test_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, used: list[bool]
) -> None:
    """While the first result is compared: one line, with the reason."""

    def fail(*arguments: Any) -> Tensor:
        raise RuntimeError("no memory")

    monkeypatch.setattr(recorded, "_functions", lambda kind: (fail, fail))
    caplog.set_level("INFO")
    base, entries, settings = entries_of("linear", 3000)
    plain, merged = merge_both_ways(base, entries, settings)
    assert_same_bits(merged, plain)
    assert used == []
    (message,) = caplog.messages
    assert message.endswith("which takes longer: RuntimeError: no memory")


def test_interruption(monkeypatch: pytest.MonkeyPatch, used: list[bool]) -> None:
    """While the first result is compared: the next merge starts anew."""

    def interrupt(*arguments: Any) -> bool:
        raise KeyboardInterrupt

    base, entries, settings = entries_of("linear", 3000)
    with monkeypatch.context() as patch:
        patch.setattr(guard, "gives_the_same", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merging.merge(base, entries, settings)
    plain, merged = merge_both_ways(base, entries, settings)
    assert_same_bits(merged, plain)
    assert used == [True] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_records_anew(used: list[bool]) -> None:
    base, entries, settings = entries_of("linear", 3000)
    plain, _ = merge_both_ways(base, entries, settings)
    recorded._RECORDINGS.lock.acquire()  # as another thread might have, which is not in the child
    try:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert not recorded._RECORDINGS
                assert_same_bits(merging.merge(base, entries, settings), plain)
                assert the_only_recording().is_proven
                code = 0
            finally:
                os._exit(code)
    finally:
        recorded._RECORDINGS.lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_must_not_be_recorded() -> None:
    base, entries, settings = entries_of("linear", 3000)
    steps = merging.plan(base, entries, settings).steps
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(base)
    assert recorded.suits([base], steps)
    assert not recorded.suits([fake], steps)
    assert not recorded.suits([base.to("meta")], steps)


def test_inside_of_a_recording_by_others() -> None:
    """torch cannot record a merge, and says so; one recording within another would crash it."""
    base, entries, settings = entries_of("linear", 3000)

    def merge(base: Tensor) -> Tensor:
        return merging.merge(base, entries, settings)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="aten::view"):
            torch.jit.trace(merge, (base,), check_trace=False)
    assert not recorded._RECORDINGS

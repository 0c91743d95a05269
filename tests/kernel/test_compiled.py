"""Compiled code: the bytes that come out without it, and what happens where there is none."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from mergekit_dare.kernel import compiled, gradients, merging
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.merging import FineTuned, Recipe
from mergekit_dare.kernel.rounding import Rounding
from mergekit_dare.kernel.sampling import Sampling
from tests.kernel.test_merging import (
    ALL_DTYPES,
    BOTH,
    DTYPES,
    assert_same_bits,
    bits,
    family,
    models,
    peak_beside_output,
    recipe,
)
from tests.running import dare, merge_yaml, run_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiled.is_torch_too_old(), reason="torch is too old for compiled code"),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

CHUNK = 1 << 12


@pytest.fixture(autouse=True)
def _small_chunks_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "CHUNK", CHUNK)
    monkeypatch.setattr(compiled, "_COMPILED", {})
    monkeypatch.setattr(compiled, "_CHECKED", set())
    yield
    torch._dynamo.reset()


@pytest.fixture
def merged_elements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Switch compiled code on, and say how many elements of each tensor it merged."""
    merged: list[int] = []
    merge_function = compiled.merge_function

    def count(*arguments: Any) -> Any:
        function = merge_function(*arguments)
        merged.append(0)
        if function is None:
            return None

        def merge_and_count(*chunk: Any) -> Tensor | None:
            norm = function(*chunk)
            merged[-1] += 0 if norm is None else CHUNK
            return norm

        return merge_and_count

    monkeypatch.setattr(compiled, "merge_function", count)
    monkeypatch.setenv("MERGEKIT_DARE_COMPILE", "1")
    return merged


def merge_both_ways(
    base: Tensor, entries: list[FineTuned], settings: Recipe
) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MERGEKIT_DARE_COMPILE", raising=False)
        plain = merging.merge(base, entries, settings)
    return plain, merging.merge(base, entries, settings)


@needs_compiler
@BOTH
@ALL_DTYPES
@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "normalize"])
def test_the_same_bits(
    combine: Combine, dtype: torch.dtype, normalize: bool, merged_elements: list[int]
) -> None:
    """With zeros of both signs, subnormals, equal weights, all dropped and nothing dropped."""
    base, tuned = family(4, 3 * CHUNK + 1027, dtype=dtype)
    base[::97] = -0.0
    base[1::97] = 0.0
    tiny = torch.finfo(dtype).smallest_normal
    base[2:2000:7] = torch.linspace(-tiny, tiny, len(base[2:2000:7]), dtype=dtype)
    tuned[1][2:2000:7] = base[2:2000:7].flip(0)
    tuned[2][3::5] = (2 * base.double() - tuned[0].double()).to(dtype)[3::5]  # ties in the election
    entries = models(tuned, [0.5, 0.3, 0.5, -0.4], [0.5, 1.0, 0.5, 1e-9])
    lambda_ = -0.7 if normalize else 1.0
    settings = recipe(combine, normalize=normalize, lambda_=lambda_)
    plain, with_compiled = merge_both_ways(base, entries, settings)
    assert_same_bits(with_compiled, plain)
    assert merged_elements == [0, 3 * CHUNK]
    assert not torch.equal(bits(plain), bits(base))


@needs_compiler
@BOTH
@pytest.mark.parametrize("width", [1, 128, 256])
def test_other_vectors(combine: Combine, width: int, merged_elements: list[int]) -> None:
    """As on processors without AVX-512, or without any vector instructions."""
    base, tuned = family(2, 3 * CHUNK, dtype=torch.float32)
    base[::97] = -0.0
    with torch._inductor.config.patch({"cpp.simdlen": width}):
        for density in (0.3, 0.9):
            entries = models(tuned, [0.5, 0.3], density)
            plain, with_compiled = merge_both_ways(base, entries, recipe(combine))
            assert_same_bits(with_compiled, plain)
    assert merged_elements == [0, 3 * CHUNK] * 2


@needs_compiler
@BOTH
def test_other_numbers_need_no_other_code(combine: Combine, merged_elements: list[int]) -> None:
    base, tuned = family(2, 2 * CHUNK, dtype=torch.bfloat16)
    graphs = set()
    for seed, weight, density in ((1, 0.5, 0.3), (2, -1.5, 0.01), (3, 3.0, 1.0)):
        entries = models(tuned, [weight, 0.1], [density, 0.9])
        settings = recipe(combine, seed=seed, lambda_=1 + seed)
        plain, with_compiled = merge_both_ways(base, entries, settings)
        assert_same_bits(with_compiled, plain)
        graphs.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert merged_elements == [0, 2 * CHUNK] * 3
    assert len(graphs) == 1


@needs_compiler
def test_more_cases_than_torch_compiles_of_one_code(merged_elements: list[int]) -> None:
    steps = [recipe(Combine.LINEAR), recipe(Combine.TIES)]
    steps.append(recipe(Combine.TIES, normalize=True, lambda_=-0.7))
    for dtype in DTYPES:
        base, tuned = family(4, CHUNK, dtype=dtype)
        for settings in steps:
            merging.merge(base, models(tuned, 0.1, 0.5), settings)
    assert merged_elements == [CHUNK] * 12


@needs_compiler
@pytest.mark.parametrize(
    ("combine", "dtype"), [(Combine.TIES, torch.bfloat16), (Combine.LINEAR, torch.float16)]
)
def test_sampling_and_rounding(
    combine: Combine, dtype: torch.dtype, merged_elements: list[int]
) -> None:
    base, tuned = family(3, 2 * CHUNK + 37, dtype=dtype)
    entries = models(tuned, [0.5, 0.3, -0.4], [0.5, 0.1, 1.0])
    settings = recipe(
        combine, normalize=True, sampling=Sampling.MAGNITUDE, rounding=Rounding.STOCHASTIC
    )
    plain, with_compiled = merge_both_ways(base, entries, settings)
    assert_same_bits(with_compiled, plain)
    assert merged_elements == [0, 2 * CHUNK]


@needs_compiler
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_mixed_dtypes_and_strides(wide: torch.dtype, merged_elements: list[int]) -> None:
    base, tuned = family(2, 64, CHUNK // 64 + 1, dtype=wide)
    mixed = [tuned[0].bfloat16().t().contiguous().t(), tuned[1]]
    plain, with_compiled = merge_both_ways(
        base.half(), models(mixed, 0.5, 0.5), recipe(Combine.TIES)
    )
    assert_same_bits(with_compiled, plain)
    assert merged_elements == [0, CHUNK]


@needs_compiler
@BOTH
def test_threads(combine: Combine, merged_elements: list[int]) -> None:
    base, tuned = family(3, 5 * CHUNK, dtype=torch.float32)
    entries = models(tuned, [0.5, 0.3, -0.4], [0.5, 0.1, 1.0])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            plain, with_compiled = merge_both_ways(base, entries, recipe(combine))
            assert_same_bits(with_compiled, plain)
    finally:
        torch.set_num_threads(threads)
    assert merged_elements == [0, 5 * CHUNK] * 3


@needs_compiler
def test_errors_and_equal_infinities(merged_elements: list[int]) -> None:
    base, tuned = family(2, 2 * CHUNK, dtype=torch.float32)
    base[7] = tuned[0][7] = tuned[1][7] = -torch.inf
    plain, with_compiled = merge_both_ways(base, models(tuned, 0.5, 0.5), recipe(Combine.TIES))
    assert_same_bits(with_compiled, plain)
    with pytest.raises(ValueError, match="merged tensor w overflows float32"):
        merging.merge(base, models([base + 1e38], 9.0), recipe(Combine.TIES))
    tuned[1][CHUNK + 5] = torch.nan
    with pytest.raises(ValueError, match="model model-1 gives 1 of 8192 deltas that are NaN"):
        merging.merge(base, models(tuned, 0.5, 0.01), recipe(Combine.TIES))
    assert max(merged_elements) == 2 * CHUNK


@needs_compiler
def test_gradients(merged_elements: list[int]) -> None:
    base, (tuned,) = family(1, CHUNK)
    entries = models([tuned.requires_grad_()], 0.5, 0.5)
    merged = gradients.merge(base, entries, recipe(Combine.LINEAR))
    (gradient,) = torch.autograd.grad(merged.sum(), tuned)
    assert torch.equal((gradient != 0) & (tuned != base), merged != base)
    assert merged_elements == [CHUNK]


@needs_compiler
def test_memory(merged_elements: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many models and elements in a chunk as there may be."""
    monkeypatch.undo()
    monkeypatch.setenv("MERGEKIT_DARE_COMPILE", "1")
    base = torch.zeros(2 * compiled.CHUNK, dtype=torch.bfloat16)
    tuned = [torch.full_like(base, 0.01 * k) for k in range(compiled.MOST_MODELS + 1)]
    entries = models(tuned[1:], 0.1, 0.5)
    merging.merge(base, entries, recipe(Combine.TIES))
    assert compiled._COMPILED
    assert None not in compiled._COMPILED.values()
    assert peak_beside_output(base, entries, recipe(Combine.TIES)) < 24 << 20


@needs_compiler
def test_mergekit_yaml(llamas: Path, tmp_path: Path, merged_elements: list[int]) -> None:
    config = dare(llamas, seed=1)
    with_compiled = merge_yaml(config, tmp_path / "compiled")
    assert max(merged_elements) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MERGEKIT_DARE_COMPILE")
        plain = merge_yaml(config, tmp_path / "plain")
    assert with_compiled.keys() == plain.keys()
    for name, tensor in plain.items():
        assert_same_bits(with_compiled[name], tensor)


@pytest.mark.parametrize("value", [None, "", "0", "off"])
def test_only_for_those_who_ask(
    value: str | None, merged_elements: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("MERGEKIT_DARE_COMPILE")
    else:
        monkeypatch.setenv("MERGEKIT_DARE_COMPILE", value)
    base, tuned = family(1, CHUNK)
    merging.merge(base, models(tuned, 0.5, 0.5), recipe(Combine.LINEAR))
    assert merged_elements == [0]


def test_not_for_very_many_models(merged_elements: list[int]) -> None:
    base, tuned = family(compiled.MOST_MODELS + 1, CHUNK)
    merging.merge(base, models(tuned, 0.1, 0.5), recipe(Combine.LINEAR))
    assert merged_elements == [0]


def test_one_line_where_torch_is_too_old(
    merged_elements: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "OLDEST_TORCH", (99, 1))
    base, tuned = family(2, CHUNK)
    for combine in Combine:
        plain, with_compiled = merge_both_ways(base, models(tuned, 0.5, 0.5), recipe(combine))
        assert_same_bits(with_compiled, plain)
    assert merged_elements == [0] * 4
    (message,) = caplog.messages
    assert message.endswith("merging without compiled code: it needs torch 99.1 or later")


def test_one_line_where_compiled_code_fails(
    merged_elements: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a tensor, after it has written half a chunk."""
    calls = 0

    def fails_at_the_second_chunk(out: Tensor, *arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            out[: CHUNK // 2] = 7
            raise RuntimeError("no space left\nand a traceback")
        return compiled._merge_chunk(out, *arguments)

    monkeypatch.setattr(compiled, "_compile", lambda: fails_at_the_second_chunk)
    base, tuned = family(2, 3 * CHUNK)
    for combine in Combine:
        with caplog.at_level(logging.WARNING):
            plain, with_compiled = merge_both_ways(base, models(tuned, 0.5, 0.5), recipe(combine))
        assert_same_bits(with_compiled, plain)
    assert merged_elements == [0, CHUNK, 0, 3 * CHUNK]
    assert caplog.messages == [
        "MERGEKIT_DARE_COMPILE: merging without compiled code: RuntimeError: no space left"
    ]


def test_one_line_where_compiled_code_is_wrong(
    merged_elements: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def one_bit_off(out: Tensor, *arguments: Any) -> Tensor:
        norm = compiled._merge_chunk(out, *arguments)
        out.view(torch.int16)[CHUNK - 1] += 1
        return norm

    monkeypatch.setattr(compiled, "_compile", lambda: one_bit_off)
    base, tuned = family(2, 3 * CHUNK, dtype=torch.bfloat16)
    for _ in range(2):
        plain, with_compiled = merge_both_ways(base, models(tuned, 0.5, 0.5), recipe(Combine.TIES))
        assert_same_bits(with_compiled, plain)
    assert merged_elements == [0, 0, 0, 0]
    (message,) = caplog.messages
    assert message.endswith("it gives other results here, which is an error of the compiler")


def test_one_line_where_the_cache_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    program = """
import torch
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.merging import FineTuned, Recipe, merge
base = torch.arange(1 << 20).float()
merged = merge(base, [FineTuned('a', base + 1, 1.0)], Recipe(Combine.LINEAR, 'w', 1))
print(torch.equal(merged, base + 1))
"""
    result = run_command(
        sys.executable,
        "-W",
        "ignore",
        "-c",
        program,
        MERGEKIT_DARE_COMPILE="1",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file"),
    )
    assert result.stdout == "True\n"
    lines = [line for line in result.stderr.splitlines() if "MERGEKIT_DARE_COMPILE" in line]
    assert len(lines) == 1


@needs_compiler
def test_another_default_device(merged_elements: list[int]) -> None:
    base, tuned = family(2, CHUNK)
    with torch.device("meta"):
        plain, with_compiled = merge_both_ways(
            base, models(tuned, 0.5, 0.5), recipe(Combine.LINEAR, sampling=Sampling.MAGNITUDE)
        )
    assert_same_bits(with_compiled, plain)


def test_one_line_where_there_is_no_compiler(tmp_path: Path) -> None:
    program = """
import torch
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.merging import SUPPORTED_DTYPES, FineTuned, Recipe, merge
base = torch.zeros(1 << 20)
for combine in Combine:
    tuned = [FineTuned("a", torch.ones(1 << 20), 0.4, 0.3)]
    print(float(merge(base, tuned, Recipe(combine, "w", 1)).double().sum()))
"""
    result = run_command(
        sys.executable,
        *("-c", program),
        CXX="/nonexistent/g++",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
        MERGEKIT_DARE_COMPILE="1",
    )
    linear, ties = map(float, result.stdout.split())
    assert linear == ties != 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("MERGEKIT_DARE_COMPILE: merging without compiled code: ")
    assert "compiler" in line

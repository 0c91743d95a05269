"""Compiled code: the bytes that come out without it, its cache, and what happens without one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_dare import cli
from mergekit_dare.diagnostics import compile_command, doctor
from mergekit_dare.kernel import (
    buffers,
    building,
    compiled,
    gradients,
    merging,
    native,
    packages,
    threads,
)
from mergekit_dare.kernel.merging import FineTuned, Recipe
from mergekit_dare.kernel.packages import Case, NoPackageError
from mergekit_dare.kernel.per_process import PerProcess
from tests import zoo
from tests.kernel.cases import CASES, LINEAR, TIES, entries_of, watch
from tests.kernel.test_merging import (
    assert_same_bits,
    bits,
    family,
    models,
    peak_beside_output,
    recipe,
)
from tests.running import Config, dare, merge_yaml, needs_compiler, run_command, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiled.why_not_here() != "", reason="not for this torch or system"),
]

CHUNK = buffers.CPU_CHUNK


def case_of(name: str) -> Case:
    return case_of_merge(*entries_of(name, 4000))


def case_of_merge(base: Tensor, entries: list[FineTuned], settings: Recipe) -> Case:
    job = merging.plan(base, entries, settings)
    return Case.of(job.vectors, job.steps)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache with all of CASES, which all processes of this test run share."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "dare-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(packages.FOLDER, str(folder))
        building.build([case_of(name) for name in CASES])
    return folder


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process that has loaded nothing yet, and an empty cache."""
    monkeypatch.setenv(packages.FOLDER, str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    monkeypatch.setattr(compiled, "_LOADED", PerProcess())
    compiled._WARNED.clear()
    yield tmp_path / "cache"
    compiled._WARNED.clear()


@pytest.fixture
def cache(made: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache."""
    shutil.copytree(made, empty)
    return empty


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks compiled code merged, of each tensor."""
    merged: list[int] = []

    def add(is_merged: bool) -> None:
        merged[-1] += is_merged

    watch(monkeypatch, compiled, lambda: merged.append(0), add)
    return merged


def merge_both_ways(
    base: Tensor, entries: list[FineTuned], settings: Recipe
) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiled.SWITCH, "0")
        plain = merging.merge(base, entries, settings)
    return plain, merging.merge(base, entries, settings)


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name: str, cache: Path, chunks: list[int]) -> None:
    """Unasked, and by the C interface, which needs none of the compiler."""
    for elements, of_compiled in ((3 * CHUNK + 1027, 3), (3 * CHUNK + 1028, 4)):
        base, entries, settings = entries_of(name, elements)
        plain, with_compiled = merge_both_ways(base, entries, settings)
        assert_same_bits(with_compiled, plain)
        # What is summed up first depends on the weights, and is of another dtype if they differ.
        is_there = case_of_merge(base, entries, settings) == case_of(name)
        assert is_there or name == "mixed"
        assert chunks[-2:] == [0, of_compiled if is_there else 0]
        assert not torch.equal(bits(plain), bits(base))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_of_every_size(name: str, cache: Path, chunks: list[int]) -> None:
    """Of all ends that loops over vectors can have, and in tensors under a chunk."""
    base, entries, settings = entries_of(name, 3004)
    for elements in (*range(1, 200), 1000, 3000, 3001, 3004):
        part = [FineTuned(m.name, m.tensor[:elements], m.weight, m.density) for m in entries]
        plain, with_compiled = merge_both_ways(base[:elements], part, settings)
        assert_same_bits(with_compiled, plain)
        is_there = case_of_merge(base[:elements], part, settings) == case_of(name)
        assert chunks[-2:] == [0, is_there and elements >= 8 and elements % 4 == 0]


@needs_compiler
def test_no_compiler_is_imported(cache: Path) -> None:
    program = """
import sys, torch
from mergekit_dare.kernel import compiled
from tests.kernel.test_compiled import CHUNK, entries_of, merging
base, entries, settings = entries_of('linear', CHUNK)
merging.merge(base, entries, settings)
used = [package.code is not None for package in compiled._LOADED.values()]
print(used, 'torch._inductor.codecache' in sys.modules)
"""
    assert run_command(sys.executable, "-c", program).stdout == "[True] False\n"


@needs_compiler
def test_other_numbers_need_no_other_code(cache: Path, chunks: list[int]) -> None:
    for seed, weight, density in ((1, 0.5, 0.3), (2, -1.5, 0.01), (3, 3.0, 1.0)):
        for combine, count in ((LINEAR, 4), (TIES, 2)):
            base, tuned = family(count, 2 * CHUNK, dtype=torch.bfloat16)
            entries = models(tuned, [weight] + [0.1] * (count - 1), [density] + [0.9] * (count - 1))
            plain, with_compiled = merge_both_ways(base, entries, recipe(combine, seed=seed))
            assert_same_bits(with_compiled, plain)
    assert chunks == [0, 2] * 6
    assert len(compiled._LOADED) == 2


@needs_compiler
@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads(count: int, cache: Path, chunks: list[int]) -> None:
    base, entries, settings = entries_of("normalized", 7 * CHUNK)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        plain, with_compiled = merge_both_ways(base, entries, settings)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(with_compiled, plain)
    assert chunks == [0, 7]


@needs_compiler
def test_strides_and_another_default_device(cache: Path, chunks: list[int]) -> None:
    base, entries, settings = entries_of("ties", CHUNK)
    square = [
        FineTuned(model.name, model.tensor.view(512, -1).t().contiguous().t(), 0.4, 0.3)
        for model in entries
    ]
    with torch.device("meta"):
        plain, with_compiled = merge_both_ways(base.view(512, -1), square, settings)
    assert_same_bits(with_compiled, plain)
    assert chunks == [0, 1]


@needs_compiler
def test_errors_and_equal_infinities(cache: Path, chunks: list[int]) -> None:
    """Also in the first chunk, of which nothing can be told then."""
    base, entries, settings = entries_of("float32", 2 * CHUNK)
    plain, with_compiled = merge_both_ways(base, entries, settings)
    for element in (7, CHUNK + 7):
        base[element] = -torch.inf
        for model in entries:
            model.tensor[element] = -torch.inf
        plain, with_compiled = merge_both_ways(base, entries, settings)
        assert_same_bits(with_compiled, plain)
    entries[1].tensor[CHUNK + 5] = torch.nan
    with pytest.raises(ValueError, match=r"model model-1 gives 1 of \d+ deltas that are NaN"):
        merging.merge(base, entries, settings)
    assert max(chunks) == 2
    compiled._LOADED.clear()
    merging.merge(
        base[: CHUNK + 5],
        [FineTuned(m.name, m.tensor[: CHUNK + 5], m.weight, m.density) for m in entries],
        settings,
    )
    assert [package.compared for package in compiled._LOADED.values()] == [0]


@needs_compiler
def test_gradients(cache: Path, chunks: list[int]) -> None:
    base, entries, settings = entries_of("float32", CHUNK)
    tuned = entries[0].tensor.requires_grad_()
    merged = gradients.merge(base, entries, settings)
    (gradient,) = torch.autograd.grad(merged.sum(), tuned)
    assert gradient.count_nonzero() > CHUNK // 4
    assert chunks == [1]


@needs_compiler
def test_memory(cache: Path, chunks: list[int]) -> None:
    """The masks of a chunk in each thread, and what is there without compiled code."""
    base, entries, settings = entries_of("linear", 8 * CHUNK)
    merging.merge(base, entries, settings)
    most = threads.MOST * 4 * CHUNK * 2 + (2 << 20)
    assert peak_beside_output(base, entries, settings) < most
    assert chunks == [8, 8]


@needs_compiler
def test_mergekit_yaml(
    cache: Path, chunks: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dare_of_large_tensors(tmp_path, seed=1)
    with_compiled = merge_yaml(config, tmp_path / "compiled")
    assert sum(chunks) > 1
    monkeypatch.setenv(compiled.SWITCH, "0")
    plain = merge_yaml(config, tmp_path / "plain")
    zoo.assert_same_tensors(with_compiled, plain)


def dare_of_large_tensors(folder: Path, **parameters: Any) -> Config:
    """The config of two Llamas, of which five tensors have a chunk or more."""
    maker = zoo.llama_of(hidden_size=2048, intermediate_size=128, num_hidden_layers=1)
    zoo.make_family(maker, folder, names="ab")
    return dare(folder, **parameters)


@needs_compiler
def test_the_command_makes_what_a_merge_needs(
    cache: Path, chunks: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a config, whatever its parameters; a merge then takes all of it from there."""
    folder = tmp_path / "models"
    config = write(dare_of_large_tensors(folder), tmp_path / "dare.yml")
    result = CliRunner().invoke(cli.main, ["compile", config, "--lazy-unpickle"])
    assert (result.exit_code, result.exception) == (0, None)
    assert "dare_ties, 2 models, bfloat16" in result.output

    parameters = {"normalize": True, "lambda": 0.5, "sampling": "magnitude"}
    for method, given in (("dare_ties", parameters), ("dare_linear", {"rounding": "stochastic"})):
        config = write(
            dare(folder, method, weight=1e-30, **given) | {"dtype": "float32"}, tmp_path / "o.yml"
        )
        found = set(compile_command.cases_of(config, MergeOptions()))
        compiled._LOADED.clear()
        merge_yaml(yaml.safe_load(Path(config).read_text()), tmp_path / method)
        assert found == {case for case, _ in compiled._LOADED}
        wide = method == "dare_linear"  # for such a weight, which the other one normalizes
        assert [case.steps.dtype == torch.float64 for case in found] == [wide]


@needs_compiler
def test_the_command_makes_the_usual_cases(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Case] = []
    monkeypatch.setattr(building, "build", lambda cases, done: wanted.extend(cases))
    assert CliRunner().invoke(cli.main, ["compile"]).exit_code == 0
    assert len(set(wanted)) == 6
    assert case_of("ties") in wanted


def test_what_the_command_cannot_do(
    llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def invoke(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.main, ["compile", *arguments])
        return result.exit_code, " ".join(result.output.split())

    missing = str(tmp_path / "missing.yml")
    code, said = invoke(missing)
    assert code == 2
    assert missing in said
    small = write(dare(llamas), tmp_path / "small.yml")
    assert invoke(small) == (
        0,
        "Nothing to compile: no tensor is large enough, or is merged by our methods.",
    )
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("PATH", "/nowhere")
    code, said = invoke()
    assert code == 2
    assert "This cannot be compiled: " in said
    monkeypatch.setattr(compiled, "OLDEST_TORCH", (99, 1))
    assert invoke()[0] == 2


@needs_compiler
def test_the_doctor_tells_of_it_and_clears_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(rf"8 packages, 1\d\.\d MB, in {cache}/compiled", doctor._compiled().found)
    spoil(packages.path(case_of("ties")), "of another torch")
    spoil(packages.path(case_of("linear")), "cut off")
    assert "; 2 for another torch, processor or version: doctor" in doctor._compiled().found
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert doctor._compiled().found.endswith("MERGEKIT_DARE_COMPILE says to use none")
    monkeypatch.delenv(compiled.SWITCH)
    packages.path(case_of("linear")).chmod(0o666)
    assert "None is used that is not yours alone: others may" in str(doctor._compiled().remedy)
    (cache / "compiled" / "building-left").mkdir()
    (cache / "compiled" / "not ours").touch()
    CliRunner().invoke(cli.main, ["doctor", "--clear-cache"])
    assert [file.name for file in packages.folder().iterdir()] == ["not ours"]
    assert doctor._compiled().found == f"none in {cache}/compiled"


@needs_compiler
def test_by_torchs_own_loader(
    cache: Path, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a later torch has no such C interface."""

    def not_there(*arguments: Any) -> native.Code:
        raise AttributeError("undefined symbol: aoti_torch_create_tensor_from_blob")

    monkeypatch.setattr(native, "_by_c_interface", not_there)
    base, entries, settings = entries_of("ties", 3 * CHUNK)
    plain, with_compiled = merge_both_ways(base, entries, settings)
    assert_same_bits(with_compiled, plain)
    assert chunks == [0, 3]


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_after_a_fork(cache: Path, chunks: list[int]) -> None:
    base, entries, settings = entries_of("ties", 3 * CHUNK)
    plain, _ = merge_both_ways(base, entries, settings)
    child = os.fork()
    if child == 0:
        try:
            merged = merging.merge(base, entries, settings)
            torch.set_num_threads(1)  # its other threads, by which it compares, are not here
            os._exit(0 if torch.equal(bits(merged), bits(plain)) and chunks[-1] == 3 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("value", [None, "", "0", "off"])
def test_nothing_is_compiled_unasked(
    value: str | None,
    empty: Path,
    chunks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if value is not None:
        monkeypatch.setenv(compiled.SWITCH, value)
    base, entries, settings = entries_of("ties", CHUNK)
    merging.merge(base, entries, settings)
    assert chunks == [0]
    assert not empty.exists()
    assert not caplog.messages


def test_not_for_very_many_models_or_none(
    empty: Path, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compiled.SWITCH, "1")
    base, tuned = family(compiled.MOST_MODELS + 1, CHUNK)
    merging.merge(base, models(tuned, 0.1, 0.5), recipe(LINEAR))
    merging.merge(base, models(tuned, 0.0, 0.5), recipe(LINEAR))
    assert sum(chunks) == 0
    assert not empty.exists()


@needs_compiler
def test_what_is_missing_is_made_when_asked_for(
    empty: Path,
    chunks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a folder with a space and a quote, which is this user's alone."""
    folder = empty / "a b'c"
    monkeypatch.setenv(packages.FOLDER, str(folder))
    monkeypatch.setenv(compiled.SWITCH, "1")
    base, entries, settings = entries_of("ties", CHUNK)
    plain, with_compiled = merge_both_ways(base, entries, settings)
    assert_same_bits(with_compiled, plain)
    assert chunks == [0, 1]
    (message,) = caplog.messages
    assert message.startswith("compiling dare_ties, 2 models, bfloat16 for this machine: once")
    (package,) = packages.all_files()
    assert package.stat().st_mode & 0o777 == 0o600
    assert package.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(file.name for file in package.parent.iterdir()) == ["lock", package.name]


def spoil(file: Path, how: str) -> str:
    """Make a package unusable; return what is said of it."""
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return ""
    if how == "cut off":
        file.write_bytes(content[: len(content) // 2])
        return "is damaged"
    if how == "a flipped bit":  # in the library
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return "damaged"
    if how == "empty":
        file.write_bytes(b"")
        return "is damaged"
    if how == "of another torch":
        other = zipfile.ZipFile(file)
        members = {name: other.read(name) for name in other.namelist()}
        with zipfile.ZipFile(file, "w") as made:
            for name, member in members.items():
                made.writestr(name, member.replace(torch.__version__.encode(), b"2.0.0"))
        return "was made for something else"
    if how == "a link":
        file.rename(file.with_suffix(".moved"))
        file.symlink_to(file.with_suffix(".moved"))
        return "cannot be read"
    if how == "writable by others":
        file.chmod(0o622)
        return "others may write to"
    if how == "in a folder that others may write to":
        file.parent.chmod(0o777)
        return "others may write to"
    assert how == "of another user"
    return "belongs to another user"


UNUSABLE = [
    "missing",
    "cut off",
    "a flipped bit",
    "empty",
    "of another torch",
    "a link",
    "writable by others",
    "in a folder that others may write to",
    "of another user",
]


@needs_compiler
@pytest.mark.parametrize("how", UNUSABLE)
def test_a_package_that_cannot_be_used(
    how: str,
    cache: Path,
    chunks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    said = spoil(packages.path(case_of("ties")), how)
    if how == "of another user":
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    for _ in range(2):
        base, entries, settings = entries_of("ties", 2 * CHUNK)
        plain, with_compiled = merge_both_ways(base, entries, settings)
        assert_same_bits(with_compiled, plain)
    assert chunks == [0] * 4
    assert [said in message for message in caplog.messages] == ([True] if said else [])
    assert all(m.startswith("merging without compiled code: ") for m in caplog.messages)


@needs_compiler
@pytest.mark.parametrize("how", ["cut off", "of another torch", "writable by others"])
def test_such_a_package_is_made_anew(
    how: str, cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is another test's matter."""
    case = case_of("ties")
    spoil(packages.path(case), how)

    def copy(cases: list[Case], temporary: Path, done: Any) -> None:
        assert cases == [case]
        packages.write(case, (made / "compiled" / packages.path(case).name).read_bytes())

    monkeypatch.setattr(building, "_build_in_child", copy)
    with pytest.raises(NoPackageError):
        packages.library(packages.read(case))
    building.build([case])
    assert packages.library(packages.read(case))
    assert list(packages.folder().glob("building-*")) == []


def test_one_line_where_the_cache_is_unusable(
    empty: Path,
    chunks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    empty.touch()
    monkeypatch.setenv(compiled.SWITCH, "1")
    for name in ("ties", "linear"):
        base, entries, settings = entries_of(name, CHUNK)
        plain, with_compiled = merge_both_ways(base, entries, settings)
        assert_same_bits(with_compiled, plain)
    assert chunks == [0] * 4
    lines = [line for line in caplog.messages if line.startswith("merging without")]
    assert lines == [
        f"merging without compiled code: {empty}/compiled cannot be made: Not a directory"
    ]


def test_one_line_where_there_is_no_compiler(
    empty: Path,
    chunks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing is left over of what was begun."""
    monkeypatch.setenv(compiled.SWITCH, "1")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("PATH", "/nowhere")
    base, entries, settings = entries_of("ties", CHUNK)
    plain, with_compiled = merge_both_ways(base, entries, settings)
    assert_same_bits(with_compiled, plain)
    assert chunks == [0, 0]
    (line,) = (line for line in caplog.messages if line.startswith("merging without"))
    assert "compiler" in line.lower()
    monkeypatch.setattr(torch, "__file__", "/a b/torch/__init__.py")
    assert building._reason("Traceback:\n  x\nCppCompileError: C++ compile error\n") == (
        "CppCompileError: C++ compile error "
        "(torch's compiler does not bear the space in /a b/torch/__init__.py)"
    )
    assert [file.name for file in packages.folder().iterdir()] == ["lock"]


def test_one_line_where_torch_is_too_old(
    chunks: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "OLDEST_TORCH", (99, 1))
    base, entries, settings = entries_of("ties", CHUNK)
    merging.merge(base, entries, settings)
    assert not caplog.messages  # nobody has asked
    compiled._LOADED.clear()
    monkeypatch.setenv(compiled.SWITCH, "1")
    for _ in range(2):
        merging.merge(base, entries, settings)
    assert chunks == [0] * 3
    (message,) = caplog.messages
    assert message == "merging without compiled code: it needs torch 99.1 or later"


@needs_compiler
def test_one_line_where_compiled_code_fails(
    cache: Path,
    chunks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the middle of a tensor, after it has written half a chunk."""
    load, calls = native.load, 0

    def load_what_fails(*arguments: Any) -> native.Code:
        run = load(*arguments)

        def fails_at_the_fourth_call(vectors: Any, numbers: Any) -> float:
            nonlocal calls
            calls += 1
            if calls >= 4:
                vectors[0][: CHUNK // 2] = 7
                raise RuntimeError("no space left\nand a traceback")
            return run(vectors, numbers)

        return fails_at_the_fourth_call

    monkeypatch.setattr(native, "load", load_what_fails)
    for _ in range(2):
        base, entries, settings = entries_of("linear", 5 * CHUNK)
        plain, with_compiled = merge_both_ways(base, entries, settings)
        assert_same_bits(with_compiled, plain)
    assert chunks == [0, 1, 0, 0]  # the first two calls were the comparison
    assert caplog.messages == ["merging without compiled code: RuntimeError: no space left"]


@needs_compiler
@pytest.mark.parametrize("where", ["the last whole vector", "the end", "a rest"])
def test_one_line_where_compiled_code_is_wrong(
    where: str,
    cache: Path,
    chunks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    load = native.load

    def load_what_errs(*arguments: Any) -> native.Code:
        run = load(*arguments)

        def one_bit_off(vectors: Any, numbers: Any) -> float:
            norm = run(vectors, numbers)
            elements = len(vectors[0])
            if where != "a rest" or elements % 64 != 0:
                place = elements // 64 * 64 - 1 if where == "the last whole vector" else -1
                vectors[0].view(torch.int16)[place] += 1
            return norm

        return one_bit_off

    monkeypatch.setattr(native, "load", load_what_errs)
    base, entries, settings = entries_of("linear", 3 * CHUNK)
    for _ in range(2):
        plain, with_compiled = merge_both_ways(base, entries, settings)
        assert_same_bits(with_compiled, plain)
    assert chunks == [0] * 4
    (message,) = caplog.messages
    assert message.endswith("it gives other results here, which is an error of the compiler")


@needs_compiler
def test_a_larger_chunk_is_compared_anew(
    cache: Path, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a loop may go wrong only at its end."""
    calls: list[int] = []
    load = native.load

    def load_and_count(*arguments: Any) -> native.Code:
        run = load(*arguments)

        def count(vectors: Any, numbers: Any) -> float:
            calls.append(len(vectors[0]))
            return run(vectors, numbers)

        return count

    monkeypatch.setattr(native, "load", load_and_count)
    for elements in (64, 8, 512, CHUNK + 64, 2 * CHUNK):
        base, entries, settings = entries_of("ties", elements)
        plain, with_compiled = merge_both_ways(base, entries, settings)
        assert_same_bits(with_compiled, plain)
    compared = [64, 52, 512, 500, CHUNK, CHUNK - 12]
    merged = [64, 8, 512, CHUNK, 64, CHUNK, CHUNK]
    assert sorted(calls) == sorted(compared + merged)


@needs_compiler
def test_an_interrupted_build_leaves_nothing(empty: Path) -> None:
    """Neither files nor processes."""
    program = """
from mergekit_dare.kernel import building
from tests.kernel.test_compiled import case_of
print('begins', flush=True)
building.build([case_of('ties')])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    while not list(packages.folder().glob("building-*/inductor/*")):
        assert process.poll() is None
    process.send_signal(2)
    process.wait(timeout=60)
    assert [file.name for file in packages.folder().iterdir()] == ["lock"]
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(empty) not in running.stdout


def test_cases_as_text() -> None:
    for name in CASES:
        case = case_of(name)
        assert Case.from_json(case.as_json()) == case
    assert len({packages.path(case_of(name)) for name in CASES}) == len(CASES)
    assert str(case_of("drawn")) == (
        "dare_ties, 3 models, bfloat16, normalize, by magnitude, stochastic, no rescale"
    )
    # Where it is in the factors, it is no case of its own.
    base, entries, settings = entries_of("linear", 4000)
    job = merging.plan(base, entries, Recipe(**{**vars(settings), "rescale": False}))
    assert Case.of(job.vectors, job.steps) == case_of("linear")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packages.FOLDER, "~/own")
    assert packages.folder() == Path.home() / "own" / "compiled"
    monkeypatch.delenv(packages.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert packages.folder() == Path("/somewhere/mergekit-dare/compiled")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert packages.folder() == Path.home() / ".cache/mergekit-dare/compiled"

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert packages.folder().parent.name == f"mergekit-dare-{os.getuid()}"

"""Where Numba is missing, broken or switched off, and wherever its cache may or may not be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mergekit_dare.kernel import loops
from tests.running import run_command

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import torch
from mergekit.merge_methods import merge_tensors
assert "numba" not in sys.modules  # it is imported when the first tensor is merged
base = torch.arange(70_000).div(70_000).bfloat16()
parameters = {"weight": 0.5, "density": 0.5, "seed": 1}
for _ in range(2):
    merged = merge_tensors([base, base + 1 / 128], "dare_ties", parameters=parameters, base_index=0)
assert merged.isfinite().all()
print(merged.double().sum().item(), int((merged != base).sum()))
"""


def merge(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Merge in a process whose user has nothing compiled yet."""
    usual = {"HOME": str(folder), "XDG_CACHE_HOME": ""}
    return run_command(sys.executable, "-c", PROGRAM, check=True, cwd=None, **usual | environment)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A home where the loops are compiled, and what is merged."""
    home = tmp_path_factory.mktemp("a home")
    merged = merge(home)
    assert merged.stderr.count("Numba is compiling the merge loops") == 1
    return home, merged.stdout


@pytest.fixture(autouse=True)
def _nothing_beside_the_source() -> Iterator[None]:
    yield
    assert not [*Path(loops.__file__).parent.rglob("*.nbi")]


def test_what_is_compiled_is_kept(warm: tuple[Path, str]) -> None:
    home, expected = warm
    kept = home / ".cache" / "mergekit-dare"
    files = {file: file.stat().st_mtime_ns for file in kept.rglob("*.nbc")}
    assert files
    again = merge(home)
    assert (again.stdout, again.stderr) == (expected, "")
    assert {file: file.stat().st_mtime_ns for file in kept.rglob("*.nbc")} == files


def test_a_damaged_cache(warm: tuple[Path, str], tmp_path: Path) -> None:
    home, expected = warm
    for file in (home / ".cache").rglob("*.nb?"):
        target = tmp_path / file.relative_to(home)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes()[:-100])
    fixed = merge(tmp_path)
    assert fixed.stdout == expected
    assert "without Numba" not in fixed.stderr
    assert merge(tmp_path).stderr == ""


def test_without_a_cache(warm: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    merged = merge(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert merged.stdout == warm[1]
    assert merged.stderr.count("Numba compiles again in each process") == 1


def test_the_user_names_a_cache(warm: tuple[Path, str], tmp_path: Path) -> None:
    named = tmp_path / "named"
    assert merge(tmp_path, NUMBA_CACHE_DIR=str(named)).stdout == warm[1]
    assert [*named.rglob("*.nbc")]
    assert not (tmp_path / ".cache" / "mergekit-dare").exists()


@pytest.mark.parametrize(
    ("module", "variable", "said"),
    [
        (
            "raise ImportError('numba needs NumPy 2.4 or less')",
            {},
            "NumPy 2.4 or less; pip install",
        ),
        (
            "raise ModuleNotFoundError(\"No module named 'numba'\")",
            {},
            "pip install --upgrade numba",
        ),
        ("raise RuntimeError('broken')", {}, "broken; pip install --upgrade numba"),
        (None, {"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT is set; unset it"),
    ],
    ids=["too new numpy", "missing", "broken", "switched off"],
)
def test_without_numba(
    module: str | None,
    variable: dict[str, str],
    said: str,
    warm: tuple[Path, str],
    tmp_path: Path,
) -> None:
    if module is not None:
        (tmp_path / "numba.py").write_text(module)
        variable = {"PYTHONPATH": str(tmp_path)}
    merged = merge(tmp_path, **variable)
    assert merged.stdout == warm[1]
    assert merged.stderr.count("merging on the CPU without Numba") == 1
    assert said in merged.stderr
    assert len(merged.stderr.splitlines()) == 1


def test_settings_of_numba_have_a_cache_of_their_own(
    warm: tuple[Path, str], tmp_path: Path
) -> None:
    """One merge without optimization must not make all others slow."""
    slow = merge(tmp_path, NUMBA_OPT="0", NUMBA_DEVELOPER_MODE="0")
    assert slow.stdout == warm[1]
    assert "Numba is compiling the merge loops" in merge(tmp_path).stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_full_disk(warm: tuple[Path, str], tmp_path: Path) -> None:
    """What is compiled is used, though it cannot be kept."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n{PROGRAM}"
    ignored = f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{limited}"
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    merged = run_command(sys.executable, "-c", ignored, check=True, cwd=None, **home)
    assert merged.stdout == warm[1]
    assert merged.stderr.count("compiles again in each process") == 1
    assert "File too large" in merged.stderr
    assert "without Numba" not in merged.stderr


def test_a_fork_waits_for_what_is_being_compiled(warm: tuple[Path, str], tmp_path: Path) -> None:
    forks = (
        PROGRAM.partition("for _ in")[0]
        + """
import os, signal, threading, time
tensors = [base, base + 1 / 128]  # in the child, torch itself would wait for its threads
def merge():
    merge_tensors(tensors, "dare_ties", parameters=parameters, base_index=0)
other = threading.Thread(target=merge)
other.start()
time.sleep(1)
if os.fork() == 0:
    signal.alarm(60)
    merge()
    os._exit(7)
other.join()
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    )
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": ""}
    assert run_command(sys.executable, "-c", forks, check=True, cwd=None, **home).stdout == "7\n"


def test_several_processes_compile_at_once(warm: tuple[Path, str], tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        merged = [*pool.map(lambda _: merge(tmp_path), range(3))]
    assert {each.stdout for each in merged} == {warm[1]}
    assert not any("without Numba" in each.stderr for each in merged)

"""What is not there on Windows: parts of Python, and paths with slashes.

Simulated on this system: Python loses what only POSIX has, after other packages were imported,
and before ours is. Real Windows has not been tried.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest
from click.testing import CliRunner

from mergekit_dare.cli import main
from mergekit_dare.diagnostics.models import files
from tests import zoo
from tests.running import PROJECT, dare, write

MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
ATTRIBUTES = {
    "os": (
        "fork forkpty getgid getuid geteuid getloadavg getpgid killpg nice posix_spawn pread "
        "register_at_fork sched_getaffinity sched_setaffinity setsid sysconf uname "
        "O_DIRECTORY O_NOFOLLOW"
    ),
    "signal": "SIGALRM SIGCHLD SIGHUP SIGKILL SIGUSR1 alarm pthread_sigmask setitimer",
    "mmap": "MADV_NORMAL MADV_RANDOM MADV_SEQUENTIAL MADV_WILLNEED",
    "time": "tzset",
}
# Run before a program; other packages are not ours to test, and believe that they are on POSIX.
WITHOUT_POSIX = f"""
import os
os.environ["MERGEKIT_DARE"] = "0"
import click, matplotlib, mergekit.merge_methods, mergekit.plan, mergekit.card, multiprocessing
import multiprocessing.context, numba, peft, torch, tqdm, transformers
from mergekit.scripts import run_yaml
import numba.core.caching, numba.core.typed_passes, numba.np.ufunc
del os.environ["MERGEKIT_DARE"]
import importlib, sys
for name in [name for name in sys.modules if name.split(".")[0] == "mergekit_dare"]:
    del sys.modules[name]
for name in {MODULES!r}:
    sys.modules[name] = None
for name, attributes in {ATTRIBUTES!r}.items():
    for attribute in attributes.split():
        vars(importlib.import_module(name)).pop(attribute, None)
"""
IMPORT_ALL = """
import pkgutil, mergekit_dare
for module in pkgutil.walk_packages(mergekit_dare.__path__, "mergekit_dare."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def run_without_posix(program: str, *arguments: str, code: int = 0) -> str:
    result = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT_POSIX}\n{program}", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=PROJECT,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_every_module_can_be_imported() -> None:
    assert run_without_posix(f"{IMPORT_ALL}\nprint(mergekit_dare.register())") == "True\n"


COMMANDS = """
import mergekit_dare, mergekit_dare.cli
assert mergekit_dare.register()
config, merged, by_name = sys.argv[1:]
def run(command, *arguments):
    try:
        command.main(args=arguments)
    except SystemExit as left:
        print(f"exit code {int(left.code or 0)}")
run(run_yaml.main, config, merged, "--quiet")
ours = mergekit_dare.cli.main
run(ours, "check", "--files", config)
run(ours, "explain", config)
run(ours, "inspect", config)
run(ours, "by-name", config, by_name, "--quiet")
run(ours, "verify", merged)
run(ours, "doctor")
"""


@pytest.mark.slow
def test_commands_and_a_merge(llamas: Path, tmp_path: Path) -> None:
    config = write(dare(llamas, seed=4), tmp_path / "config.yml")
    text = Path(config).read_text()
    Path(config).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    outs = [tmp_path / "merged", tmp_path / "by name"]
    printed = run_without_posix(COMMANDS, config, *map(str, outs))
    assert printed.count("exit code 0\n") == 7, printed
    assert "No problems found.\n" in printed
    assert "Identical to the byte" in printed
    assert "(mergekit-dare " in (outs[0] / "README.md").read_text()
    zoo.assert_same_tensors(zoo.load(outs[0]), zoo.load(outs[1]))


SPAWN = """
import multiprocessing, sys
from mergekit.scripts import run_yaml
def merge(config, out):
    import mergekit.merge_methods
    print(type(mergekit.merge_methods.get("dare_ties")).__module__, flush=True)
    run_yaml.main(args=[config, out, "--quiet"], standalone_mode=False)
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=merge, args=sys.argv[1:])
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


@pytest.mark.slow
def test_a_merge_in_a_spawned_process(llamas: Path, tmp_path: Path) -> None:
    """As all child processes are on Windows and macOS: nothing is inherited."""
    config = write(dare(llamas, seed=4), tmp_path / "config.yml")
    (tmp_path / "spawn.py").write_text(SPAWN)
    command = [sys.executable, str(tmp_path / "spawn.py"), config, str(tmp_path / "out")]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert printed.stdout == "mergekit_dare.plugin.methods\n"
    assert "(mergekit-dare " in (tmp_path / "out" / "README.md").read_text()


class WindowsPath(PureWindowsPath):
    """A path on a Windows where nothing exists."""

    def exists(self) -> bool:
        return False

    def is_dir(self) -> bool:
        return False


WINDOWS_NAMES = [
    r"D:\Models\base",
    "D:/Models/base",
    "D:/base",
    "D:base",
    r"Models\base",
    r".\base",
    r"..\base",
    r"\\server\share\base",
    r"\\?\D:\Models\base",
]


@pytest.mark.parametrize("path_type", [Path, WindowsPath])
@pytest.mark.parametrize("name", WINDOWS_NAMES)
def test_paths_of_windows_are_not_on_the_hub(
    name: str, path_type: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "Path", path_type)
    assert files.is_local(name)
    assert not files.looks_like_a_hub_name(name)


@pytest.mark.parametrize("path_type", [Path, WindowsPath])
@pytest.mark.parametrize("name", ["owner/name", "gpt2"])
def test_names_on_the_hub_stay_what_they_are(
    name: str, path_type: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "Path", path_type)
    assert not files.is_local(name)


def windows_config(folder: Path, base: str, model: str) -> str:
    """Write a config as an editor on Windows does: with CRLF, and a byte-order mark."""
    text = (
        f"merge_method: dare_ties\nbase_model: {base}\nmodels:\n  - model: {model}\n"
        "    parameters:\n      weight: 0.5\n      density: 0.5\nparameters:\n  seed: 4\n"
        "dtype: bfloat16\n"
    )
    path = folder / "config.yml"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    return str(path)


def ask(*arguments: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output.splitlines()


@pytest.mark.parametrize("name", WINDOWS_NAMES)
def test_check_and_explain_of_paths_of_windows(name: str, tmp_path: Path) -> None:
    config = windows_config(tmp_path, name, f"{name}2")
    assert ask("check", config) == (0, ["No problems found."])
    assert ask("check", "--files", config) == (
        1,
        [
            f"{config}:2: error: base_model: {name}: there is no folder {name} [unusable-model]",
            f"{config}:4: error: - model: {name}2: there is no folder {name}2 [unusable-model]",
        ],
    )
    assert ask("explain", config) == (2, [f"there is no folder {name}"])


def test_a_first_line_is_shown_without_its_byte_order_mark(tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_bytes(b"\xef\xbb\xbfmerge_methods: linear\r\n")
    assert ask("check", str(config))[1][0].startswith(f"{config}:1: error: merge_methods: linear: ")


def test_escapes_in_a_path_in_double_quotes(tmp_path: Path) -> None:
    config = windows_config(tmp_path, r'"D:\new\base"', r'"D:\temp\a"')
    code, lines = ask("check", "--files", config)
    assert code == 1
    assert lines[0].endswith(
        "contains the control character '\\n': write it in single quotes, as a backslash in double "
        "quotes is an escape [unusable-model]"
    )
    config = windows_config(tmp_path, r'"D:\Models\base"', "a")
    code, lines = ask("check", config)
    assert code == 2
    assert "write the path in single quotes" in lines[0]


def test_explain_shortens_paths_of_windows() -> None:
    from mergekit_dare.commands.explain_words import _shortened

    assert _shortened(r"D:\Models\of\all\kinds\math+D:/adapters/code/") == "math+code"

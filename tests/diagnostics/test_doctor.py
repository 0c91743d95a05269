"""The doctor's report, where all is well and where something is off."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_dare.cli import main
from mergekit_dare.diagnostics import installation as doctor
from tests.running import PROJECT, SCRIPTS, run_command

pytestmark = pytest.mark.slow


def test_all_is_well() -> None:
    path = f"{SCRIPTS}:/usr/bin:/bin"
    result = run_command("mergekit-dare", "doctor", PATH=path)
    lines = result.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert lines[-3] == "ok  this interpreter: dare_linear and dare_ties from mergekit-dare"
    assert lines[-2].endswith("mergekit-yaml): dare_linear and dare_ties from mergekit-dare")
    assert re.match(r"ok  Numba: \d.*, which keeps compiled code in .*mergekit-dare", lines[-1])
    report = json.loads(run_command("mergekit-dare", "doctor", "--json", PATH=path).stdout)
    assert [line["remedy"] for line in report] == [None] * len(report)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKIT_DARE", "0")
    monkeypatch.setenv("PATH", "/nowhere")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "OFF MERGEKIT_DARE: 0\n    Unset MERGEKIT_DARE in the env" in result.output
    assert "OFF this interpreter: dare_linear and dare_ties from mergekit itself" in result.output
    assert "mergekit-yaml (" in result.output
    assert "(not on the PATH; call it by this path)" in result.output


def test_versions_and_start_up_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.4")
    line = doctor._mergekit()
    assert (line.found, line.remedy) == ("0.1.4", "Upgrade: pip install -U 'mergekit>=0.1.5'")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    assert doctor._mergekit().remedy == "Install it: pip install 'mergekit>=0.1.5'"
    assert doctor._startup_file().remedy is None
    monkeypatch.setattr(doctor, "distribution", missing)
    assert "was not installed by pip" in doctor._startup_file().found


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], doctor.Line]:
    """Ask of the mergekit-yaml of a PATH that begins with a folder, in another folder."""

    def line_of(folder: str) -> doctor.Line:
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.chdir(tmp_path)
        return doctor._command()

    return line_of


Ask = Callable[[str], doctor.Line]


def script(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "mergekit-yaml").write_text(text)
    (folder / "mergekit-yaml").chmod(0o755)
    return folder


@pytest.mark.parametrize("kind", ["trampoline", "shim", "exec of another", "pipx"])
def test_scripts_that_start_python_in_other_ways(kind: str, tmp_path: Path, ask: Ask) -> None:
    """As pip writes them where a path has a space, as pyenv does, and as people do."""
    if kind == "pipx" and " " in sys.executable:
        pytest.skip("no system takes a first line with this path")
    body = (SCRIPTS / "mergekit-yaml").read_text().split("\n", 1)[1]
    link = tmp_path / "with a space" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    text = {
        "pipx": f"#!{sys.executable} -E\n{body}",
        "trampoline": f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n{body}",
        "shim": f'#!/usr/bin/env bash\nexec "{SCRIPTS}/mergekit-yaml" "$@"\n',
        "exec of another": f'#!/bin/sh\nx=1\n"{SCRIPTS}/python" "{SCRIPTS}/mergekit-yaml" "$@"\n',
    }[kind]
    folder = script(tmp_path / "bin", text)
    line = ask(str(folder))
    assert line.name == f"mergekit-yaml ({folder}/mergekit-yaml)"
    assert (line.found, line.remedy) == ("dare_linear and dare_ties from mergekit-dare", None)


def test_a_folder_with_a_clone_of_mergekit(tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "mergekit").mkdir()
    (tmp_path / "mergekit" / "__init__.py").write_text("raise ImportError('not this one')")
    assert ask(str(SCRIPTS)).remedy is None
    assert doctor._active(True).remedy is None


def test_a_command_that_is_no_python(tmp_path: Path, ask: Ask) -> None:
    folder = script(tmp_path / "bin", "#!/bin/sh\necho broken >&2\nexit 3\n")
    assert ask(str(folder)).found == "cannot import mergekit: broken"


def test_beside_this_interpreter_but_not_on_the_path(ask: Ask) -> None:
    line = ask("/nowhere")
    assert line.remedy is None
    assert line.found.endswith("(not on the PATH; call it by this path)")


def test_a_start_up_file_in_a_folder_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_site_folders", lambda: {Path("/elsewhere")})
    line = doctor._startup_file()
    assert line.found.endswith("Python reads no start-up files in that folder")
    assert line.remedy is not None


class _Installed:
    """An installed file as importlib.metadata tells of it."""

    def __init__(self, path: Path) -> None:
        self.name, self.files = path.name, [self]
        self.locate = lambda: path


@pytest.mark.parametrize("stale", [doctor.STARTUP_FILE, doctor.STARTUP_ENTRY])
def test_a_start_up_file_of_an_earlier_layout(
    stale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in doctor._STARTUP_SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes().replace(b"\n", b"\r\n"))
    installed = _Installed(tmp_path / doctor.STARTUP_FILE)
    monkeypatch.setattr(doctor, "distribution", lambda name: installed)
    monkeypatch.setattr(doctor, "_site_folders", lambda: {tmp_path.resolve()})
    assert doctor._startup_file().remedy is None
    (tmp_path / stale).write_text("import mergekit_dare.autoload\n")
    line = doctor._startup_file()
    assert line.found == f"{tmp_path / stale} is of another version than the code"
    assert line.remedy == f"Run this in {PROJECT}: pip install -e ."
    monkeypatch.setattr(doctor, "_STARTUP_SOURCES", Path("/nowhere"))  # installed from a wheel
    assert doctor._startup_file().remedy is None


def test_not_active_though_nothing_is_wrong_above(monkeypatch: pytest.MonkeyPatch) -> None:
    said = subprocess.CompletedProcess([], 0, f"{doctor._MARK} dare_ties=other\n", "a\nwhy not\n")
    monkeypatch.setattr(doctor, "_ask", lambda command: said)
    again = "Install mergekit-dare again; until then, use: python -m mergekit_dare yaml CONFIG OUT"
    assert doctor._active(True).remedy == f"{again} It said: why not"
    assert doctor._active(False).remedy == "Fix the problems above."


@pytest.mark.parametrize("on_path", [False, True])
def test_mergekit_in_the_parent_environment(on_path: bool, tmp_path: Path) -> None:
    """``python -m venv --system-site-packages``, where the parent has mergekit and its program."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    scheme = "nt_user" if sys.platform == "win32" else "posix_user"
    folder = Path(sysconfig.get_path("purelib", scheme, {"userbase": str(parent)}))
    folder.mkdir(parents=True)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "mergekit_dare" not in path.name and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    body = (SCRIPTS / "mergekit-yaml").read_text().split("\n", 1)[1]
    script(parent / "bin", f"#!{sys.base_prefix}/bin/python3\n{body}")
    making = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(child)]
    subprocess.run(making, check=True)
    environment = {"PYTHONUSERBASE": str(parent), "PYTHONPATH": str(PROJECT), "HOME": "/nowhere"}
    environment["PATH"] = f"{parent / 'bin'}:/usr/bin:/bin" if on_path else "/usr/bin:/bin"
    result = subprocess.run(
        [child / "bin" / "python", "-m", "mergekit_dare", "doctor"],
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = result.stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if "OFF mergekit-yaml" in line]
    use = "python -m mergekit_dare yaml CONFIG OUT"
    if on_path:
        assert lines[at].endswith(": dare_linear and dare_ties from mergekit itself")
        assert lines[at + 1].endswith(f"environment of that command. Or, in this one, use: {use}")
    else:
        assert lines[at].endswith("neither on the PATH nor beside this Python")
        assert lines[at + 1] == f"    Use: {use}"
    assert f"Put {child}" not in result.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_is_no_verdict(tmp_path: Path) -> None:
    """From check, 1 would mean errors, and from verify a model that its config did not make."""
    config = tmp_path / "dare.yml"
    config.write_text("merge_method: dare_ties\n")
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [SCRIPTS / "mergekit-dare", "check", config],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("No space left on device")

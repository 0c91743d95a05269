"""The doctor's report, where all is well and where something is off."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_dare.cli import main
from mergekit_dare.diagnostics import doctor
from tests.running import SCRIPTS, run_command

pytestmark = pytest.mark.slow


def test_all_is_well() -> None:
    path = f"{SCRIPTS}:/usr/bin:/bin"
    result = run_command("mergekit-dare", "doctor", PATH=path)
    lines = result.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert lines[-2] == "ok  this interpreter: dare_linear and dare_ties: ours"
    assert lines[-1].endswith("mergekit-yaml): dare_linear and dare_ties: ours")
    report = json.loads(run_command("mergekit-dare", "doctor", "--json", PATH=path).stdout)
    assert [line["remedy"] for line in report] == [None] * len(report)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKIT_DARE", "0")
    monkeypatch.setenv("PATH", "/nowhere")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "OFF MERGEKIT_DARE: 0\n    Take MERGEKIT_DARE out of the env" in result.output
    assert "OFF this interpreter: dare_linear and dare_ties: mergekit's own" in result.output
    assert "mergekit-yaml (" in result.output
    assert "(not on the PATH: call it so)" in result.output


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


def line_of(command: str, folder: Path, path: str = "/usr/bin:/bin") -> str:
    result = run_command(
        "mergekit-dare", "doctor", check=False, cwd=folder, PATH=f"{command}:{path}"
    )
    return result.stdout.splitlines()[-1]


def script(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "mergekit-yaml").write_text(text)
    (folder / "mergekit-yaml").chmod(0o755)
    return folder


@pytest.mark.parametrize("kind", ["trampoline", "shim", "exec of another"])
def test_scripts_that_start_python_in_other_ways(kind: str, tmp_path: Path) -> None:
    """As pip writes them where a path has a space, as pyenv does, and as people do."""
    body = (SCRIPTS / "mergekit-yaml").read_text().split("\n", 1)[1]
    link = tmp_path / "with a space" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    text = {
        "trampoline": f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n{body}",
        "shim": f'#!/usr/bin/env bash\nexec "{SCRIPTS}/mergekit-yaml" "$@"\n',
        "exec of another": f'#!/bin/sh\nx=1\n"{SCRIPTS}/python" "{SCRIPTS}/mergekit-yaml" "$@"\n',
    }[kind]
    folder = script(tmp_path / "bin", text)
    assert line_of(str(folder), tmp_path) == (
        f"ok  mergekit-yaml ({folder}/mergekit-yaml): dare_linear and dare_ties: ours"
    )


def test_a_folder_with_a_clone_of_mergekit(tmp_path: Path) -> None:
    (tmp_path / "mergekit").mkdir()
    (tmp_path / "mergekit" / "__init__.py").write_text("raise ImportError('not this one')")
    assert line_of(str(SCRIPTS), tmp_path).startswith("ok ")


def test_a_command_that_is_no_python(tmp_path: Path) -> None:
    folder = script(tmp_path / "bin", "#!/bin/sh\necho broken >&2\nexit 3\n")
    result = run_command("mergekit-dare", "doctor", check=False, PATH=f"{folder}:/usr/bin:/bin")
    assert "cannot import mergekit: broken" in result.stdout


def test_beside_this_interpreter_but_not_on_the_path(tmp_path: Path) -> None:
    line = line_of("/nowhere", tmp_path)
    assert line.startswith("ok ")
    assert line.endswith("ours (not on the PATH: call it so)")


def test_a_start_up_file_in_a_folder_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_site_folders", lambda: {Path("/elsewhere")})
    line = doctor._startup_file()
    assert line.found.endswith("Python reads no start-up files in that folder")
    assert line.remedy is not None

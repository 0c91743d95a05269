"""The doctor's report, where all is well and where something is off."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

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
    assert "OFF mergekit-yaml: not on the PATH" in result.output


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


def test_another_interpreter() -> None:
    line = doctor._active("x", ["/nonexistent/python"])
    assert line.found.startswith("cannot be asked")
    line = doctor._active("x", ["/bin/false"])
    assert line.found == "cannot import mergekit: no reason given"

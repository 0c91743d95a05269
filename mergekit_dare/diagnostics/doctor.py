"""Is the plugin active here, and for ``mergekit-yaml``? If not, why, and what mends it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from mergekit_dare import __version__
from mergekit_dare.plugin import autoload, registration

STARTUP_FILE = "mergekit_dare.pth"
# Printed by the interpreter that is asked: each method's name and the module that it comes from.
_PROBE = (
    "import mergekit.merge_methods as m; "
    f"print(*(f'{{n}}={{type(m.get(n)).__module__}}' for n in {registration.OURS!r}))"
)


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        name: What was looked at.
        found: What was found.
        remedy: The sentence that mends it, or ``None`` if it is as it should be.

    """

    name: str
    found: str
    remedy: str | None = None


def examine() -> list[Line]:
    """Look at this interpreter and at the ``mergekit-yaml`` of the PATH."""
    return [
        Line("mergekit-dare", f"{__version__} in {Path(__file__).parent}"),
        Line("Python", f"{platform.python_version()} ({sys.executable})"),
        _package("torch", "pip install torch"),
        _mergekit(),
        _switch(),
        _startup_file(),
        _active("this interpreter", [sys.executable]),
        _command(),
    ]


def _package(name: str, remedy: str) -> Line:
    try:
        return Line(name, version(name))
    except PackageNotFoundError:
        return Line(name, "not installed", f"Install it: {remedy}")


def _mergekit() -> Line:
    oldest = ".".join(map(str, registration.OLDEST_MERGEKIT))
    line = _package("mergekit", f"pip install 'mergekit>={oldest}'")
    if line.remedy is None and registration.is_too_old(line.found):
        return Line(line.name, line.found, f"Upgrade: pip install -U 'mergekit>={oldest}'")
    return line


def _switch() -> Line:
    value = os.environ.get(autoload.SWITCH)
    if autoload.is_switched_off():
        remedy = f"Take {autoload.SWITCH} out of the environment: it switches the plugin off."
        return Line(autoload.SWITCH, str(value), remedy)
    return Line(autoload.SWITCH, "not set" if value is None else value)


def _startup_file() -> Line:
    """Find the file by the package's own list: site-packages may be anywhere."""
    name = "start-up file"
    remedy = "Install with pip; or use: python -m mergekit_dare yaml CONFIG OUT"
    try:
        files = distribution("mergekit-dare").files or []
    except PackageNotFoundError:
        return Line(name, "none: this copy was not installed by pip", remedy)
    for file in files:
        if file.name == STARTUP_FILE and Path(str(file.locate())).exists():
            return Line(name, str(file.locate()))
    return Line(name, "none", f"{remedy} (start-up files do not work with pip install --target)")


def _active(name: str, python: list[str]) -> Line:
    """Ask a fresh process, since this one may have registered our methods by itself."""
    try:
        asked = subprocess.run(
            [*python, "-c", _PROBE], capture_output=True, text=True, check=False, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Line(name, f"cannot be asked: {error}", f"See why {python[0]} does not run.")
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Line(name, f"cannot import mergekit: {last}", "Install mergekit there.")
    methods = dict(word.split("=", 1) for word in asked.stdout.split())
    theirs = [n for n in registration.OURS if not methods.get(n, "").startswith("mergekit_dare")]
    if theirs:
        remedy = f"Install mergekit-dare there: {python[0]} -m pip install mergekit-dare"
        if python[0] == sys.executable:
            remedy = "Mend the lines above."
        return Line(name, f"{' and '.join(theirs)}: mergekit's own", remedy)
    return Line(name, f"{' and '.join(registration.OURS)}: ours")


def _command() -> Line:
    """Ask the interpreter that runs the ``mergekit-yaml`` of the PATH."""
    found = shutil.which("mergekit-yaml")
    if found is None:
        remedy = f"Put {Path(sys.executable).parent} on the PATH."
        return Line("mergekit-yaml", "not on the PATH", remedy)
    with open(found, "rb") as script:
        first = script.readline().decode(errors="replace").strip()
    python = first.removeprefix("#!").split() if first.startswith("#!") else [sys.executable]
    return _active(f"mergekit-yaml ({found})", python)

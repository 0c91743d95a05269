"""Whether the plugin is active here and for ``mergekit-yaml``; if not, why, and how to fix it."""

from __future__ import annotations

import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

import mergekit_dare
from mergekit_dare import __version__
from mergekit_dare.plugin import autoload, registration

STARTUP_FILE, STARTUP_ENTRY = "mergekit_dare.pth", "mergekit_dare.start"
# A project's folder has what an installation of it copies; an installed package does not.
_STARTUP_SOURCES = Path(mergekit_dare.__file__).parent / "plugin" / "startup"
_BY_MODULE = "python -m mergekit_dare yaml CONFIG OUT"
# The interpreter that is asked prints each method's name and the module that it comes from.
_MARK = "mergekit-dare doctor:"
_PROBE = (
    "import mergekit.merge_methods as m; "
    f"print({_MARK!r}, *(f'{{n}}={{type(m.get(n)).__module__}}' for n in {registration.OURS!r}), "
    "flush=True)"
)


@dataclass(frozen=True)
class Line:
    """One line of the report.

    Attributes:
        name: What was examined.
        found: What was found.
        remedy: How to fix it, in one sentence; ``None`` if it is as it should be.

    """

    name: str
    found: str
    remedy: str | None = None


def examine() -> list[Line]:
    """Examine this interpreter and the ``mergekit-yaml`` on the PATH."""
    found = [
        Line("mergekit-dare", f"{__version__} in {Path(mergekit_dare.__file__).parent}"),
        Line("Python", f"{platform.python_version()} ({sys.executable})"),
        _package("torch", "pip install torch"),
        _mergekit(),
        _switch(),
        _startup_file(),
    ]
    return [*found, _active(all(line.remedy is None for line in found)), _command(), _numba()]


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


def _numba() -> Line:
    """Tell whether Numba compiles the loops that merge on a CPU."""
    name = "Numba"
    try:
        from mergekit_dare.kernel import compiling, loops  # noqa: F401
    except ImportError as error:
        return Line(
            name, "not used, so merges on a CPU take at least twenty times as long", f"{error}."
        )
    folder = compiling.cache_folder()
    if folder is None:
        remedy = "Set NUMBA_CACHE_DIR to a folder that can be written to."
        return Line(name, f"{version('numba')}, which compiles again in each process", remedy)
    return Line(name, f"{version('numba')}, which keeps compiled code in {folder}")


def _switch() -> Line:
    value = os.environ.get(autoload.SWITCH)
    if autoload.is_switched_off():
        remedy = f"Unset {autoload.SWITCH} in the environment: it switches the plugin off."
        return Line(autoload.SWITCH, str(value), remedy)
    return Line(autoload.SWITCH, "not set" if value is None else value)


def _startup_file() -> Line:
    """Find the file in the package's own list of files: site-packages may be anywhere."""
    name = "start-up file"
    remedy = f"Install with pip; or use: {_BY_MODULE}"
    try:
        files = distribution("mergekit-dare").files or []
    except PackageNotFoundError:
        return Line(name, "none: this copy was not installed by pip", remedy)
    for file in files:
        path = Path(str(file.locate()))
        if file.name == STARTUP_FILE and path.exists():
            if path.parent.resolve() in _site_folders():
                return _as_the_project_has_it(name, path)
            return Line(name, f"{path}: Python reads no start-up files in that folder", remedy)
    return Line(name, "none", f"{remedy} (start-up files do not work with pip install --target)")


def _as_the_project_has_it(name: str, path: Path) -> Line:
    """Compare start-up files with those that the project would install, if it is run from there.

    An editable installation takes new modules from the project's folder, but keeps old copies of
    these files, which may import a module that is no longer there.
    """
    for file in (path, path.with_name(STARTUP_ENTRY)):
        source = _STARTUP_SOURCES / file.name
        if file.exists() and source.exists() and _words(file) != _words(source):
            project = Path(mergekit_dare.__file__).parent.parent
            return Line(
                name,
                f"{file} is of another version than the code",
                f"Run this in {project}: pip install -e .",
            )
    return Line(name, str(path))


def _words(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8-sig", errors="replace").split()


def _site_folders() -> set[Path]:
    """Return the folders in which this Python looks for start-up files."""
    folders = [*site.getsitepackages(), *site.PREFIXES, sysconfig.get_paths()["purelib"]]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return {Path(folder).resolve() for folder in folders}


def _active(is_well_so_far: bool) -> Line:
    """Ask a new process, since this one may have registered our methods itself."""
    asked = _ask([sys.executable, "-c", _PROBE])
    remedy = "Fix the problems above."
    if is_well_so_far:
        said = [] if isinstance(asked, str) else asked.stderr.strip().splitlines()
        why = f" It said: {said[-1].strip()}" if said else ""
        remedy = f"Install mergekit-dare again; until then, use: {_BY_MODULE}{why}"
    return _answer("this interpreter", asked, remedy)


def _command() -> Line:
    """Ask the interpreter of the ``mergekit-yaml`` on the PATH, or of the one beside ours."""
    name = "mergekit-yaml"
    found = shutil.which(name)
    folders = (str(Path(sys.executable).parent), sysconfig.get_path("scripts"))
    script = found or shutil.which(name, path=os.pathsep.join(folders))
    if script is None:
        where = "neither on the PATH nor beside this Python"
        if find_spec("mergekit") is None:
            return Line(name, where, "Install mergekit.")
        return Line(name, where, f"Use: {_BY_MODULE}")
    remedy = "Install mergekit-dare into the environment of that command."
    if str(Path(script).parent) in folders:
        remedy = "Fix the problems above."
    elif find_spec("mergekit") is not None:
        remedy += f" Or, in this one, use: {_BY_MODULE}"
    line = _answer(f"{name} ({script})", _ask_command(script), remedy)
    if found is None:
        return Line(line.name, f"{line.found} (not on the PATH; call it by this path)", line.remedy)
    return line


def _ask_command(script: str) -> subprocess.CompletedProcess[str] | str:
    """Run a command until its Python has started, whatever starts it.

    There are too many kinds of shell scripts, trampolines and shims to parse. Each starts Python,
    which imports ``sitecustomize`` right after the start-up files: one of ours, which answers.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = f"import os\ntry:\n    {_PROBE}\nfinally:\n    os._exit(0)\n"
        Path(folder, "sitecustomize.py").write_text(program, encoding="utf-8")
        asked = _ask([script, "--help"], PYTHONPATH=folder, PYTHONSTARTUP="")
    if not isinstance(asked, str) and _MARK not in asked.stdout:
        with open(script, "rb") as opened:
            first = opened.readline().decode(errors="replace").strip()
        # In the script's first line, pipx tells Python to ignore the environment.
        python = first.removeprefix("#!").split() if first.startswith("#!") else []
        if python and Path(python[0]).name.startswith("python"):
            return _ask([*python, "-c", _PROBE])
    return asked


def _ask(command: list[str], **variables: str) -> subprocess.CompletedProcess[str] | str:
    """Run a command in a folder without modules; if it cannot be run, return the reason."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=120,
                cwd=folder,
                env=os.environ | variables,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)


def _answer(name: str, asked: subprocess.CompletedProcess[str] | str, remedy: str) -> Line:
    if isinstance(asked, str):
        return Line(name, f"cannot be run: {asked}", "Find out why it does not run.")
    answers = [line for line in asked.stdout.splitlines() if line.startswith(_MARK)]
    if not answers:
        last = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Line(name, f"cannot import mergekit: {last}", "Install mergekit there.")
    methods = dict(word.split("=", 1) for word in answers[-1].removeprefix(_MARK).split())
    theirs = [n for n in registration.OURS if not methods.get(n, "").startswith("mergekit_dare")]
    if theirs:
        return Line(name, f"{' and '.join(theirs)} from mergekit itself", remedy)
    return Line(name, f"{' and '.join(registration.OURS)} from mergekit-dare")

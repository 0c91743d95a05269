"""The user's cache of compiled code: one package of torch's AOTInductor for each case.

Packages are native code, so none is loaded that anybody else could have written. Each is made for
one processor, torch and formula, which its name and its content tell; it appears in one step, and
what is damaged or foreign is taken for not there. Files are in torch's own format, ``.pt2``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_dare.kernel import buffers
from mergekit_dare.kernel.formula import Combine, Steps, dtype_name

FOLDER = "MERGEKIT_DARE_CACHE"
# The part of a package's metadata that is ours.
KEY = "mergekit-dare"
_METADATA = "wrapper_metadata.json"
# What reading a damaged one may raise.
_DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, LookupError, TypeError)


class NoPackageError(Exception):
    """There is no package that can be used; the message says why, and is empty if it is missing."""


@dataclass(frozen=True)
class Case:
    """What code is compiled for; all numbers of the formula are its inputs.

    Attributes:
        steps: What is done to every chunk.
        base: The dtype of theta_0, and of the result.
        models: The dtype of each theta_k.

    """

    steps: Steps
    base: torch.dtype
    models: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, vectors: Sequence[Tensor], steps: Steps) -> Case:
        """Return the case of theta_0 and each theta_k."""
        base, *models = (vector.dtype for vector in vectors)
        if not (steps.by_magnitude or steps.rescale):  # it is in the factors
            steps = replace(steps, rescale=True)
        return cls(steps, base, tuple(models))

    def as_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` takes."""
        steps = {**asdict(self.steps), "combine": self.steps.combine.value}
        steps["dtype"] = dtype_name(self.steps.dtype)
        models = [dtype_name(dtype) for dtype in self.models]
        return {"steps": steps, "base": dtype_name(self.base), "models": models}

    @classmethod
    def from_json(cls, case: dict[str, Any]) -> Case:
        """Return the case that :meth:`as_json` made this of."""
        steps = {**case["steps"], "combine": Combine(case["steps"]["combine"])}
        steps["dtype"] = getattr(torch, steps["dtype"])
        models = tuple(getattr(torch, name) for name in case["models"])
        return cls(Steps(**steps), getattr(torch, case["base"]), models)

    def __str__(self) -> str:
        steps = self.steps
        words = [f"dare_{steps.combine.value}", f"{len(self.models)} models"]
        words.append("+".join(sorted({dtype_name(dtype) for dtype in (self.base, *self.models)})))
        if steps.dtype != torch.float32:
            words.append(f"in {dtype_name(steps.dtype)}")
        words += [
            name for name in ("normalize", "by_magnitude", "stochastic") if getattr(steps, name)
        ]
        words += ["lambda"] if steps.scale else []
        words += [] if steps.rescale else ["no rescale"]
        return ", ".join(words).replace("by_", "by ").replace("1 models", "1 model")


def folder() -> Path:
    """Return the folder of all packages, which need not be there.

    It is ``MERGEKIT_DARE_CACHE``, else ``mergekit-dare`` in XDG_CACHE_HOME, else in ``~/.cache``.
    """
    own, of_user = os.environ.get(FOLDER), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser() / "compiled"
    if of_user and os.path.isabs(of_user):  # by the specification, a relative one does not count
        return Path(of_user) / "mergekit-dare" / "compiled"
    try:
        return Path.home() / ".cache" / "mergekit-dare" / "compiled"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"mergekit-dare-{os.getuid()}" / "compiled"


def key(case: Case) -> dict[str, Any]:
    """Return what a package must have been made for."""
    return {**_surroundings(), "case": case.as_json()}


def path(case: Case) -> Path:
    """Return where the package of a case is, if there is one."""
    text = json.dumps(key(case), sort_keys=True).encode()
    word = f"{case.steps.combine.value}-{len(case.models)}x{dtype_name(case.base)}"
    return folder() / f"{word}-{hashlib.blake2b(text, digest_size=12).hexdigest()}.pt2"


@cache
def _surroundings() -> dict[str, Any]:
    """Return what all packages of this process depend on."""
    digest = hashlib.blake2b(digest_size=12)
    here = Path(__file__).parent
    for module in ("buffers", "building", "formula", "masks", "rounding", "scalars"):
        digest.update((here / f"{module}.py").read_bytes())
    return {
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "processor": _processor(),
        "formula": digest.hexdigest(),
        "chunk": buffers.CPU_CHUNK,
    }


def _processor() -> str:
    """Name what native code for this processor may rely on."""
    facts = [platform.system(), platform.machine(), torch.backends.cpu.get_cpu_capability()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    for line in lines:
        name = line.partition(":")[0].strip()
        if name in ("model name", "flags", "Features", "CPU implementer", "CPU part"):
            facts.append(line)
        if not line:  # the others of its cores are like the first
            break
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=12).hexdigest()


def make_folder() -> Path:
    """Return the folder of all packages; it is made, for this user alone.

    Raises:
        NoPackageError: it cannot be made, or is open to others.

    """
    made = folder()
    try:
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise NoPackageError(f"{made} cannot be made: {error.strerror}") from error
    problem = who_else_writes(made)
    if problem:
        raise NoPackageError(problem)
    return made


def who_else_writes(place: Path | int, name: str = "") -> str:
    """Return why a file or folder is not this user's alone, else an empty string.

    Args:
        place: Its path, or an open file.
        name: What to call an open file.

    """
    if not hasattr(os, "geteuid"):
        return "whose files are whose cannot be told on this system"
    found = os.fstat(place) if isinstance(place, int) else os.lstat(place)
    if found.st_uid != os.geteuid():
        return f"{name or place} belongs to another user"
    if stat.S_ISLNK(found.st_mode):
        return f"{name or place} is a link"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {name or place}: chmod go-w"
    return ""


def read(case: Case) -> bytes:
    """Return the package of a case, whole and of this user's making.

    Raises:
        NoPackageError: there is none, or none that can be used.

    """
    place = path(case)
    try:
        problem = who_else_writes(place.parent)
        if problem:
            raise NoPackageError(problem)
        handle = os.open(place, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError as error:
        raise NoPackageError("") from error
    except OSError as error:
        raise NoPackageError(f"{place} cannot be read: {error.strerror}") from error
    with open(handle, "rb") as file:
        # Of the file that is read, whatever becomes of its name meanwhile.
        problem = who_else_writes(file.fileno(), str(place))
        if problem:
            raise NoPackageError(problem)
        package = file.read()
    try:
        made_for = _key_of(package)
    except _DAMAGED as error:
        raise NoPackageError(f"{place} is damaged") from error
    if made_for != key(case):
        raise NoPackageError(f"{place} was made for something else")
    return package


def write(case: Case, package: bytes) -> None:
    """Put the package of a case where :func:`read` finds it, in one step.

    Raises:
        OSError: it cannot be written.

    """
    handle, name = tempfile.mkstemp(dir=folder(), prefix="building-")
    try:
        with open(handle, "wb") as file:
            file.write(package)
        os.replace(name, path(case))
    except BaseException:
        os.unlink(name)
        raise


def library(package: bytes) -> bytes:
    """Return a package's shared library; it has the checksum that it had when it was written.

    Raises:
        NoPackageError: it is damaged.

    """
    try:
        return _member(package, ".so")
    except _DAMAGED as error:
        raise NoPackageError("a package is damaged") from error


def _key_of(package: bytes) -> dict[str, Any]:
    """Return what a package was made for; raises one of _DAMAGED."""
    made_for: dict[str, Any] = json.loads(json.loads(_member(package, _METADATA))[KEY])
    return made_for


def _member(package: bytes, end: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(package)) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(end))
        return opened.read(name)  # which compares its checksum


def is_for_this_process(file: Path) -> bool:
    """Tell whether a file is a package for this torch, processor and formula; it is whole."""
    try:
        made_for = _key_of(file.read_bytes())
    except _DAMAGED:
        return False
    return {**made_for, "case": None} == {**_surroundings(), "case": None}


def all_files() -> list[Path]:
    """Return what is in the cache, of whatever version."""
    return sorted(folder().glob("*.pt2"))


def clear() -> None:
    """Remove all packages, and what interrupted builds left."""
    for pattern in ("*.pt2", "lock", "*.so", "building-*"):
        for left in folder().glob(pattern):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()

"""Compile the formula for cases ahead of time, in a process of its own.

torch's compiler is large, changes settings of its process, and may fail in ways of its own; so it
does not come into a process that merges. ``python -m mergekit_dare.kernel.building FOLDER CASE...``
is that process.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mergekit_dare.kernel import formula, packages
from mergekit_dare.kernel.buffers import CPU_CHUNK, Buffers
from mergekit_dare.kernel.formula import Numbers
from mergekit_dare.kernel.masks import LANES_PER_WORD
from mergekit_dare.kernel.packages import Case, NoPackageError

# Half a minute for the first and ten seconds for each other is usual.
_MOST_SECONDS_FOR_EACH = 600
# torch takes a size of 1 for one that is always so.
_LEAST_WORDS = 2


def build(cases: Sequence[Case], done: Callable[[Case], None] = lambda case: None) -> None:
    """Make the packages of cases, unless they are there.

    Several processes may do so at once: one builds, the others wait for it.

    Args:
        cases: One after the other: it takes ten seconds to find out what the compiler can do.
        done: Called with each that is there.

    Raises:
        NoPackageError: one cannot be made; the message says why. Those before it are there.

    """
    root = packages.make_folder()
    with _locked(root / "lock"):
        missing = []
        for case in cases:
            if _is_there(case):
                done(case)
            else:
                missing.append(case)
        if missing:
            # torch's command lines do not bear other characters.
            plain = re.fullmatch(r"[\w./+-]+", str(root), re.ASCII) is not None
            where = root if plain else None
            with tempfile.TemporaryDirectory(dir=where, prefix="building-") as temporary:
                _build_in_child(missing, Path(temporary), done)


def _is_there(case: Case) -> bool:
    try:
        packages.library(packages.read(case))
    except NoPackageError:
        return False
    return True


def _build_in_child(cases: Sequence[Case], temporary: Path, done: Callable[[Case], None]) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry),
        # Else they are folders that all users share, in which another one may be first.
        "TORCHINDUCTOR_CACHE_DIR": str(temporary / "inductor"),
        "TMPDIR": str(temporary),
    }
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(temporary)]
    command += [json.dumps(case.as_json()) for case in cases]
    with (temporary / "errors").open("w+", errors="replace") as errors:
        try:
            child = subprocess.Popen(
                command,
                cwd=temporary,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                start_new_session=True,  # with all that it starts, it is ended as one
            )
        except OSError as error:
            raise NoPackageError(f"Python cannot be started: {error}") from error
        limit = threading.Timer(_MOST_SECONDS_FOR_EACH * len(cases), _end, [child])
        try:
            limit.start()
            waiting = list(cases)
            assert child.stdout is not None
            for _ in filter(_DONE.__eq__, map(str.strip, child.stdout)):
                made = temporary / f"{len(cases) - len(waiting)}.pt2"
                packages.write(waiting[0], made.read_bytes())
                done(waiting.pop(0))
            child.wait()
        finally:
            limit.cancel()
            _end(child)
        if child.returncode != 0 or waiting:
            errors.seek(0)
            raise NoPackageError(_reason(errors.read()))


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _reason(errors: str) -> str:
    """Return the line of a traceback that names the error."""
    lines = [line.strip() for line in errors.splitlines() if line and not line[0].isspace()]
    named = [line for line in lines if ("Error" in line or "Exception" in line) and ":" in line]
    reason = (named or lines or ["the compiler ended, or took too long, without a word"])[-1]
    if " " in torch.__file__:
        return f"{reason} (torch's compiler does not bear the space in {torch.__file__})"
    return reason


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Wait until no other process is in such a block, where the system can tell."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        except (ImportError, OSError):  # some network file systems have no locks: build twice
            pass
        yield
    finally:
        os.close(handle)


def takes(elements: int) -> bool:
    """Tell whether a package takes a chunk of so many elements, which are CPU_CHUNK at most."""
    return elements % LANES_PER_WORD == 0 and elements >= _LEAST_WORDS * LANES_PER_WORD


class _Chunk(torch.nn.Module):
    """The merge of one chunk, as torch exports it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(
        self,
        out: Tensor,
        theta_0: Tensor,
        thetas: Sequence[Tensor],
        integers: Tensor,
        floats: Tensor,
    ) -> Tensor:
        # Buffers that the compiler sees come and go, so that it need not fill them.
        b = Buffers.allocate(theta_0.numel(), theta_0.device, self.case.steps.dtype)
        numbers = Numbers.from_vectors(integers, floats, len(thetas))
        return formula.merge_chunk(out, theta_0, list(thetas), numbers, self.case.steps, b)


def compile_to(case: Case, file: str) -> None:
    """Compile the formula for a case, in this process, into a package.

    It takes chunks of each size that :func:`takes` names.

    Raises:
        Exception: whatever torch's compiler raises.

    """
    models = len(case.models)
    theta_0 = torch.zeros(CPU_CHUNK, dtype=case.base)
    thetas = [torch.zeros(CPU_CHUNK, dtype=dtype) for dtype in case.models]
    integers = torch.ones(2 * models + 1, dtype=torch.int64)
    floats = torch.ones(3 * models + 1, dtype=torch.float64)
    words = torch.export.Dim("words", min=_LEAST_WORDS, max=CPU_CHUNK // LANES_PER_WORD)
    elements = {0: LANES_PER_WORD * words}
    with torch.no_grad():
        program = torch.export.export(
            _Chunk(case),
            (torch.empty_like(theta_0), theta_0, thetas, integers, floats),
            dynamic_shapes=(elements, elements, [elements] * models, None, None),
        )
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=file,
            inductor_configs={
                # Threads of ours run it, which wait for nobody (mergekit_dare.kernel.threads).
                "cpp.threads": 1,
                # Else SplitMix64's constants become a part of the code, and the C++ compiler draws
                # wrong conclusions from products that wrap around (mergekit_dare.kernel.masks).
                "always_keep_tensor_constants": True,
                "aot_inductor.metadata": {packages.KEY: json.dumps(packages.key(case))},
            },
        )


# What the child prints for each package that is there.
_DONE = "mergekit-dare: done"

if __name__ == "__main__":
    for number, text in enumerate(sys.argv[2:]):
        compile_to(Case.from_json(json.loads(text)), os.path.join(sys.argv[1], f"{number}.pt2"))
        print(f"\n{_DONE}", flush=True)

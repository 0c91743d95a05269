"""A folder that is there when it is whole, and never before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_existing(out: Path) -> None:
    """Refuse a folder that is there already, unless it is an empty one that can be replaced.

    Raises:
        FileExistsError: see above.

    """
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir() or any(out.iterdir()):
        raise FileExistsError(f"{out} is there already: name a folder that is not")
    if os.path.ismount(out) or out.samefile(Path.cwd()):
        raise FileExistsError(f"{out} is empty, but cannot be replaced: name a folder in it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder that becomes ``out`` when the block ends, and that is gone if it fails.

    What is killed leaves a hidden folder beside ``out``.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=".merging-"))
    try:
        yield made
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
        if out.is_dir():
            out.rmdir()
        made.rename(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise

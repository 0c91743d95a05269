"""mergekit 0.1.5's own tests, run with this package installed.

Only tests that compare dare_linear and dare_ties with the built-in's own random draws and its
L1 rescale may fail. They are listed here, and they must fail: were one to pass, the built-in
would be what ran.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

VERSION = "0.1.5"
REASON = "compares with a sparsify() call that draws from torch's generator and rescales by L1"
DIFFERENT = {
    "tests/test_merge_method_regressions.py::test_task_arithmetic_values_and_gradients"
    f"[{rescale}-{method}]": REASON
    for rescale in (False, True)
    for method in ("dare_linear", "dare_ties")
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mergekit's tests, from its source distribution."""
    folder = tmp_path_factory.mktemp("peer")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    downloaded = subprocess.run(
        [*command, "--no-build-isolation", "-d", folder, f"mergekit=={VERSION}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    if downloaded.returncode != 0 and "CI" not in os.environ:
        pytest.skip("the source distribution of mergekit cannot be downloaded")
    assert downloaded.returncode == 0, downloaded.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.split("/")[1:2] == ["tests"]]
        tar.extractall(folder, members=members, filter="data")
    tests = folder / "tests"
    shutil.move(folder / f"mergekit-{VERSION}" / "tests", tests)
    (tests / "__init__.py").touch()
    shutil.copy(Path(__file__).parent / "stand_in_common.py", tests / "common.py")
    return folder


@pytest.mark.slow
def test_peer_suite(suite: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "tests"],
        cwd=suite,
        env=os.environ | {"MERGEKIT_DARE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    print(result.stdout[-3000:])
    failed = set(re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE))
    assert failed == set(DIFFERENT)
    summary = re.search(r"(\d+) failed, (\d+) passed", result.stdout)
    assert summary is not None
    assert int(summary[1]) == len(DIFFERENT)
    assert int(summary[2]) > 500

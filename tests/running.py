"""Running mergekit's commands: in this process, or as real ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from mergekit.scripts import merge_raw_pytorch, multimerge, run_yaml
from torch import Tensor

from tests import zoo

Config = dict[str, Any]
SCRIPTS = Path(sys.executable).parent
PROJECT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__,
    reason="there is no g++, or torch's compiler cannot handle the space in torch's path",
)


def dare(
    folder: Path,
    method: str = "dare_ties",
    names: Iterable[str] = "ab",
    *,
    weight: float = 0.5,
    density: float = 0.5,
    **parameters: Any,
) -> Config:
    """Make a config that merges the models of a folder into its ``base``."""
    return {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / name), "parameters": {"weight": weight, "density": density}}
            for name in names
        ],
        "parameters": parameters,
    }


def write(config: Config | list[Config], path: Path) -> str:
    """Write one config, or the documents of several, as YAML; return the path."""
    documents = config if isinstance(config, list) else [config]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False), encoding="utf-8")
    return str(path)


def merge_yaml(config: Config, out: Path, *options: str) -> dict[str, Tensor]:
    """Run mergekit-yaml in this process and return the tensors that it wrote."""
    run_in_process(run_yaml.main, write(config, out / "in.yml"), str(out / "out"), *options)
    return zoo.load(out / "out")


def merge_multi(configs: list[Config], out: Path, *options: str) -> dict[str, Tensor]:
    """Run mergekit-multi in this process and return the final merge's tensors."""
    where = ["--out-path", str(out / "out"), "--intermediate-dir", str(out / "between")]
    run_in_process(multimerge.main, write(configs, out / "in.yml"), *where, *options)
    return zoo.load(out / "out")


def merge_pytorch(config: Config, out: Path, *options: str) -> dict[str, Tensor]:
    """Run mergekit-pytorch in this process and return the tensors that it wrote."""
    path = write(config, out / "in.yml")
    run_in_process(merge_raw_pytorch.main, path, str(out / "out"), *options)
    return zoo.load(out / "out")


def run_in_process(command: click.Command, *arguments: str) -> None:
    command.main(args=[*arguments, *QUIET[command]], standalone_mode=False)


QUIET: dict[click.Command, list[str]] = {
    run_yaml.main: ["--quiet"],
    multimerge.main: ["--quiet"],
    merge_raw_pytorch.main: [],
}


def run_command(
    *command: str, check: bool = True, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of this Python's environment, such as mergekit-yaml, and return its result."""
    first, *rest = command
    program = str(SCRIPTS / first) if (SCRIPTS / first).exists() else first
    result = subprocess.run(
        [program, *rest],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if check and result.returncode != 0:
        raise AssertionError(f"{command} failed:\n{result.stdout}\n{result.stderr}")
    return result

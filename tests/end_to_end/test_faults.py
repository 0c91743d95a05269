"""Damaged inputs, a full disk, a merge that is killed: what the real command says, what it leaves.

Each ends with an exit code other than 0 and leaves nothing that loads as a model. Where
mergekit's own last line does not name the file, ``mergekit-dare check --files`` does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mergekit.scripts import run_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergekit_dare.cli import main
from tests import zoo
from tests.running import Config, dare, run_command, run_in_process, write

TENSOR = "model.layers.1.mlp.up_proj.weight"


def config(folder: Path) -> Config:
    return dare(folder, seed=1)


@pytest.fixture
def models(llamas: Path, tmp_path: Path) -> Path:
    """Copies of base, a and b, to be damaged."""
    for name in ("base", "a", "b"):
        shutil.copytree(llamas / name, tmp_path / "models" / name)
    return tmp_path / "models"


def loads(out: Path) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(out)
    except (OSError, ValueError):
        return False
    return True


def edit(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "b" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def cut_off(folder: Path) -> None:
    os.truncate(folder / "b" / "model.safetensors", 20_000)


def damage_header(folder: Path) -> None:
    with (folder / "b" / "model.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"\xff" * 50)


def cut_off_pickle(folder: Path) -> None:
    path = folder / "b" / "model.safetensors"
    pickled = folder / "b" / "pytorch_model.bin"
    torch.save(load_file(path), pickled)
    path.unlink()
    os.truncate(pickled, 20_000)


def set_element(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[TENSOR][3, 4] = value

    return edit(change)


def remove_tensor(tensors: dict[str, Tensor]) -> None:
    del tensors[TENSOR]


def shorten_tensor(tensors: dict[str, Tensor]) -> None:
    tensors[TENSOR] = tensors[TENSOR][:40].clone()


def remove_shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "b", dtype=torch.bfloat16)
    (folder / "b" / "model.safetensors").unlink()
    model.save_pretrained(folder / "b", max_shard_size="20KB")
    sorted((folder / "b").glob("model-00002-of-*.safetensors"))[0].unlink()


# What is done, what the last line of mergekit-yaml says, what `check --files` says, None where
# headers do not tell.
NOT_FINITE = f"tensor {TENSOR} of model {{b}} makes 1 of 1536 deltas NaN or infinite"
FAULTS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "cut off": (
        cut_off,
        "incomplete metadata",
        "{b}/model.safetensors is truncated: it has 20000 by",
    ),
    "damaged header": (damage_header, "deserializing header", "{b}/model.safetensors is damaged"),
    "cut off pickle": (cut_off_pickle, "", "{b}/pytorch_model.bin is truncated or damaged"),
    "missing shard": (
        remove_shard,
        "model-00002-of",
        "{b}/model-00002-of-00004.safetensors is miss",
    ),
    "missing tensor": (
        edit(remove_tensor),
        TENSOR,
        f"tensor {TENSOR}, which is missing from",
    ),
    "another shape": (
        edit(shorten_tensor),
        TENSOR,
        f"tensor {TENSOR} has shape (40, 32) in {{b}} but (48, 32",
    ),
    "NaN": (set_element(float("nan")), NOT_FINITE, None),
    "infinity": (set_element(float("-inf")), NOT_FINITE, None),
    "no folder": (lambda folder: shutil.rmtree(folder / "b"), "", "there is no folder {b}"),
    "no config": (lambda f: (f / "b" / "config.json").unlink(), "", "{b}/config.json is missing"),
    "damaged config": (
        lambda folder: void((folder / "b" / "config.json").write_text("{broken")),
        "{b}/config.json",
        "{b}/config.json cannot be read as JSON",
    ),
    "no weights": (
        lambda folder: (folder / "b" / "model.safetensors").unlink(),
        "",
        "{b} has no weights",
    ),
}


def void(_: object) -> None:
    return None


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_inputs(fault: str, models: Path, tmp_path: Path) -> None:
    damage, last_line, found = FAULTS[fault]
    path = write(config(models), tmp_path / "config.yml")
    clean = CliRunner().invoke(main, ["check", "--files", path])
    assert clean.output == "No problems found.\n"
    damage(models)

    checked = CliRunner().invoke(main, ["check", "--files", path])
    if found is None:
        assert checked.exit_code == 0
    else:
        assert checked.exit_code == 1
        assert found.format(b=models / "b") in checked.output
        assert checked.output.count("\n") == 1

    out = tmp_path / "out"
    # The last line of a traceback; in this process, as each real one takes seconds to start.
    with pytest.raises(Exception) as caught:  # noqa: PT011  (each library has its own types)
        run_in_process(run_yaml.main, path, str(out))
    assert last_line.format(b=models / "b") in traceback.format_exception_only(caught.value)[-1]
    assert not loads(out)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["merge_method: [dare\n", None])
def test_unreadable_config(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    if text is not None:
        path.write_text(text)
    result = run_command("mergekit-yaml", str(path), str(tmp_path / "out"), check=False)
    assert result.returncode != 0
    assert not (tmp_path / "out").exists()
    checked = CliRunner().invoke(main, ["check", str(path)])
    assert checked.exit_code == 2
    assert checked.stderr.count("\n") == 1
    assert str(path) in checked.stderr


@pytest.mark.slow
def test_a_wrong_value_is_refused_before_any_work(models: Path, tmp_path: Path) -> None:
    settings = config(models)
    settings["models"][1]["parameters"]["density"] = 50
    path = write(settings, tmp_path / "config.yml")
    result = run_command("mergekit-yaml", path, str(tmp_path / "out"), check=False)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "density of model" in last
    assert "did you mean 0.5?" in last
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_full_disk(models: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the system refuses to write more."""
    path = write(config(models), tmp_path / "config.yml")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); "
        "from mergekit.scripts.run_yaml import main; main()"
    )
    out = tmp_path / "out"
    result = run_command(sys.executable, "-c", code, path, str(out), "--quiet", check=False)
    assert result.returncode != 0
    assert "I/O error: File too large" in result.stderr.strip().splitlines()[-1]
    assert not loads(out)


# Kills itself when a function is called for the n-th time: before it does anything, or, in the
# middle of writing a file, with half of it written.
KILLED = """\
import os, signal, sys
import safetensors.torch
from mergekit import io
from transformers import PretrainedConfig

where, count = sys.argv.pop(1), int(sys.argv.pop(1))

def killing(function, half=False):
    def wrapper(*args, **kwargs):
        global count
        if count == 0:
            if half:
                function(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        count -= 1
        return function(*args, **kwargs)
    return wrapper

if where == "write":
    safetensors.torch.save_file = killing(safetensors.torch.save_file, half=True)
if where == "rename":
    os.rename = killing(os.rename)
if where == "index":
    from mergekit.io import tensor_writer
    tensor_writer.json.dump = killing(tensor_writer.json.dump)
if where == "config":
    PretrainedConfig.save_pretrained = killing(PretrainedConfig.save_pretrained)
from mergekit.scripts.run_yaml import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "count"),
    [("write", 0), ("write", 2), ("rename", 0), ("rename", 2), ("index", 0), ("config", 0)],
)
def test_killed(where: str, count: int, models: Path, tmp_path: Path) -> None:
    """What is left does not load, and a second run is as if it were the first."""
    path = write(config(models), tmp_path / "config.yml")
    out = tmp_path / "out"
    options = ["--quiet", "--out-shard-size", "5000"]
    command = [sys.executable, "-c", KILLED, where, str(count), path, str(out), *options]
    killed = subprocess.run(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert list(out.iterdir())
    assert not loads(out)
    run_in_process(run_yaml.main, path, str(out), *options[1:])
    assert loads(out)
    run_in_process(run_yaml.main, path, str(tmp_path / "fresh"), *options[1:])
    zoo.assert_same_tensors(zoo.load(out), zoo.load(tmp_path / "fresh"))

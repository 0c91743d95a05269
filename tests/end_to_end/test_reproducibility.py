"""Same files, same seed: same bytes, by whichever way the merge is run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts

from tests import zoo
from tests.running import Config, dare, merge_multi, merge_pytorch, merge_yaml, run_command, write

BOTH = pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])


def config(folder: Path, method: str, names: str = "abc", **parameters: Any) -> Config:
    parameters = {"seed": 11} | parameters
    return dare(folder, method, names, weight=0.4, density=0.3, **parameters)


@BOTH
def test_every_command_and_the_python_api_agree(method: str, llamas: Path, tmp_path: Path) -> None:
    settings = config(llamas, method, normalize=True)
    by_yaml = merge_yaml(settings, tmp_path / "yaml")
    assert 0.3 < zoo.moved(by_yaml, zoo.load(llamas / "base")) < 0.66  # 1 - 0.7**3 at most

    zoo.assert_same_tensors(merge_yaml(settings, tmp_path / "again"), by_yaml)
    zoo.assert_same_tensors(merge_multi([settings], tmp_path / "multi"), by_yaml)

    raw = config(llamas, method, normalize=True)
    for entry in raw["models"]:
        entry["model"] += "/model.safetensors"
    raw["base_model"] += "/model.safetensors"
    zoo.assert_same_tensors(merge_pytorch(raw, tmp_path / "pytorch"), by_yaml)

    by_python = merge_state_dicts(
        {name: zoo.load(llamas / name) for name in ("base", "a", "b", "c")},
        method,
        base="base",
        parameters={"weight": 0.4, "density": 0.3, "normalize": True, "seed": 11},
    )
    zoo.assert_same_tensors(by_python, by_yaml)


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "method"), [("1", "dare_linear"), ("2", "dare_ties")])
def test_real_commands_by_threads(threads: str, method: str, llamas: Path, tmp_path: Path) -> None:
    settings = config(llamas, method)
    expected = merge_yaml(settings, tmp_path)
    path = write(settings, tmp_path / "config.yml")
    run_command("mergekit-yaml", path, str(tmp_path / "real"), "-j", threads)
    zoo.assert_same_tensors(zoo.load(tmp_path / "real"), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "method"), [("1", "dare_ties"), ("2", "dare_linear")])
def test_real_mergekit_pytorch_in_any_order(
    run: str, method: str, llamas: Path, tmp_path: Path
) -> None:
    """It takes tensors in another order in each run."""
    raw = config(llamas, method)
    expected = merge_yaml(raw, tmp_path)
    for entry in (*raw["models"], raw):
        key = "model" if "model" in entry else "base_model"
        entry[key] += "/model.safetensors"
    path = write(raw, tmp_path / "raw.yml")
    run_command("mergekit-pytorch", path, str(tmp_path / "real"), PYTHONHASHSEED=run)
    zoo.assert_same_tensors(zoo.load(tmp_path / "real"), expected)


@BOTH
def test_sharded_renamed_and_moved_inputs(method: str, llamas: Path, tmp_path: Path) -> None:
    expected = merge_yaml(config(llamas, method), tmp_path / "whole")
    sharded = tmp_path / "elsewhere" / "deeper"
    zoo.make_family(zoo.ARCHITECTURES["llama"], sharded, max_shard_size="20KB")
    assert len(list((sharded / "a").glob("*.safetensors"))) > 3
    settings = config(sharded, method)
    for name in "abc":
        shutil.move(sharded / name, sharded / f"renamed-{name}")
    for entry, name in zip(settings["models"], "bca", strict=True):  # and in another order
        entry["model"] = str(sharded / f"renamed-{name}")
    merged = merge_yaml(settings, tmp_path / "merge", "--out-shard-size", "5000")
    assert len(list((tmp_path / "merge" / "out").glob("*.safetensors"))) > 3
    zoo.assert_same_tensors(merged, expected)


@BOTH
def test_a_further_model_of_weight_zero(method: str, llamas: Path, tmp_path: Path) -> None:
    expected = merge_yaml(config(llamas, method, "ab"), tmp_path / "two")
    three = config(llamas, method, "cab")
    three["models"][0]["parameters"]["weight"] = 0
    zoo.assert_same_tensors(merge_yaml(three, tmp_path / "three"), expected)


@BOTH
def test_random_seed_option_and_seed_parameter(method: str, llamas: Path, tmp_path: Path) -> None:
    base = zoo.load(llamas / "base")
    by_parameter = merge_yaml(config(llamas, method, seed=5), tmp_path / "parameter")
    without = config(llamas, method)
    del without["parameters"]["seed"]
    by_option = merge_yaml(without, tmp_path / "option", "--random-seed", "5")
    zoo.assert_same_tensors(by_option, by_parameter)
    torch.manual_seed(0)
    both = merge_yaml(config(llamas, method, seed=5), tmp_path / "both", "--random-seed", "6")
    zoo.assert_same_tensors(both, by_parameter)

    other = merge_yaml(config(llamas, method, seed=6), tmp_path / "other")
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = (merged[name] != base[name] for merged in (by_parameter, other))
    assert float((first ^ second).double().mean()) > 0.2


@pytest.mark.slow
def test_the_default_seed_is_the_same_in_every_process(llamas: Path, tmp_path: Path) -> None:
    settings = config(llamas, "dare_ties")
    del settings["parameters"]
    path = write(settings, tmp_path / "config.yml")
    merged = []
    for run in "12":
        run_command("mergekit-yaml", path, str(tmp_path / run))
        merged.append(zoo.load(tmp_path / run))
    zoo.assert_same_tensors(*merged)


def test_chained_merges_draw_anew(llamas: Path, tmp_path: Path) -> None:
    """The output of a merge, merged again with the same seed, keeps d * d of the deltas."""
    once = config(llamas, "dare_linear", "a")
    once["models"][0]["parameters"] = {"weight": 1.0, "density": 0.5}
    first = merge_yaml(once, tmp_path / "1")
    twice = once | {
        "name": None,
        "models": [{"model": "first", "parameters": {"weight": 1.0, "density": 0.5}}],
    }
    del twice["name"]
    second = merge_multi([once | {"name": "first"}, twice], tmp_path / "2")
    base = zoo.load(llamas / "base")
    assert 0.48 < zoo.moved(first, base) < 0.5
    assert 0.23 < zoo.moved(second, base) < 0.26
    by_hand = once | {
        "models": [
            {"model": str(tmp_path / "1" / "out"), "parameters": {"weight": 1.0, "density": 0.5}}
        ]
    }
    zoo.assert_same_tensors(merge_yaml(by_hand, tmp_path / "3"), second)

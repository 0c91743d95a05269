"""``mergekit-dare suggest``: what it writes is clean, merges, and says why."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from mergekit_dare.cli import main
from mergekit_dare.diagnostics import suggestion
from mergekit_dare.diagnostics.checking import check_file
from mergekit_dare.diagnostics.models import files, tokenizer
from mergekit_dare.diagnostics.plan import planning
from mergekit_dare.plugin import headers
from tests import zoo
from tests.running import merge_yaml, run_command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, ``a`` with small deltas, ``large`` with large ones, and others of one trait each."""
    folder = tmp_path_factory.mktemp("with a space")
    zoo.make_family(zoo.ARCHITECTURES["llama"], folder, names="ab", scale=0.0015)
    zoo.make_family(zoo.ARCHITECTURES["llama"], folder / "other", names="a", scale=0.02)
    shutil.copytree(folder / "other" / "a", folder / "large")
    shutil.copytree(folder / "a", folder / "tokens")
    zoo.tokenizer(order=[*range(10), *range(127, 9, -1)]).save_pretrained(folder / "tokens")
    shutil.copytree(folder / "a", folder / "chat")
    (folder / "chat" / "chat_template.jinja").write_text("{{ messages }}")
    zoo.make_family(zoo.ARCHITECTURES["mistral"], folder / "mistral", names="")
    return folder


def suggest(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["suggest", *map(str, arguments), "--quiet"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("names", ["a", "ab"])
def test_clean_and_merges(method: str, names: str, models: Path, tmp_path: Path) -> None:
    file = tmp_path / "dare.yml"
    result = suggest(models / "base", *(models / n for n in names), "--method", method, "-o", file)
    assert result.exit_code == 0, result.output
    assert result.output == ""
    assert check_file(str(file), files=True) == []
    config = yaml.safe_load(file.read_text())
    assert config["merge_method"] == method
    assert config["dtype"] == "bfloat16"
    assert config["parameters"] == {"seed": 42}
    merged = merge_yaml(config, tmp_path)
    assert 0 < zoo.moved(merged, zoo.load(models / "base")) < 1
    assert all(entry["parameters"]["density"] == 0.1 for entry in config["models"])
    assert "density: 0.1 # small deltas, as after supervised fine-tuning" in file.read_text()


def test_densities_are_those_of_the_deltas(models: Path) -> None:
    result = suggest(models / "base", models / "a", models / "large")
    assert result.exit_code == 0
    config = yaml.safe_load(result.stdout)
    assert [entry["parameters"]["density"] for entry in config["models"]] == [0.1, 1.0]
    assert "density: 1.0 # large deltas" in result.stdout


def test_sparse_changes_survive_rounding(models: Path, tmp_path: Path) -> None:
    """A third of one unit over density 0.5 would be rounded up to a unit: half as much again.

    Of each model's 2,000 changes half are kept: 0.1 of 1.5 is some five standard deviations.
    """
    for number, name in enumerate(("x", "y", "z")):
        shutil.copytree(models / "base", models / name)
        tensors = zoo.load(models / name)
        for tensor in tensors.values():
            if tensor.dim() == 2:  # norms are few, and their units so large that they decide
                tensor.view(-1)[number::15].view(torch.int16).add_(1)
        save_file(tensors, models / name / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "c.yml"
    result = suggest(models / "base", *(models / n for n in "xyz"), "-o", file)
    assert result.exit_code == 0, result.output
    config = yaml.safe_load(file.read_text())
    assert config["parameters"] == {"seed": 42, "rounding": "stochastic"}
    assert [entry["parameters"]["density"] for entry in config["models"]] == [0.5] * 3
    (percentage,) = re.findall(r"scale the merged change to (\d+)% in bfloat16", file.read_text())
    assert 135 < int(percentage) < 165
    assert check_file(str(file), files=True) == []
    # Two at half the weight and half the density: whole units, which need no other rounding.
    config = yaml.safe_load(suggest(models / "base", models / "x", models / "y").stdout)
    assert config["parameters"] == {"seed": 42}


def test_what_tokenizers_need(models: Path, tmp_path: Path) -> None:
    plain = yaml.safe_load(suggest(models / "base", models / "a").stdout)
    assert "tokenizer_source" not in plain
    assert "chat_template" not in plain
    file = tmp_path / "c.yml"
    result = suggest(models / "base", models / "tokens", models / "chat", "-o", file)
    assert result.exit_code == 0, result.output
    config = yaml.safe_load(file.read_text())
    assert config["tokenizer_source"] == "union"
    assert config["chat_template"] == "auto"
    assert check_file(str(file), files=True) == []


def test_a_model_that_equals_the_base(models: Path) -> None:
    shutil.copytree(models / "base", models / "same", dirs_exist_ok=True)
    said = suggest(models / "base", models / "same", models / "a").stdout
    same, other = said.split("  - model: ")[1:]
    assert "weight: 0.5 # without effect: it equals the base model" in same
    assert "weight: 0.5 # an equal share" in other


@pytest.mark.parametrize(
    ("names", "code", "message"),
    [
        (
            ["base", "mistral/base"],
            1,
            "error: the architecture of {f}/mistral/base is MistralForCausalLM (mistral)",
        ),
        (["base", "none"], 1, "error: there is no folder {f}/none"),
        (["base", "a", "a"], 1, "error:"),
        (["base"], 2, "Missing argument 'MODELS...'"),
    ],
    ids=["another architecture", "no folder", "twice", "no model"],
)
def test_what_cannot_be_merged(names: list[str], code: int, message: str, models: Path) -> None:
    result = suggest(*(models / name for name in names))
    assert result.exit_code == code
    assert message.format(f=models) in result.stderr
    assert result.stdout == ""


def test_never_over_a_file_without_force(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "dare.yml"
    file.write_text("mine")
    result = suggest(models / "base", models / "a", "-o", file)
    assert result.exit_code == 2
    assert "already exists; use --force to overwrite it" in result.stderr
    assert file.read_text() == "mine"
    assert suggest(models / "base", models / "a", "-o", file, "--force").exit_code == 0
    assert file.read_text().startswith("merge_method: dare_ties\n")
    assert os.listdir(tmp_path) == ["dare.yml"]
    result = suggest(models / "base", models / "a", "-o", tmp_path / "none" / "dare.yml")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


def test_each_file_is_looked_at_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By us: mergekit opens each file of weights once more when it plans, which it does once."""
    opened: Counter[str] = Counter()
    plans: list[object] = []

    def counted(function: Any, place: str) -> Any:
        def call(file: Path, *arguments: Any, **options: Any) -> Any:
            opened[f"{place} {Path(file).relative_to(models)}"] += 1
            return function(file, *arguments, **options)

        return call

    headers._read.cache_clear()
    monkeypatch.setattr(safetensors, "safe_open", counted(safetensors.safe_open, "safe_open"))
    monkeypatch.setattr(tokenizer, "read_json", counted(files.read_json, "JSON"))
    monkeypatch.setattr(files, "read_json", counted(files.read_json, "JSON"))
    plan = planning.plan

    def counted_plan(*arguments: Any, **options: Any) -> Any:
        plans.append(arguments)
        return plan(*arguments, **options)

    monkeypatch.setattr(planning, "plan", counted_plan)
    assert suggestion.suggest(str(models / "base"), [str(models / "a")], "dare_ties").text
    assert len(plans) == 1
    of_weights = {name: n for name, n in opened.items() if name.startswith("safe_open")}
    assert of_weights == {f"safe_open {name}/model.safetensors": 2 for name in ("base", "a")}
    of_json = opened.keys() - of_weights.keys()
    assert {name: opened[name] for name in of_json} == dict.fromkeys(of_json, 1)
    assert "JSON a/tokenizer.json" in of_json


@pytest.mark.slow
def test_the_command(models: Path, tmp_path: Path) -> None:
    result = run_command("mergekit-dare", "suggest", "base", "a", "b", cwd=models)
    (models / "dare.yml").write_text(result.stdout)
    run_command("mergekit-yaml", "dare.yml", str(tmp_path / "out"), "--quiet", cwd=models)
    assert zoo.load(tmp_path / "out").keys() == zoo.load(models / "base").keys()

"""The search example without Ray: its tasks, and what mergekit-evolve makes of a genome."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.evo.config import EvolMergeConfiguration
from mergekit.evo.genome import ModelGenome
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from tests import zoo
from tests.running import PROJECT

EVOLVE = PROJECT / "examples" / "search"


def test_tasks_have_one_right_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EVOLVE)
    from search import make_tasks

    make_tasks.main(tmp_path)
    for name in ("docs", "code", "arithmetic"):
        task = yaml.safe_load((tmp_path / f"our_{name}.yaml").read_text())
        assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / f"{name}.jsonl")
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == make_tasks.QUESTIONS
        for line in lines:
            item = json.loads(line)
            assert len(set(item["choices"])) == make_tasks.CHOICES
            if name == "arithmetic":
                a, sign, b, _ = item["text"].split()
                right = int(a) + int(b) if sign == "+" else int(a) * int(b)
                assert item["choices"][item["answer"]] == f" {right}"
    sys.modules.pop("make_tasks")


def test_equal_genomes_give_equal_models(llamas: Path, tmp_path: Path) -> None:
    """Whatever the state of torch's generator, which differs between workers."""
    settings = yaml.safe_load((EVOLVE / "genome.yml").read_text())
    settings["genome"]["base_model"] = str(llamas / "base")
    settings["genome"]["models"] = [str(llamas / name) for name in "abc"]
    genome = ModelGenome(EvolMergeConfiguration.model_validate(settings).genome)
    genotype = genome.initial_genotype() * 0.6
    merged = []
    for worker in ("first", "second"):
        torch.rand(len(worker))
        config = genome.genotype_merge_config(genotype)
        run_merge(config, str(tmp_path / worker), MergeOptions(random_seed=7, quiet=True))
        assert "(mergekit-dare " in (tmp_path / worker / "README.md").read_text()
        merged.append(zoo.load(tmp_path / worker))
    zoo.assert_same_tensors(*merged)
    other = genome.genotype_merge_config(genotype * 0.9)
    run_merge(other, str(tmp_path / "other"), MergeOptions(random_seed=7, quiet=True))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(zoo.load(tmp_path / "other")[name], merged[0][name])

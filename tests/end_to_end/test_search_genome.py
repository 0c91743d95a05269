"""The search example's other half: CMA-ES over a genome of mergekit-evolve, lm-eval, Ray."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from search import SearchError, evaluation, evolution, score_lm_eval, workers
from search.searching import search
from tests import zoo
from tests.end_to_end.test_search import SEARCH, wanted
from tests.running import Config


def genome_settings(llamas: Path) -> Config:
    settings: Config = yaml.safe_load((SEARCH / "genome.yml").read_text())
    settings["genome"]["base_model"] = str(llamas / "base")
    settings["genome"]["models"] = [str(llamas / name) for name in "abc"]
    return settings


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Put a CMA-ES in place that draws as the real one does; return what it is told."""
    told: list[list[float]] = []

    class Strategy:
        def __init__(self, start: Any, _: float, options: dict[str, Any]) -> None:
            np.random.seed(options["seed"])
            self.start, self.size = start, options["popsize"]

        def ask(self) -> list[Any]:
            return [self.start + np.random.randn(len(self.start)) / 6 for _ in range(self.size)]

        def tell(self, _: Any, losses: list[float]) -> None:
            told.append(losses)

    module = ModuleType("cma")
    module.CMAEvolutionStrategy = Strategy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cma", module)
    return told


def test_cma_es_asks_for_the_same_again(
    llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[list[float]]
) -> None:
    """Though merges seed numpy's generator, from which it draws."""
    options = ("--random-seed", "3")
    asked = wanted(genome_settings(llamas), tmp_path, grid=[], evaluations=7, merge_options=options)
    search(asked)
    lines = [json.loads(line) for line in (tmp_path / "found" / "scores.jsonl").open()]
    scores = [line["score"] for line in lines]
    assert len(set(scores)) == 8
    assert told == [[-score for score in scores[:4]], [-score for score in scores[4:]]]
    assert yaml.safe_load(lines[0]["config"])["parameters"]["seed"] == 42
    first = told.copy()
    monkeypatch.setattr(evaluation, "merge", None)
    search(asked)
    assert told == [*first, *first]


def test_ray_workers_score_as_this_process_does(
    llamas: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: list[list[float]],
) -> None:
    """With a stand-in for Ray, which is not in the tests' environment: it calls what it is sent."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # what workers add to theirs
    ray, there = stand_in_for_ray()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, module in (
        ("ray", ray),
        ("ray.cluster_utils", ray.cluster_utils),
        (
            "ray.util.scheduling_strategies",
            SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *_, **__: None),
        ),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    settings = genome_settings(llamas)
    search(wanted(settings, tmp_path, grid=[], evaluations=4, ray=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("node")] == ["node 0", "node 1"]
    assert there == {"nodes": 0}
    search(wanted(settings, tmp_path, grid=[], evaluations=4, folder=tmp_path / "here"))
    assert told[0] == told[1]
    monkeypatch.setattr(workers, "merge", lambda *_: None)
    with pytest.raises((SearchError, OSError)):
        search(wanted(settings, tmp_path, grid=[], evaluations=4, ray=True))
    assert there == {"nodes": 0}


def stand_in_for_ray() -> tuple[Any, dict[str, int]]:
    there = {"nodes": 0}

    class Cluster:
        address = "here"

        def __init__(self, **_: Any) -> None:
            there["nodes"] += 1

        def add_node(self, **_: Any) -> None:
            there["nodes"] += 1

        def shutdown(self) -> None:
            there["nodes"] = 0

    class Remote:
        def __init__(self, function: Any) -> None:
            self.remote = function

        def options(self, **_: Any) -> Remote:
            return self

    ray = SimpleNamespace(
        init=lambda *_, **__: None,
        shutdown=lambda: None,
        nodes=lambda: [{"NodeID": str(i)} for i in range(there["nodes"])],
        remote=lambda **_: Remote,
        get=lambda answer: answer,
        exceptions=SimpleNamespace(RayTaskError=ZeroDivisionError),
        cluster_utils=SimpleNamespace(Cluster=Cluster),
    )
    return ray, there


def test_a_genome_without_its_packages(
    llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    settings = genome_settings(llamas)
    for others in ({}, {"ray": True}):
        with pytest.raises(SearchError, match=r"pip install 'mergekit\[evolve\]'"):
            search(wanted(settings, tmp_path, grid=[], **others))
    with pytest.raises(SearchError, match="--grid is for a config with placeholders"):
        search(wanted(settings, tmp_path))
    settings["genome"]["merge_method"] = "della"
    with pytest.raises(SearchError, match="mergekit-evolve would refuse this genome"):
        search(wanted(settings, tmp_path, grid=[]))


def test_lm_eval_scores_the_tasks_of_a_genome(
    llamas: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = genome_settings(llamas)
    settings["tasks"] = ["arc", {"name": "sums", "metric": "exact_match,strict", "weight": 0.5}]
    line = evolution.Genome(settings, 1).lm_eval_command(tmp_path / "my tasks")
    program, script, *arguments = shlex.split(line)
    assert program == "python"
    assert Path(script) == SEARCH / "score_lm_eval.py"
    assert "{model}" in line.split()

    module, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    calls = []

    def simple_evaluate(**settings: Any) -> Any:
        calls.append(settings)
        return {"results": {"arc": {"acc,none": 0.25}, "sums": {"exact_match,strict": 0.5}}}

    module.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    module.tasks = tasks  # type: ignore[attr-defined]
    tasks.TaskManager = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    score_lm_eval.main()
    assert capsys.readouterr().out.splitlines()[-1] == "score: 0.500000"
    (call,) = calls
    assert call["tasks"] == ["arc", "sums"]
    assert call["limit"] == 100
    assert call["task_manager"].include_path == str(tmp_path / "my tasks")


def test_tasks_have_one_right_answer(tmp_path: Path) -> None:
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


def test_equal_genomes_give_equal_models(llamas: Path, tmp_path: Path) -> None:
    """Whatever the state of torch's generator, which differs between workers."""
    from mergekit.evo.config import EvolMergeConfiguration
    from mergekit.evo.genome import ModelGenome

    settings = genome_settings(llamas)
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

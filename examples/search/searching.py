"""The search itself: of a grid, or by CMA-ES of a genome."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search import SearchError, evaluation, evolution, grid, report, workers
from search.agreement import weights
from search.evaluation import Evaluator
from search.scores import Run, Scores, Scoring


@dataclass(frozen=True)
class Wanted:
    """What the user asks for.

    Attributes:
        config: The file of a config with placeholders, or of a genome.
        folder: To work and write in; it is made if it is not there.
        grid: The values of the placeholders, as :func:`search.grid.parse` takes them.
        score: The score command; for a genome, None lets lm-eval score its tasks.
        minimize: Whether a low score is good.
        merge_options: Of mergekit-yaml.
        seed: Of CMA-ES, and of configs without one.
        evaluations: The number of merges that CMA-ES may ask for, rounded up to whole generations.
        ray: Whether CMA-ES uses Ray workers.
        agree: Texts of fine-tuned models, ``NAME=FILE``: they are the score.
        agree_by: What agreement is measured by; None leaves it to the kind of model.

    """

    config: Path
    folder: Path
    grid: Sequence[str] = ()
    score: str | None = None
    minimize: bool = False
    merge_options: tuple[str, ...] = ()
    seed: int = 42
    evaluations: int = 24
    ray: bool = False
    agree: Sequence[str] = ()
    agree_by: str | None = None


def search(wanted: Wanted) -> None:
    """Search, and report whatever has a score, even if the search is stopped.

    Raises:
        SearchError: something is wrong; nearly all of it is found before any work.

    """
    config = grid.read_config(wanted.config)
    if wanted.agree:
        _refuse_beside_agree(config, wanted)
        weights.search(config, wanted)
    elif "genome" in config:
        _search_genome(config, wanted)
    else:
        _search_grid(config, wanted)


def _refuse_beside_agree(config: dict[str, Any], wanted: Wanted) -> None:
    given = {
        "--grid": wanted.grid,
        "--score": wanted.score,
        "--minimize": wanted.minimize,
        "--ray": wanted.ray,
        "a genome": "genome" in config,
    }
    for name, is_given in given.items():
        if is_given:
            message = f"--agree and {name} do not go together: it searches weights by its own score"
            raise SearchError(message)


def _search_grid(config: dict[str, Any], wanted: Wanted) -> None:
    if wanted.ray:
        raise SearchError("--ray is for a genome; a grid is searched one merge at a time")
    values = grid.parse(wanted.grid)
    grid.check_names(config, values)
    if wanted.score is None:
        raise SearchError("there is no score: give a command, --score 'python my_eval.py {model}'")
    evaluation.use_our_methods(str(config.get("merge_method")))
    points = grid.points(values)
    configs = [evaluation.as_text(grid.fill(config, point), wanted.seed) for point in points]
    evaluator = _prepared(wanted.score, configs, wanted)
    scoring = _scoring(evaluator, evaluator.scores, len(points))
    try:
        for point, text in zip(points, configs, strict=True):
            scoring.score([point], [text])
    finally:
        _report(scoring, evaluator, wanted)


def _search_genome(config: dict[str, Any], wanted: Wanted) -> None:
    if wanted.grid:
        raise SearchError("--grid is for a config with placeholders; CMA-ES searches a genome")
    genome = evolution.Genome(config, wanted.seed)
    evaluation.use_our_methods(genome.settings.genome.merge_method)
    tasks = wanted.folder.resolve() / "tasks"
    command = wanted.score or genome.lm_eval_command(tasks)
    first = genome.config(genome.start * 0.6)
    evaluator = _prepared(command, [first], wanted)
    if wanted.score is None:
        from search import make_tasks  # it imports what trains the example models

        make_tasks.main(tasks)
    generations = -(-wanted.evaluations // evolution.POPULATION)
    here = nullcontext(evaluator.scores)
    with workers.ray_workers(evaluator, first) if wanted.ray else here as run:
        scoring = _scoring(evaluator, run, generations * evolution.POPULATION)
        try:
            evolution.search(genome, scoring, generations, wanted.seed, minimize=wanted.minimize)
        finally:
            _report(scoring, evaluator, wanted)


def _prepared(command: str, configs: Sequence[str], wanted: Wanted) -> Evaluator:
    """Return what merges and scores, after looking for mistakes in all that it will be given."""
    evaluator = Evaluator(command, wanted.folder.resolve(), wanted.merge_options)
    evaluator.check(configs[0])
    evaluator.folder.mkdir(parents=True, exist_ok=True)
    evaluator.clean()
    evaluation.check_configs(configs, evaluator.folder)
    return evaluator


def _scoring(evaluator: Evaluator, run: Run, total: int) -> Scoring:
    return Scoring(Scores(evaluator.folder / "scores.jsonl"), evaluator.command, run, total)


def _report(scoring: Scoring, evaluator: Evaluator, wanted: Wanted) -> None:
    if scoring.found:
        report.write(scoring.found, wanted.folder, minimize=wanted.minimize)
        options = evaluation.options_for(scoring.found[0].config, wanted.merge_options)
        print("Merge it:", *["mergekit-yaml", wanted.folder / "best.yml", "out/", *options])

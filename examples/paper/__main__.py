"""Train, merge, score, and write tables and plots.

Usage: python -m paper [--toy] [--reinforced] [--folder FOLDER] [--results FOLDER], in the folder
``examples``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import yaml
from mergekit.options import MergeOptions
from transformers.utils import logging

from mergekit_dare.commands import inspect_plot, inspect_text
from mergekit_dare.diagnostics.deltas import inspection
from paper import measure, merges, models, reinforced, report, tasks
from paper.report import Measured
from paper.settings import FULL, TOY, Settings

HERE = Path(__file__).parent


def main() -> None:
    """Do what is not done yet in the work folder, then write all results."""
    parser = argparse.ArgumentParser(prog="python -m paper", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="tiny and fast: proves nothing")
    parser.add_argument("--reinforced", action="store_true", help="only models of reinforcement")
    parser.add_argument("--folder", type=Path, default=HERE / "work", help="to work in")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="to write into")
    arguments = parser.parse_args()
    run = reproduce_reinforced if arguments.reinforced else reproduce
    run(TOY if arguments.toy else FULL, arguments.folder, arguments.results)


def reproduce(settings: Settings, folder: Path, results: Path) -> None:
    """Run every stage: training, merging and scoring, the report.

    Args:
        settings: How large everything is.
        folder: To work in; what is finished there is not done again.
        results: To write tables and plots into.

    """
    _prepare(folder, results)
    families = [*models.decoders(settings), models.encoder(settings)]
    for family in families:
        models.train_family(family, settings, folder)
        models.make_zeros(family, folder)
    middle = models.middle_decoder(families)
    models.train_with_large_deltas(middle, settings, folder)
    for family in (middle, families[-1]):
        models.train_gently(family, settings, folder)

    rows = merges.rows(families, settings)
    scores = measure.merge_all(families, rows, settings, folder)
    unmerged = measure.score_unmerged(families, settings, folder)
    measured = Measured(families, settings, rows, scores, unmerged)

    verdicts = _inspect(folder / middle.name, [*middle.tasks, tasks.OTHER_TASK], results)
    measure.write_csv(results / "scores.csv", rows, scores, unmerged)
    text = report.summary(measured, verdicts)
    (results / "summary.md").write_text(text)
    report.plot_all(measured, results)
    reinforced.study(middle, settings, folder, results)
    print(text)
    print("Written to", results)


def reproduce_reinforced(settings: Settings, folder: Path, results: Path) -> None:
    """Run only the study of models fine-tuned by reinforcement; arguments as above."""
    _prepare(folder, results)
    middle = models.middle_decoder([*models.decoders(settings), models.encoder(settings)])
    models.train_family(middle, settings, folder)
    reinforced.study(middle, settings, folder, results)
    print("Written to", results)


def _prepare(folder: Path, results: Path) -> None:
    logging.disable_progress_bar()  # of each model that is loaded or saved
    torch.set_num_threads(min(2, torch.get_num_threads()))  # more do not help models so small
    folder.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)


def _inspect(folder: Path, names: list[str], results: Path) -> dict[str, str]:
    """Let ``mergekit-dare inspect`` judge a family's fine-tuned models; return its verdicts."""
    config = {
        "merge_method": "dare_linear",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / name), "parameters": {"weight": 1.0, "density": 0.1}}
            for name in names
        ],
        "parameters": {"seed": 1},
    }
    path = folder / "inspect.yml"
    path.write_text(yaml.safe_dump(config))
    found = inspection.inspect_config(str(path), MergeOptions(quiet=True), full=True)
    by_name = {name: found.models[str(folder / name)] for name in names}
    found = inspection.Report(by_name, pairs={})
    inspect_plot.plot(found, str(results / "deltas.png"))
    as_json = inspect_text.as_json(found)["models"]
    (results / "inspect.json").write_text(json.dumps(as_json, indent=1) + "\n")
    return {name: str(as_json[name]["verdict"]) for name in names}


if __name__ == "__main__":
    main()

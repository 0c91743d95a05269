"""Merging every row of the grid with ``mergekit-yaml`` and scoring the result."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.scripts import run_yaml
from tqdm import tqdm

from paper import merges, tasks
from paper.merges import MERGE, ROUND, Row
from paper.models import Family, Scores, scores
from paper.settings import Settings


class Results:
    """Scores that are kept in a file, a line each, so that a stopped program goes on there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scores: dict[str, Scores] = {}
        *whole, stopped_in = path.read_text().split("\n") if path.exists() else [""]
        if stopped_in:  # the line that the program was stopped in
            path.write_text("".join(f"{line}\n" for line in whole))
        for line in whole:
            key, found = json.loads(line)
            self._scores[key] = found

    def get(self, row: Row) -> Scores | None:
        """Return a row's scores if they are there."""
        return self._scores.get(self._key(row))

    def add(self, row: Row, found: Scores) -> None:
        """Keep a row's scores."""
        self._scores[self._key(row)] = found
        with self.path.open("a") as file:
            file.write(json.dumps([self._key(row), found]) + "\n")

    @staticmethod
    def _key(row: Row) -> str:
        return json.dumps(row.as_dict())


def merge_all(
    families: Sequence[Family], rows: Sequence[Row], settings: Settings, folder: Path
) -> Results:
    """Merge and score what was not yet; return all scores.

    Args:
        families: Those of the rows; their models are in ``folder`` / family.
        rows: What to merge.
        settings: The number of test items.
        folder: Where to work.

    Raises:
        RuntimeError: mergekit's dare_linear or dare_ties are not ours.

    """
    for name in ("dare_linear", "dare_ties"):
        if "mergekit-dare" not in str(merge_methods.get(name).spec.pretty_name):
            raise RuntimeError(f"{name} is mergekit's own; see: mergekit-dare doctor")
    by_name = {family.name: family for family in families}
    results = Results(folder / "scores.jsonl")
    out = folder / "merged"
    for row in tqdm(rows, desc="merge and score"):
        if results.get(row) is None:
            family = by_name[row.family]
            merge(merges.config_of(row, folder / family.name), out)
            results.add(row, scores(family.load(out), family, scored(row, family), settings))
    shutil.rmtree(out, ignore_errors=True)
    return results


def scored(row: Row, family: Family) -> tuple[str, ...]:
    """Return the tasks that a merge is scored on: all, or that of the only model."""
    return family.tasks if row.study in (MERGE, ROUND) else (row.models,)


def merge(config: dict[str, Any], out: Path) -> None:
    """Run ``mergekit-yaml`` in this process: a new one takes seconds to start."""
    shutil.rmtree(out, ignore_errors=True)
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(config))
    arguments = [str(path), str(out), "--quiet", "--no-copy-tokenizer"]
    run_yaml.main.main(args=arguments, standalone_mode=False)


def score_unmerged(
    families: Sequence[Family], settings: Settings, folder: Path
) -> dict[tuple[str, str], Scores]:
    """Score every base and fine-tuned model on every task, by family and model."""
    found = {}
    for family in families:
        names = family.tasks
        if (folder / family.name / tasks.OTHER_TASK).exists():
            names = (*names, tasks.OTHER_TASK)
        for model in ("base", *names):
            loaded = family.load(folder / family.name / model)
            found[family.name, model] = scores(loaded, family, names, settings)
    return found


def write_csv(
    path: Path,
    rows: Sequence[Row],
    results: Results,
    unmerged: dict[tuple[str, str], Scores],
) -> None:
    """Write every score, a line for each model or merge and task."""
    fields = ["study", "family", "models", "method", "drop_rate", "scaling", "mask_seed"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, "task", "score"])
        for (family, model), found in unmerged.items():
            for task, score in found.items():
                writer.writerow(["unmerged", family, model, "", "", "", "", task, f"{score:.2f}"])
        for row in rows:
            for task, score in (results.get(row) or {}).items():
                writer.writerow([*row.as_dict().values(), task, f"{score:.2f}"])

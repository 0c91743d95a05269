"""Measure what weights without labels keep of the gain, on models of the paper's reproduction.

Trains what is not there, searches weights in every way of the table, judges each merge by held-out
items with labels, prints the table and writes ``measured.csv``.

Usage: python -m search.agreement.measure [--toy] [--folder FOLDER] [--results FOLDER],
in the folder ``examples``
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mergekit_dare import register
from paper import tasks
from paper.models import Family, decoders, encoder, scores, train_family
from paper.settings import FULL, TOY, Settings, Training
from search.agreement.config import Merge
from search.agreement.coordinates import Weights, equal_shares, search
from search.agreement.in_memory import Models, Tensors
from search.agreement.listening import Listener, Tokens, default_for
from search.agreement.score import By, mean

HERE = Path(__file__).parent
EVALUATIONS = 24
LITTLE = replace(TOY, tuned=Training(30, 1e-2))  # enough to say something else than the base
OWN, NARROW, MIXED = "its own kind", "small digits alone", "all tasks mixed"
Way = tuple[str, Weights, dict[str, Any]]  # what it is, the weights, the merge without models
ARITHMETIC: dict[str, Any] = {"merge_method": "task_arithmetic"}
DRAWN = 400  # for one item with small digits alone: one in 256 of the encoder's is


@dataclass(frozen=True)
class Row:
    """What one merge has kept of the gain.

    Attributes:
        family: Whose models.
        seed: Of their training, of the texts and of DARE.
        what: How the weights were found, and what was merged with them.
        kept: Of the gain over the base, by the labels of held-out items, the mean over models.
        least: That of the model that lost most.
        weights: In the order of the family's tasks.

    """

    family: str
    seed: int
    what: str
    kept: float
    least: float
    weights: tuple[float, ...]


class Measured:
    """One family of models: what can be merged, listened to, and judged."""

    def __init__(self, family: Family, settings: Settings, folder: Path) -> None:
        """Load the models that are in a folder, and judge them."""
        self.names = list(family.tasks)
        self._family = family
        self._settings = settings
        self._paths = {name: str(folder / family.name / name) for name in self.names}
        self._base_path = str(folder / family.name / "base")
        self._models = Models(self._base_path, list(self._paths.values()))
        self.default = default_for(self._models)
        self.base = self._judged(self._models.base)
        self.tuned = {
            name: self._judged(self._models.tuned[path])[name] for name, path in self._paths.items()
        }

    def _judged(self, tensors: Tensors) -> dict[str, float]:
        """Return the percentage of held-out items of each task that are answered right."""
        self._models.take(tensors)
        return scores(self._models.speaking, self._family, self.names, self._settings)

    def merged(self, weights: Weights, method: Mapping[str, Any]) -> Tensors:
        """Merge as a config without models says."""
        listed = [{"model": path} for path in self._paths.values()]
        config = {**method, "base_model": self._base_path, "models": listed, "dtype": "float32"}
        return self._models.merged(Merge(config).with_weights(weights))

    def kept(self, weights: Weights, method: Mapping[str, Any]) -> list[float]:
        """Return what a merge keeps of each model's gain over the base, by labels."""
        judged = self._judged(self.merged(weights, method))
        return [
            (judged[name] - self.base[name]) / (self.tuned[name] - self.base[name] or math.nan)
            for name in self.names
        ]

    def by_agreement(
        self, method: Mapping[str, Any], texts: int, by: By, kind: str = OWN
    ) -> Weights:
        """Return the weights that are found without labels."""
        tokens = {name: self._texts(name, texts, kind) for name in self.names}
        listener = Listener(self._models, self._paths, tokens, by, batch=texts)
        return search(
            lambda weights: mean(listener.shares(self.merged(weights, method))),
            self.names,
            EVALUATIONS,
        )

    def by_labels(self) -> Weights:
        """Return the weights that are the best by the very labels that judge."""
        return search(
            lambda weights: statistics.mean(self.kept(weights, ARITHMETIC)), self.names, EVALUATIONS
        )

    def equal_by_labels(self) -> Weights:
        """Return the best of equal weights from 0.1 to 1.0, by the labels that judge."""
        equal = [dict.fromkeys(self.names, tenth / 10) for tenth in range(1, 11)]
        return max(equal, key=lambda weights: statistics.mean(self.kept(weights, ARITHMETIC)))

    def _texts(self, name: str, count: int, kind: str) -> Tokens:
        """Return a model's texts: for a decoder, questions and what that model answers itself."""
        place = self.names.index(name)
        generator = torch.Generator().manual_seed(1000 * self._settings.seed + place)
        asked = self.names if kind == MIXED else [name]
        drawn = count * (DRAWN if kind == NARROW else 1)
        tokens = self._family.draw(asked, drawn, generator, right=1.0, held_out=False).tokens
        if self._family.is_decoder:
            tokens = tokens[:, : -tasks.DIGITS]
        if kind == NARROW:
            digits = tokens[:, 2 : 2 + tasks.DIGITS] - tasks.FIRST_DIGIT
            if not self._family.is_decoder:
                digits = (tokens[:, 2:] - tasks.FIRST_PAIR) % 10
            tokens = tokens[(digits < 5).all(1)][:count]
        if self._family.is_decoder:
            self._models.take(self._models.tuned[self._paths[name]])
            for _ in range(tasks.DIGITS):
                said = self._models.logits(tokens.tolist()).view(*tokens.shape, -1)
                tokens = torch.cat([tokens, said[:, -1].argmax(-1, keepdim=True)], 1)
        rows: Tokens = tokens.tolist()
        return rows


def ways(measured: Measured, sizes: Sequence[int], seed: int) -> Iterator[Way]:
    """Yield every way to find weights, with the merge that they are used in."""
    equal = equal_shares(measured.names)
    middle = sizes[len(sizes) // 2]
    yield "equal shares", equal, ARITHMETIC
    yield "the best equal weight, by labels", measured.equal_by_labels(), ARITHMETIC
    yield "the best weight of each model, by labels", measured.by_labels(), ARITHMETIC
    for by in By:
        for size in sizes:
            found = measured.by_agreement(ARITHMETIC, size, by)
            yield f"without labels, by {by.value}, {size} texts", found, ARITHMETIC
    by = measured.default
    for kind in (NARROW, MIXED):
        found = measured.by_agreement(ARITHMETIC, middle, by, kind)
        yield f"without labels, {middle} texts, {kind}", found, ARITHMETIC
    without_dare = measured.by_agreement(ARITHMETIC, middle, by)
    for density, sampling in itertools.product((0.2, 0.05), ("uniform", "magnitude")):
        dare = {
            "merge_method": "dare_linear",
            "parameters": {"density": density, "sampling": sampling, "seed": seed},
        }
        where = f"DARE, density {density}, {sampling}"
        yield f"{where}: equal shares", equal, dare
        yield f"{where}: weights found without DARE", without_dare, dare
        yield f"{where}: weights found with it", measured.by_agreement(dare, middle, by), dare


def measure(
    settings: Settings, seeds: Sequence[int], sizes: Sequence[int], folder: Path
) -> list[Row]:
    """Train, search and judge; return all rows."""
    rows = []
    decoder = decoders(settings)[1]
    for family, seed in itertools.product((encoder(settings), decoder), seeds):
        seeded = replace(settings, seed=seed)
        train_family(family, seeded, folder / f"seed-{seed}")
        measured = Measured(family, seeded, folder / f"seed-{seed}")
        for what, weights, method in ways(measured, sizes, seed):
            kept = measured.kept(weights, method)
            found = tuple(weights.values())
            rows.append(Row(family.name, seed, what, statistics.mean(kept), min(kept), found))
            print(rows[-1], flush=True)
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """Return Markdown: of each family the mean over seeds, its deviation, and the least model."""
    families = list(dict.fromkeys(row.family for row in rows))
    lines = ["| weights | " + " | ".join(f"{name} | least" for name in families) + " |"]
    lines.append("|---" + "|--:" * 2 * len(families) + "|")
    for what in dict.fromkeys(row.what for row in rows):
        cells = []
        for name in families:
            these = [row for row in rows if (row.what, row.family) == (what, name)]
            kept = [row.kept for row in these]
            spread = statistics.stdev(kept) if len(kept) > 1 else 0.0
            least = statistics.mean(row.least for row in these)
            cells.append(f"{statistics.mean(kept):.2f} ± {spread:.2f} | {least:.2f}")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure, print the table, write every row."""
    parser = argparse.ArgumentParser(prog="python -m search.agreement.measure")
    parser.add_argument("--toy", action="store_true", help="tiny and fast: proves nothing")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "work" / "measured")
    parser.add_argument("--results", type=Path, default=HERE, help="to write measured.csv into")
    arguments = parser.parse_args()
    register()
    torch.set_num_threads(min(2, torch.get_num_threads()))  # more do not help models so small
    toy = arguments.toy
    seeds, sizes = ((1,), (4, 8)) if toy else ((1, 2, 3), (50, 200, 600))
    rows = measure(LITTLE if toy else FULL, seeds, sizes, arguments.folder)
    with (arguments.results / "measured.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["family", "seed", "weights", "kept", "least", "found"])
        for row in rows:
            found = " ".join(map(str, row.weights))
            kept = (f"{row.kept:.3f}", f"{row.least:.3f}")
            writer.writerow([row.family, row.seed, row.what, *kept, found])
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()

"""Measure what weights without labels keep of the gain, on models of the paper's reproduction.

Trains what is not there, searches weights in every way of the table, judges each merge by labels,
prints the table and writes ``measured.csv``; what is in that file is not measured again.
The example models are measured if they are there: ``python examples/make_models.py``.

Usage: python -m search.agreement.measure [--toy] [--folder FOLDER] [--results FOLDER],
in the folder ``examples``
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from make_models import FOLDER
from mergekit_dare import register
from paper.models import Family, decoders, encoder, train_family
from paper.settings import FULL, TOY, Training
from search.agreement.coordinates import Weights, equal_shares
from search.agreement.judged import ARITHMETIC, ExampleModels, Judged, PaperFamily
from search.agreement.score import By

HERE = Path(__file__).parent
LITTLE = replace(TOY, tuned=Training(30, 1e-2))  # enough to say something else than the base
Way = tuple[str, Weights, dict[str, Any]]  # what it is, the weights, the merge without models


@dataclass(frozen=True)
class Row:
    """What one merge has kept of the gain.

    Attributes:
        family: Whose models.
        seed: Of DARE; but for the example models, of training and texts, too.
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
    weights: str


def ways(judged: Judged, seed: int) -> Iterator[Way]:
    """Yield every way to find weights, with the merge that they are used in."""
    equal = equal_shares(judged.names)
    some = judged.sizes["some"]
    yield "equal shares", equal, ARITHMETIC
    yield "the best equal weight, by labels", judged.equal_by_labels(), ARITHMETIC
    yield "the best weight of each model, by labels", judged.by_labels(), ARITHMETIC
    for by, (words, size) in itertools.product(By, judged.sizes.items()):
        found = judged.by_agreement(ARITHMETIC, size, by)
        yield f"without labels, by {by.value}, {words} texts", found, ARITHMETIC
    by = judged.default
    for kind in judged.kinds:
        found = judged.by_agreement(ARITHMETIC, some, by, kind)
        yield f"without labels, some texts, {kind}", found, ARITHMETIC
    without_dare = judged.by_agreement(ARITHMETIC, some, by)
    for density, sampling in itertools.product((0.2, 0.05), ("uniform", "magnitude")):
        dare = {
            "merge_method": "dare_linear",
            "parameters": {"density": density, "sampling": sampling, "seed": seed},
        }
        where = f"DARE, density {density}, {sampling}"
        yield f"{where}: equal shares", equal, dare
        yield f"{where}: weights found without DARE", without_dare, dare
        yield f"{where}: weights found with it", judged.by_agreement(dare, some, by), dare


def families(*, toy: bool, folder: Path) -> Iterator[tuple[str, int, Callable[[], Judged]]]:
    """Yield each family's name, a seed, and what trains it if it is not there, and loads it."""
    seeds = (1,) if toy else (1, 2, 3)
    sizes = {"few": 4, "some": 8} if toy else {"few": 50, "some": 200, "many": 600}
    settings = LITTLE if toy else FULL
    for family, seed in itertools.product((encoder(settings), decoders(settings)[1]), seeds):

        def load(family: Family = family, seed: int = seed) -> Judged:
            seeded, here = replace(settings, seed=seed), folder / f"seed-{seed}"
            train_family(family, seeded, here)
            return PaperFamily(family, seeded, here / family.name, sizes)

        yield family.name, seed, load
    if (FOLDER / "arithmetic").exists():
        for seed in seeds:
            yield "example models", seed, lambda: ExampleModels(FOLDER)


def table(rows: Sequence[Row]) -> list[str]:
    """Return Markdown: of each family the mean over seeds, its deviation, and the least model."""
    families = list(dict.fromkeys(row.family for row in rows))
    lines = [
        "| weights | " + " | ".join(f"{name} | least" for name in families) + " |",
        "|---" + "|--:" * 2 * len(families) + "|",
    ]
    for what in dict.fromkeys(row.what for row in rows):
        cells = [
            _cells([row for row in rows if (row.what, row.family) == (what, name)])
            for name in families
        ]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return lines


def _cells(rows: Sequence[Row]) -> str:
    if not rows:
        return " | "
    kept = [row.kept for row in rows]
    spread = statistics.stdev(kept) if len(kept) > 1 else 0.0
    deviation = f" ± {spread:.2f}" if spread else ""
    least = statistics.mean(row.least for row in rows)
    return f"{statistics.mean(kept):.2f}{deviation} | {least:.2f}"


def main() -> None:
    """Measure, print the table, write every row."""
    parser = argparse.ArgumentParser(prog="python -m search.agreement.measure")
    parser.add_argument("--toy", action="store_true", help="tiny and fast: proves nothing")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "work" / "measured")
    parser.add_argument("--results", type=Path, default=HERE, help="to write measured.csv into")
    arguments = parser.parse_args()
    register()
    torch.set_num_threads(min(2, torch.get_num_threads()))  # more do not help models so small
    path = arguments.results / "measured.csv"
    rows = read(path)
    for name, seed, load in families(toy=arguments.toy, folder=arguments.folder):
        if (name, seed) in {(row.family, row.seed) for row in rows}:
            continue
        judged = load()
        for what, weights, method in ways(judged, seed):
            kept = judged.kept(weights, method)
            found = " ".join(map(str, weights.values()))
            rows.append(Row(name, seed, what, statistics.mean(kept), min(kept), found))
            print(rows[-1], flush=True)
        write(rows, path)
    print("\n".join(table(rows)))


def read(path: Path) -> list[Row]:
    """Return the rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(family, int(seed), what, float(kept), float(least), weights)
            for family, seed, what, kept, least, weights in list(csv.reader(file))[1:]
        ]


def write(rows: Sequence[Row], path: Path) -> None:
    """Write all rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            kept = (f"{row.kept:.3f}", f"{row.least:.3f}")
            writer.writerow([row.family, row.seed, row.what, *kept, row.weights])


if __name__ == "__main__":
    main()

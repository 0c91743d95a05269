"""The merges of every study, as rows of a grid, and each row's config for ``mergekit-yaml``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paper import tasks
from paper.models import GENTLE, Family, middle_decoder
from paper.settings import Settings

DROP, WEIGHTS, LARGE, MERGE = "drop rates", "weights dropped", "large deltas", "merges"
ROUND = "rounding"
DARE, DROP_ONLY, MAGNITUDE = "DARE", "drop only", "magnitude pruning"
BY_MAGNITUDE = "DARE, sampling by magnitude"
NEAREST, STOCHASTIC, WIDE = "bfloat16, nearest", "bfloat16, stochastic", "float32"
WEIGHT_DROP_RATE = 0.1
NOT_DRAWN = 0  # in place of a seed, where nothing is random


@dataclass(frozen=True)
class Row:
    """One merge.

    Attributes:
        study: What it is a part of.
        family: Whose models.
        models: The fine-tuned models, joined by ``+``.
        method: How they are merged, or for the study of rounding, how they are rounded.
        drop_rate: The paper's p; density is 1 - p.
        scaling: Factor of the merged delta, or for the study of rounding, each model's weight.
        mask_seed: Of what is dropped.

    """

    study: str
    family: str
    models: str
    method: str
    drop_rate: float
    scaling: float
    mask_seed: int

    @property
    def names(self) -> list[str]:
        """The fine-tuned models."""
        return self.models.split("+")

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)


# mergekit's method, and its parameters beside weight, density, lambda and seed.
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    DARE: ("dare_linear", {}),
    BY_MAGNITUDE: ("dare_linear", {"sampling": "magnitude"}),
    DROP_ONLY: ("dare_linear", {"rescale": False}),
    MAGNITUDE: ("ties", {"normalize": False}),  # of one model: keeps the greatest, elects nothing
    "DARE-linear, sum": ("dare_linear", {}),
    "DARE-linear, average": ("dare_linear", {"normalize": True}),
    "DARE-TIES": ("dare_ties", {}),
    "DARE-linear, sum, by magnitude": ("dare_linear", {"sampling": "magnitude"}),
    "DARE-TIES, by magnitude": ("dare_ties", {"sampling": "magnitude"}),
    NEAREST: ("dare_linear", {}),
    STOCHASTIC: ("dare_linear", {"rounding": "stochastic"}),
    WIDE: ("dare_linear", {}),
    "task arithmetic": ("task_arithmetic", {}),
    "TIES": ("ties", {}),
    "average of weights": ("linear", {}),
}


def config_of(row: Row, folder: Path) -> dict[str, Any]:
    """Return a row's config; ``folder`` holds the family's models."""
    method, shared = _METHODS[row.method]
    per_model: dict[str, Any] = {"weight": 1.0}
    if row.study == ROUND:
        per_model["weight"] = row.scaling
    elif method != "linear":
        shared = shared | {"lambda": row.scaling}
    if method not in ("linear", "task_arithmetic"):
        per_model["density"] = round(1 - row.drop_rate, 6)
    if method.startswith("dare"):
        shared = shared | {"seed": row.mask_seed}
    kind = f"{GENTLE}-" if row.study == ROUND else ""
    models = [
        {"model": str(folder / f"{kind}{name}"), "parameters": per_model} for name in row.names
    ]
    dtype = "bfloat16" if row.method in (NEAREST, STOCHASTIC) else "float32"
    config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": dtype}
    if method != "linear":
        base = "zeros" if row.study == WEIGHTS else f"{kind}base"
        config["base_model"] = str(folder / base)
    if shared:
        config["parameters"] = shared
    return config


def rows(families: Sequence[Family], settings: Settings) -> list[Row]:
    """Return every merge of every study.

    Args:
        families: The decoders, the narrowest first, then the encoder.
        settings: The grid.

    """
    encoder = families[-1]
    middle = middle_decoder(families)
    return [
        *(
            row
            for family in families
            for method in (DARE, BY_MAGNITUDE)
            for row in _drop_rates(family, settings, method)
        ),
        *(
            row
            for family in (middle, encoder)
            for method in (DROP_ONLY, MAGNITUDE)
            for row in _drop_rates(family, settings, method)
        ),
        *(
            Row(WEIGHTS, family.name, task, DARE, WEIGHT_DROP_RATE, 1.0, seed)
            for family in (middle, encoder)
            for task in family.tasks
            for seed in settings.seeds
        ),
        *(
            Row(LARGE, middle.name, tasks.OTHER_TASK, method, drop_rate, 1.0, seed)
            for method in (DARE, BY_MAGNITUDE)
            for drop_rate, seed in _dropping(settings, settings.seeds)
        ),
        *(row for family in (middle, encoder) for row in _several(family, settings)),
        *(row for family in (middle, encoder) for row in _rounded(family, settings)),
    ]


DRAWN = (
    "DARE-linear, sum",
    "DARE-linear, sum, by magnitude",
    "DARE-TIES",
    "DARE-TIES, by magnitude",
)


def _rounded(family: Family, settings: Settings) -> Iterator[Row]:
    """Merge the three gently fine-tuned models, and round in three ways."""
    for drop_rate, weight in itertools.product(settings.drop_rates_rounded, settings.weights):
        for method in (WIDE, NEAREST, STOCHASTIC):
            for seed in settings.seeds:
                yield Row(
                    ROUND, family.name, "+".join(family.tasks), method, drop_rate, weight, seed
                )


def _drop_rates(family: Family, settings: Settings, method: str) -> Iterator[Row]:
    seeds = (NOT_DRAWN,) if method == MAGNITUDE else settings.seeds
    for task in family.tasks:
        for drop_rate, seed in _dropping(settings, seeds):
            yield Row(DROP, family.name, task, method, drop_rate, 1.0, seed)


def _dropping(settings: Settings, seeds: Sequence[int]) -> Iterator[tuple[float, int]]:
    """Yield drop rates and seeds, but not the rate 0: that is the fine-tuned model itself."""
    return itertools.product((rate for rate in settings.drop_rates if rate), seeds)


def _several(family: Family, settings: Settings) -> Iterator[Row]:
    """Merge two models, and all three."""
    groups = [g for size in (2, 3) for g in itertools.combinations(family.tasks, size)]
    for group in groups:
        models = "+".join(group)

        def row(
            method: str, density: float, scaling: float, seed: int, models: str = models
        ) -> Row:
            return Row(MERGE, family.name, models, method, round(1 - density, 6), scaling, seed)

        yield row("average of weights", 1.0, 1.0, NOT_DRAWN)
        for scaling in settings.scalings:
            yield row("task arithmetic", 1.0, scaling, NOT_DRAWN)
            for density in settings.densities:
                yield row("TIES", density, scaling, NOT_DRAWN)
                for method in DRAWN:
                    for seed in settings.seeds:
                        yield row(method, density, scaling, seed)
        for density, seed in itertools.product(settings.densities, settings.seeds):
            yield row("DARE-linear, average", density, 1.0, seed)

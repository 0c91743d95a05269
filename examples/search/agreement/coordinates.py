"""A coordinate search: one weight at a time up or down, by steps that become smaller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Weights = dict[str, float]

UNITS = 8  # in an equal share: weights are searched in whole units, so that none is met twice
FIRST_STEP = 4  # units


def equal_shares(names: Sequence[str]) -> Weights:
    """Return weights that are equal and add up to 1."""
    return _weights(names, [UNITS] * len(names))


def _weights(names: Sequence[str], units: Sequence[int]) -> Weights:
    each = UNITS * len(names)
    return {name: round(unit / each, 4) for name, unit in zip(names, units, strict=True)}


def search(
    score: Callable[[Weights], float | None], names: Sequence[str], evaluations: int
) -> Weights:
    """Return the weights with the highest score, beginning at equal shares.

    Each weight in turn goes a step up, or if that is no better, a step down; when no weight has
    moved, the step is halved, from a half of an equal share to an eighth. No weight
    becomes negative, and none is scored twice. The scores decide all, so the same search asks for
    the same weights again.

    Args:
        score: Gives weights their score; None ranks last.
        names: Of the weights.
        evaluations: How often ``score`` may be called, at least once.

    """
    best = [UNITS] * len(names)
    best_score = _rank(score(_weights(names, best)))
    seen = {tuple(best)}
    step = FIRST_STEP
    while step:
        moved = False
        for place in range(len(names)):
            for change in (step, -step):
                tried = best.copy()
                tried[place] = max(0, tried[place] + change)
                if tuple(tried) in seen:
                    continue
                if len(seen) == evaluations:
                    return _weights(names, best)
                seen.add(tuple(tried))
                found = _rank(score(_weights(names, tried)))
                if found > best_score:
                    best, best_score, moved = tried, found, True
                    break
        if not moved:
            step //= 2
    return _weights(names, best)


def _rank(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else score

"""What a search has found: a table, a plot, and the best config as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search.grid import Value
from search.scores import Scored, number

MOST_ROWS = 20


def write(found: Sequence[Scored], folder: Path, *, minimize: bool) -> None:
    """Print the table of the best; write ``best.yml`` and ``scores.png``.

    Args:
        found: At least one merge.
        folder: To write into.
        minimize: Whether a low score is good.

    """
    ranked = sorted(found, key=lambda scored: rank(scored.score, minimize=minimize))
    print("\n" + "\n".join(table(ranked)))
    best = ranked[0]
    words = f"# Score {number(best.score)}, the best of {len(found)}, by: {best.command}\n"
    (folder / "best.yml").write_text(words + best.config, encoding="utf-8")
    print(f"\nThe best config: {folder / 'best.yml'}")
    print(f"All scores: {folder / 'scores.jsonl'}")
    try:
        plot(found, folder / "scores.png", minimize=minimize)
    except ImportError:
        print("There is no plot, for want of matplotlib: pip install matplotlib")
    else:
        print(f"Plot: {folder / 'scores.png'}")


def rank(score: float | None, *, minimize: bool) -> float:
    """Return a number that is lowest for the best score; no score ranks last."""
    if score is None:
        return float("inf")
    return score if minimize else -score


def table(ranked: Sequence[Scored]) -> list[str]:
    """Return the lines of a table: the values of each merge and its score, the best first."""
    names = list(ranked[0].point)
    rows = [[*names, "score", "seconds"]]
    for scored in ranked[:MOST_ROWS]:
        values = [str(scored.point[name]) for name in names]
        rows.append([*values, number(scored.score), f"{scored.seconds:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join(row) for row in padded]
    more = len(ranked) - MOST_ROWS
    return [*lines, f"and {more} more"] if more > 0 else lines


def plot(found: Sequence[Scored], path: Path, *, minimize: bool) -> None:
    """Draw a panel for each name: all scores by its values, and a line through the best of each.

    Raises:
        ImportError: there is no matplotlib.

    """
    from matplotlib.figure import Figure

    scored = [each for each in found if each.score is not None]
    scores = [each.score for each in scored if each.score is not None]
    if not scored:
        return
    names = list(found[0].point)
    figure = Figure(figsize=(4 * len(names), 3.5), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, panel in zip(names, panels, strict=True):
        places = _places([each.point[name] for each in scored])
        best: dict[Any, float] = {}
        for x, score in zip(places, scores, strict=True):
            best[x] = (min if minimize else max)(score, best.get(x, score))
        panel.plot(places, scores, "o", alpha=0.5)
        line = sorted(best.items()) if not isinstance(places[0], str) else best.items()
        panel.plot(*zip(*line, strict=True), label="the best at each value")
        panel.set_xlabel(name)
    panels[0].set_ylabel("score (lower is better)" if minimize else "score (higher is better)")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def _places(values: Sequence[Value]) -> list[Any]:
    """Return where values are drawn: numbers by their size, anything else by its name."""
    if any(isinstance(value, (bool, str)) for value in values):
        return [str(value) for value in values]
    return list(values)

"""Tables and plots of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper import merges, tasks
from paper.measure import Results
from paper.merges import (
    BY_MAGNITUDE,
    DARE,
    DROP,
    DROP_ONLY,
    LARGE,
    MAGNITUDE,
    MERGE,
    ROUND,
    WEIGHTS,
    Row,
)
from paper.models import Family, Scores, middle_decoder
from paper.settings import Settings

GAIN_TO_KEEP = 0.95

Point = tuple[float, float]  # mean, standard deviation over seeds


@dataclass
class Measured:
    """All that was measured, and the questions that are asked of it.

    Attributes:
        families: The decoders, the narrowest first, then the encoder.
        settings: The grid.
        rows: Every merge.
        results: Its scores.
        unmerged: Scores by family and model.

    """

    families: Sequence[Family]
    settings: Settings
    rows: Sequence[Row]
    results: Results
    unmerged: dict[tuple[str, str], Scores]

    def own(self, family: str, model: str, name: str) -> float:
        """Return a model's score on the task ``name``."""
        return self.unmerged[family, model][name]

    def drop_curve(self, family: str, method: str, study: str = DROP) -> dict[float, Point]:
        """Return the score on a model's own task, mean over models, by drop rate.

        Empty where nothing of the kind was merged.
        """
        rows = [r for r in self.rows if (r.study, r.family, r.method) == (study, family, method)]
        if not rows:
            return {}
        names = list(dict.fromkeys(row.models for row in rows))
        whole = statistics.mean(self.own(family, name, name) for name in names)
        curve = {0.0: (whole, 0.0)} if study != WEIGHTS else {}
        for drop_rate in dict.fromkeys(row.drop_rate for row in rows):
            at_rate = [row for row in rows if row.drop_rate == drop_rate]
            curve[drop_rate] = self.over_seeds(at_rate)
        return curve

    def base_score(self, family: str, names: Sequence[str]) -> float:
        """Return the base's score, mean over tasks."""
        return statistics.mean(self.own(family, "base", name) for name in names)

    def merged(self, family: str, models: str, method: str, scaling: float) -> dict[float, Point]:
        """Return the mean score on the tasks of the merged models, by density."""
        wanted = (MERGE, family, models, method, scaling)
        rows = [
            row
            for row in self.rows
            if (row.study, row.family, row.models, row.method, row.scaling) == wanted
        ]
        densities = sorted({round(1 - row.drop_rate, 6) for row in rows})
        return {
            density: self.over_seeds([r for r in rows if round(1 - r.drop_rate, 6) == density])
            for density in densities
        }

    def over_seeds(self, rows: Sequence[Row]) -> Point:
        """Take the mean over models; return its mean and standard deviation over mask seeds."""
        by_seed: dict[int, list[float]] = {}
        for row in rows:
            found = self.results.get(row) or {}
            by_seed.setdefault(row.mask_seed, []).extend(found[name] for name in row.names)
        means = [statistics.mean(found) for found in by_seed.values()]
        return statistics.mean(means), statistics.stdev(means) if len(means) > 1 else 0.0

    def tolerated(self, family: Family) -> float:
        """Return the drop rate up to which ``GAIN_TO_KEEP`` of the gain over the base is left.

        Linear between the drop rates that were measured.
        """
        curve = self.drop_curve(family.name, DARE)
        base = self.base_score(family.name, family.tasks)
        needed = base + GAIN_TO_KEEP * (curve[0.0][0] - base)
        previous = 0.0
        for drop_rate, (score, _) in sorted(curve.items()):
            if score < needed:
                before = curve[previous][0]
                return previous + (drop_rate - previous) * (before - needed) / (before - score)
            previous = drop_rate
        return previous

    @property
    def encoder(self) -> Family:
        """The encoder."""
        return self.families[-1]

    @property
    def middle(self) -> Family:
        """The decoder of the middle width."""
        return middle_decoder(self.families)


def summary(measured: Measured, verdicts: dict[str, str]) -> str:
    """Return all results in short as Markdown.

    Args:
        measured: What was measured.
        verdicts: What ``mergekit-dare inspect`` says of each model of the middle decoder.

    """
    parts = [
        _drop_table(measured),
        _width_table(measured),
        _weights_table(measured),
        _large_table(measured, verdicts),
        _merge_table(measured),
        _rounding_table(measured),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are numbers."""
    rule = "|" + "|".join("---" if n == 0 else "--:" for n in range(len(head))) + "|"
    rows = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return "\n".join([rows[0], rule, *rows[1:]])


def cell(point: Point, form: str = ".1f") -> str:
    """Return a mean in the given form, and its standard deviation unless it is 0."""
    mean, spread = point
    return f"{mean:{form}} ± {spread:.1f}" if spread else f"{mean:{form}}"


def _drop_table(measured: Measured) -> str:
    lines = []
    for family in measured.families:
        base = measured.base_score(family.name, family.tasks)
        for method in (DARE, BY_MAGNITUDE, DROP_ONLY, MAGNITUDE):
            if curve := measured.drop_curve(family.name, method):
                cells = [cell(curve[rate]) for rate in measured.settings.drop_rates]
                lines.append([family.name, method, f"{base:.1f}", *cells])
    head = ["model", "method", "base", *(f"p = {rate:g}" for rate in measured.settings.drop_rates)]
    return (
        "Score on a fine-tuned model's own task (per cent of held-out items, mean over three "
        "models ± standard deviation over mask seeds) by drop rate p:\n\n" + table(head, lines)
    )


def _width_table(measured: Measured) -> str:
    lines = [
        [
            family.name,
            f"{measured.tolerated(family):.2f}",
            *(_gain_left(measured, family, rate) for rate in measured.settings.drop_rates if rate),
        ]
        for family in measured.families[:-1]
    ]
    rates = [f"p = {rate:g}" for rate in measured.settings.drop_rates if rate]
    head = ["width", f"drop rate that leaves {GAIN_TO_KEEP:.0%}", *rates]
    return "Share of the gain over the base that is left, by width of the decoder:\n\n" + table(
        head, lines
    )


def _gain_left(measured: Measured, family: Family, rate: float) -> str:
    curve = measured.drop_curve(family.name, DARE)
    base = measured.base_score(family.name, family.tasks)
    gain = curve[0.0][0] - base
    return f"{(curve[rate][0] - base) / gain:.0%}" if gain else "no gain"


def _weights_table(measured: Measured) -> str:
    rate = merges.WEIGHT_DROP_RATE
    lines = []
    for family in (measured.middle, measured.encoder):
        deltas = measured.drop_curve(family.name, DARE).get(rate)
        weights = measured.drop_curve(family.name, DARE, WEIGHTS)[rate]
        whole = measured.drop_curve(family.name, DARE)[0.0]
        of_deltas = cell(deltas) if deltas else "not measured"
        lines.append([family.name, cell(whole), of_deltas, cell(weights)])
    head = ["model", "nothing dropped", f"{rate:.0%} of the deltas", f"{rate:.0%} of the weights"]
    return "Dropping (and rescaling) deltas, or the fine-tuned weights themselves:\n\n" + table(
        head, lines
    )


def _large_table(measured: Measured, verdicts: dict[str, str]) -> str:
    family = measured.middle
    lines = []
    for name, verdict in verdicts.items():
        study = LARGE if name == tasks.OTHER_TASK else DROP
        rows = [
            r for r in measured.rows if (r.study, r.family, r.models) == (study, family.name, name)
        ]
        whole, base = (measured.own(family.name, m, name) for m in (name, "base"))
        for method in (DARE, BY_MAGNITUDE):
            of_method = [row for row in rows if row.method == method]
            cells = [
                cell(measured.over_seeds([row for row in of_method if row.drop_rate == rate]))
                for rate in measured.settings.drop_rates
                if rate
            ]
            lines.append([name, verdict, method, f"{base:.1f}", f"{whole:.1f}", *cells])
    rates = [f"p = {rate:g}" for rate in measured.settings.drop_rates if rate]
    head = [
        "fine-tuned on",
        "verdict of `mergekit-dare inspect`",
        "method",
        "base",
        "p = 0",
        *rates,
    ]
    return (
        f"Models of {family.name} with small deltas, and one ({tasks.OTHER_TASK}) trained on with "
        "a high learning rate and other data:\n\n" + table(head, lines)
    )


def _merge_table(measured: Measured) -> str:
    lines = []
    densities = measured.settings.densities
    for family in (measured.middle, measured.encoder):
        groups = list(dict.fromkeys(r.models for r in measured.rows if _is_merge(r, family)))
        for models in groups:
            names = models.split("+")
            unmerged = statistics.mean(measured.own(family.name, name, name) for name in names)
            label = f"{family.name}: {' + '.join(names)}"
            base = measured.base_score(family.name, names)
            lines.append([label, "base; unmerged", "", f"{base:.1f}; {unmerged:.1f}"])
            lines[-1] += [""] * (len(densities) - 1)
            for method, scaling in merge_methods_of(measured, family):
                found = measured.merged(family.name, models, method, scaling)
                if not found:
                    continue
                cells = [cell(found[d]) if d in found else "" for d in densities]
                if list(found) == [1.0]:
                    cells = [cell(found[1.0]), *[""] * (len(densities) - 1)]
                lines.append(["", method, f"{scaling:g}", *cells])
    head = ["models", "method", "scaling", *(f"density {density:g}" for density in densities)]
    return (
        "Merges: mean score on the tasks of all merged models (methods without a density in the "
        "first column):\n\n" + table(head, lines)
    )


def _rounding_table(measured: Measured) -> str:
    lines = []
    weights = measured.settings.weights
    for family in (measured.middle, measured.encoder):
        base = measured.base_score(family.name, family.tasks)
        rows = [r for r in measured.rows if (r.study, r.family) == (ROUND, family.name)]
        for drop_rate, method in dict.fromkeys((row.drop_rate, row.method) for row in rows):
            of_line = [r for r in rows if (r.drop_rate, r.method) == (drop_rate, method)]
            cells = [
                cell(measured.over_seeds([row for row in of_line if row.scaling == weight]))
                for weight in weights
            ]
            lines.append([family.name, f"{drop_rate:g}", method, f"{base:.1f}", *cells])
    head = ["model", "drop rate", "dtype, rounding", "base", *(f"weight {w:g}" for w in weights)]
    return (
        "Three models fine-tuned so gently that their deltas are about a unit in the last place of "
        "bfloat16, merged by DARE-linear: mean score on the three tasks:\n\n" + table(head, lines)
    )


def _is_merge(row: Row, family: Family) -> bool:
    return row.study == MERGE and row.family == family.name


def merge_methods_of(measured: Measured, family: Family) -> list[tuple[str, float]]:
    """Return the methods and scalings that several models were merged with."""
    rows = [row for row in measured.rows if _is_merge(row, family)]
    return list(dict.fromkeys((row.method, row.scaling) for row in rows))


def plot_all(measured: Measured, folder: Path) -> None:
    """Draw every plot into ``folder``."""
    _plot_drop_rates(measured, folder / "drop_rates.png")
    _plot_width(measured, folder / "width.png")
    _plot_merges(measured, folder / "merges.png")


def _plot_drop_rates(measured: Measured, path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, family in zip(
        figure.subplots(1, 2, sharey=True), (measured.middle, measured.encoder), strict=True
    ):
        for number, method in enumerate((DARE, DROP_ONLY, MAGNITUDE, BY_MAGNITUDE)):
            _line(axes, measured.drop_curve(family.name, method), method, f"C{number}")
        base = measured.base_score(family.name, family.tasks)
        axes.axhline(base, color="gray", linestyle=":", label="base")
        axes.set(title=family.name, xlabel="drop rate p")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("score on the model's own task, %")
    figure.axes[0].legend()
    figure.savefig(path, dpi=100)


def _plot_width(measured: Measured, path: Path) -> None:
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, family in enumerate(measured.families[:-1]):
        base = measured.base_score(family.name, family.tasks)
        curve = measured.drop_curve(family.name, DARE)
        gain = curve[0.0][0] - base or 1.0
        shares = {
            rate: (100 * (mean - base) / gain, 100 * spread / gain)
            for rate, (mean, spread) in curve.items()
        }
        _line(axes, shares, family.name, f"C{number}")
    axes.axhline(100 * GAIN_TO_KEEP, color="gray", linestyle=":")
    axes.set(xlabel="drop rate p", ylabel="gain over the base that is left, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def _plot_merges(measured: Measured, path: Path) -> None:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, family in zip(
        figure.subplots(1, 2, sharey=True), (measured.middle, measured.encoder), strict=True
    ):
        models = "+".join(family.tasks)
        methods = list(dict.fromkeys(method for method, _ in merge_methods_of(measured, family)))
        for method, scaling in merge_methods_of(measured, family):
            found = measured.merged(family.name, models, method, scaling)
            if list(found) == [1.0]:  # no density: a level
                found = dict.fromkeys((*measured.settings.densities, 1.0), found[1.0])
            style = "-" if scaling == max(measured.settings.scalings) else "--"
            color = f"C{methods.index(method)}"
            _line(axes, found, f"{method}, scaling {scaling:g}", color, style)
        axes.set(title=f"{family.name}: all three models", xlabel="density")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean score on the three tasks, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


def _line(axes: Axes, curve: dict[float, Point], label: str, color: str, style: str = "-") -> None:
    xs = sorted(curve)
    means = [curve[x][0] for x in xs]
    axes.plot(xs, means, f"o{style}", markersize=3, color=color, label=label)
    lower = [mean - curve[x][1] for x, mean in zip(xs, means, strict=True)]
    upper = [mean + curve[x][1] for x, mean in zip(xs, means, strict=True)]
    axes.fill_between(xs, lower, upper, color=color, alpha=0.2)

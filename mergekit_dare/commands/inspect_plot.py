"""The picture that ``mergekit-dare inspect --plot`` draws."""

from __future__ import annotations

import math

import torch

from mergekit_dare.diagnostics.deltas.inspection import Report
from mergekit_dare.diagnostics.deltas.statistics import (
    DeltaStatistics,
    bin_edges,
    magnitude_noise,
    noise_factor,
)
from mergekit_dare.diagnostics.deltas.verdict import LARGE, SMALL
from mergekit_dare.kernel.sampling import Sampling


def check_plot(path: str) -> None:
    """Make sure that a picture can be drawn, before anything is measured.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder does not exist, or cannot be written to.

    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        message = "--plot needs matplotlib: pip install 'mergekit-dare[plot]'"
        raise ImportError(message) from error
    with open(path, "ab"):
        pass


def plot(report: Report, path: str) -> None:
    """Plot the models' deltas, and DARE's noise against density, to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, model) in enumerate(report.models.items()):
        color = f"C{number}"
        centers, shares = histogram(model.total)
        left.plot(centers, shares, color=color, label=name)
        for sampling, style in zip(Sampling, ("-", "--"), strict=True):
            densities, noise = noise_curve(model.total, sampling)
            right.plot(densities, noise, style, color=color)
        for density in sorted(model.densities):
            if 0 < density < 1:
                height = noise_factor(density) * model.total.relative_norm
                right.plot([density], [height], "o", color=color)
    for magnitude, meaning in ((SMALL, "SFT: mostly below"), (LARGE, "DARE impractical")):
        left.axvline(magnitude, color="gray", linestyle=":")
        top = left.get_xaxis_transform()
        left.text(magnitude, 1.01, f"{magnitude}", ha="center", transform=top, color="gray")
        left.text(
            magnitude,
            0.97,
            f"{meaning} ",
            ha="right",
            va="top",
            rotation=90,
            transform=top,
            color="gray",
            fontsize=8,
        )
    left.set(
        xscale="log",
        xlabel="|delta|",
        ylabel="share of deltas per octave",
        ylim=(0, None),
    )
    left.set_title("Size of the deltas", pad=18)
    right.set(
        xscale="log",
        yscale="log",
        xlabel="density (dots: the config's; dashed: sampling by magnitude)",
        ylabel="noise, relative to the base model's norm",
    )
    right.set_title("Noise that DARE adds", pad=18)
    right.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=110)


def histogram(statistics: DeltaStatistics) -> tuple[list[float], list[float]]:
    """Return the middles of octaves of |delta| and the share of deltas in each."""
    octaves = statistics.histogram.view(-1, 128).sum(1)
    edges = bin_edges()[:-1:128].tolist()
    used = [index for index in range(1, len(octaves)) if int(octaves[index])]
    if not used:
        return [], []
    window = range(max(1, used[0] - 1, used[-1] - 24), used[-1] + 2)
    count = max(1, statistics.count)
    return [edges[i] * math.sqrt(2) for i in window], [int(octaves[i]) / count for i in window]


def noise_curve(
    statistics: DeltaStatistics, sampling: Sampling = Sampling.UNIFORM
) -> tuple[list[float], list[float]]:
    """Return densities from 0.01 to 0.95 and the relative norm of DARE's noise at each.

    For sampling by magnitude, as if all deltas were those of one tensor.
    """
    densities = torch.logspace(-2, math.log10(0.95), 50, dtype=torch.float64).tolist()
    if sampling is Sampling.UNIFORM or not statistics.square_sum:
        return densities, [noise_factor(d) * statistics.relative_norm for d in densities]
    powers = [magnitude_noise(statistics, d) / statistics.square_sum for d in densities]
    return densities, [math.sqrt(power) * statistics.relative_norm for power in powers]

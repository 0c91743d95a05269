"""What ``mergekit-dare inspect`` finds out about the models of a config, and how it shows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary
from torch import Tensor
from tqdm import tqdm

from mergekit_dare.diagnostics.deltas import (
    LARGE,
    SMALL,
    DeltaStatistics,
    PairStatistics,
    Verdict,
    bin_edges,
    judge,
    measure,
    noise_factor,
)

QUANTILES = (0.5, 0.9, 0.99, 0.999)
STANDING_OUT = 5  # tensors that are named for each model


@dataclass
class ModelReport:
    """What was found of one fine-tuned model.

    Attributes:
        total: Statistics of all its deltas.
        tensors: The greatest |delta| and the relative norm of each tensor, by name.
        noise_square_sum: Sum of the squared standard deviations of the noise that DARE adds at
            the config's densities.
        densities: Every density that the config gives it.

    """

    total: DeltaStatistics = field(default_factory=DeltaStatistics)
    tensors: dict[str, tuple[float, float]] = field(default_factory=dict)
    noise_square_sum: float = 0.0
    densities: set[float] = field(default_factory=set)

    @property
    def relative_noise(self) -> float:
        """L2 norm of the noise over that of the base."""
        base = self.total.base_square_sum
        return math.sqrt(self.noise_square_sum / base) if base else math.inf

    def standing_out(self) -> list[str]:
        """Return the names of the tensors with the greatest |delta|, the greatest first."""
        return sorted(self.tensors, key=lambda name: -self.tensors[name][0])[:STANDING_OUT]


@dataclass
class Report:
    """What was found of all models.

    Attributes:
        models: By name, in the order of the config.
        pairs: By both names.
        left_out: Tensors that could not be compared, and why.

    """

    models: dict[str, ModelReport]
    pairs: dict[tuple[str, str], PairStatistics]
    left_out: dict[str, str] = field(default_factory=dict)

    def verdicts(self) -> dict[str, Verdict]:
        """Judge every model, also by how it compares with the others."""
        return {
            name: judge(
                model.total, [other.total for other in self.models.values() if other is not model]
            )
            for name, model in self.models.items()
        }


def inspect_config(path: str, device: str = "cpu", quiet: bool = False) -> Report:
    """Measure the deltas of every fine-tuned model of a config, one tensor at a time.

    Args:
        path: A config as ``mergekit-yaml`` takes it.
        device: Where to compute.
        quiet: Show no progress bar.

    Raises:
        ValueError: the config has no base model or no fine-tuned model.

    """
    document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if isinstance(document, dict):
        document.pop("name", None)
    config = MergeConfiguration.model_validate(document)
    if config.base_model is None:
        raise ValueError(f"{path} needs base_model: deltas are differences from it")
    tasks = _plan(config)
    names = [str(m) for m in _in_order(tasks)]
    if not names:
        raise ValueError(f"{path} has no fine-tuned model beside the base model")
    pairs = {pair: PairStatistics() for pair in itertools.combinations(names, 2)}
    report = Report({name: ModelReport() for name in names}, pairs)
    for task in tqdm(tasks, desc="Measuring deltas", disable=quiet):
        _add_tensor(report, task, device)
    return report


def _plan(config: MergeConfiguration) -> list[ExecuteMergeMethodTask]:
    """Plan as mergekit does, so that slices, filters and gradients mean what they mean there."""
    options = MergeOptions()
    architecture = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    assert config.base_model is not None
    out_config = config.base_model.config(trust_remote_code=options.trust_remote_code)
    planner = MergePlanner(config, architecture, options, out_config)
    # Planning writes nothing: the folder would be made when the tasks are run.
    saves = [task for task in planner.plan_to_disk("unused") if isinstance(task, SaveTensor)]
    tasks = (save.tensor_task for save in saves)
    return [task for task in tasks if isinstance(task, ExecuteMergeMethodTask)]


def _in_order(tasks: list[ExecuteMergeMethodTask]) -> Iterator[ModelReference]:
    seen: set[ModelReference] = set()
    for task in tasks:
        for model in task.model_order:
            if model != task.base_model and model not in seen:
                seen.add(model)
                yield model


def _add_tensor(report: Report, task: ExecuteMergeMethodTask, device: str) -> None:
    name = task.output_weight.name
    tensors = _load(task, device)
    base = tensors.pop(task.base_model, None) if task.base_model is not None else None
    if base is None or not base.is_floating_point():
        report.left_out[name] = "not in the base model" if base is None else "no floating point"
        return
    fine_tuned = {}
    for model, tensor in tensors.items():
        if tensor.shape == base.shape:
            fine_tuned[str(model)] = tensor
        else:
            shapes = f"{tuple(tensor.shape)} in {model}, {tuple(base.shape)} in the base model"
            report.left_out[name] = f"shapes differ: {shapes}"
    measured = measure(base, fine_tuned)
    for model in task.input_parameters:
        if str(model) in measured.models:
            statistics = measured.models[str(model)]
            density = float(dict(task.input_parameters[model].items()).get("density", 1.0))
            of_model = report.models[str(model)]
            of_model.total.add(statistics)
            largest = max(-statistics.smallest, statistics.largest)
            of_model.tensors[name] = (largest, statistics.relative_norm)
            of_model.densities.add(density)
            if density > 0:
                of_model.noise_square_sum += noise_factor(density) ** 2 * statistics.square_sum
    for pair, found in measured.pairs.items():
        report.pairs[pair].add(found)


def _load(task: ExecuteMergeMethodTask, device: str) -> dict[ModelReference, Tensor]:
    """Load one tensor of each model, before any alignment of vocabularies."""
    gather = task.gather_tensors
    if isinstance(gather, PermutedVocabulary | TruncatedVocabulary):
        gather = gather.gather_tensors
    assert isinstance(gather, GatherTensors)
    loaded = {name: load.execute() for name, load in gather.arguments().items()}
    return {model: t.to(device) for model, t in gather.execute(**loaded).items()}


def as_json(report: Report) -> dict[str, Any]:
    """Return everything that was found, as JSON takes it."""
    verdicts = report.verdicts()
    models = {}
    for name, model in report.models.items():
        total = model.total
        models[name] = {
            "deltas": total.count,
            "smallest": total.smallest,
            "largest": total.largest,
            "mean_magnitude": total.mean_magnitude,
            "quantiles": {str(q): total.quantile(q) for q in QUANTILES},
            "relative_norm": total.relative_norm,
            "zero_share": total.zero_share,
            f"share_above_{SMALL}": total.share_above(SMALL),
            f"share_above_{LARGE}": total.share_above(LARGE),
            "non_finite": total.non_finite,
            "densities": sorted(model.densities),
            "relative_noise": model.relative_noise,
            "standing_out": {
                tensor: dict(zip(("largest", "relative_norm"), model.tensors[tensor], strict=True))
                for tensor in model.standing_out()
            },
            "verdict": verdicts[name].kind,
            "sentence": verdicts[name].sentence,
            "suggested_density": verdicts[name].density,
            "reason": verdicts[name].reason,
        }
    pairs = [
        {"models": list(pair), "cosine": p.cosine, "sign_conflicts": p.conflict_share}
        for pair, p in report.pairs.items()
    ]
    return {"models": models, "pairs": pairs, "left_out": report.left_out}


def as_text(report: Report) -> str:
    """Return the report for people."""
    verdicts = report.verdicts()
    lines = []
    for name, model in report.models.items():
        total, verdict = model.total, verdicts[name]
        quantiles = ", ".join(f"{q:.1%} {total.quantile(q):.2g}" for q in QUANTILES)
        densities = sorted(model.densities)
        shown = " to ".join(f"{d:g}" for d in dict.fromkeys((densities[0], densities[-1])))
        lines += [
            name,
            f"  verdict        {verdict.sentence}",
            f"  try density    {verdict.density:g}: {verdict.reason}",
            f"  range          {total.smallest:.3g} to {total.largest:.3g}",
            f"  |delta|        mean {total.mean_magnitude:.2g}; within: {quantiles}",
            (
                f"  shares         exactly 0: {total.zero_share:.2%}; above {SMALL}: "
                f"{total.share_above(SMALL):.2%}; above {LARGE}: {total.share_above(LARGE):.2%}"
            ),
            f"  relative norm  {total.relative_norm:.3g} of the base",
            f"  DARE's noise   {model.relative_noise:.3g} of the base, at density {shown}",
            "  standing out   "
            + "\n                 ".join(
                f"{tensor}: |delta| up to {model.tensors[tensor][0]:.3g}, "
                f"relative norm {model.tensors[tensor][1]:.2g}"
                for tensor in model.standing_out()
            ),
            "",
        ]
    for (first, second), pair in report.pairs.items():
        lines.append(
            f"{first} and {second}: cosine {pair.cosine:.3f}, opposite signs in "
            f"{pair.conflict_share:.1%} of what both change"
        )
    if report.left_out:
        lines += ["", "Not compared:"]
        lines += [f"  {name}: {why}" for name, why in report.left_out.items()]
    return "\n".join(lines).rstrip()


def plot(report: Report, path: str) -> None:
    """Draw the models' deltas and DARE's noise against density into a PNG file.

    Raises:
        ImportError: matplotlib is not installed.

    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "--plot needs matplotlib: pip install 'mergekit-dare[plot]'"
        raise ImportError(message) from error

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, model) in enumerate(report.models.items()):
        color = f"C{number}"
        centers, shares = histogram(model.total)
        left.plot(centers, shares, color=color, label=name)
        densities, noise = noise_curve(model.total)
        right.plot(densities, noise, color=color, label=name)
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
        xlabel="density (dots: the config's)",
        ylabel="noise, relative to the base's norm",
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


def noise_curve(statistics: DeltaStatistics) -> tuple[list[float], list[float]]:
    """Return densities from 0.01 to 0.95 and the relative norm of DARE's noise at each."""
    densities = torch.logspace(-2, math.log10(0.95), 50, dtype=torch.float64).tolist()
    return densities, [noise_factor(d) * statistics.relative_norm for d in densities]

"""What ``mergekit-dare inspect`` finds out about the models of a config, and how it shows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

import mergekit_dare
from mergekit_dare.diagnostics import planning
from mergekit_dare.diagnostics.deltas import (
    LARGE,
    SMALL,
    DeltaStatistics,
    PairStatistics,
    Verdict,
    bin_edges,
    judge,
    magnitude_noise,
    measure,
    noise_factor,
)
from mergekit_dare.diagnostics.document import choose
from mergekit_dare.kernel import merging
from mergekit_dare.kernel.formula import SUPPORTED_DTYPES, Combine
from mergekit_dare.kernel.merging import FineTuned, Recipe
from mergekit_dare.kernel.rounding import NARROW, Rounding
from mergekit_dare.kernel.sampling import Sampling

QUANTILES = (0.5, 0.9, 0.99, 0.999)
STANDING_OUT = 5  # tensors that are named for each model


@dataclass
class ModelReport:
    """What was found of one fine-tuned model.

    Attributes:
        total: Statistics of all its deltas.
        tensors: The greatest |delta| and the relative norm of each tensor, by name.
        noise_square_sums: Sum of the variances of the noise that DARE adds at the config's
            densities, by sampling.
        densities: Every density that the config gives it.

    """

    total: DeltaStatistics = field(default_factory=DeltaStatistics)
    tensors: dict[str, tuple[float, float]] = field(default_factory=dict)
    noise_square_sums: dict[Sampling, float] = field(
        default_factory=lambda: dict.fromkeys(Sampling, 0.0)
    )
    densities: set[float] = field(default_factory=set)

    def relative_noise(self, sampling: Sampling = Sampling.UNIFORM) -> float:
        """L2 norm of the noise over that of the base."""
        base = self.total.base_square_sum
        return math.sqrt(self.noise_square_sums[sampling] / base) if base else math.inf

    def standing_out(self) -> list[str]:
        """Return the names of the tensors with the greatest |delta|, the greatest first."""
        return sorted(self.tensors, key=lambda name: -self.tensors[name][0])[:STANDING_OUT]


@dataclass
class MergedChange:
    """What becomes of the merged change, lambda D, when it is drawn and rounded.

    Attributes:
        sampling: That of the config.
        rounding: That of the config.
        dtype: What is rounded to.
        square_sum: Sum of the squares of the change that is expected: nothing dropped, in float32.
        kept: Product of the expected change with the one that is left after drawing and rounding
            to nearest.
        stochastic_square_sum: Sum of the squares of what stochastic rounding adds as noise.

    """

    sampling: Sampling = Sampling.UNIFORM
    rounding: Rounding = Rounding.NEAREST
    dtype: str = ""
    square_sum: float = 0.0
    kept: float = 0.0
    stochastic_square_sum: float = 0.0

    @property
    def survives(self) -> float | None:
        """The share of the expected change that rounding to nearest leaves, by projection."""
        return self.kept / self.square_sum if self.square_sum else None

    @property
    def stochastic_noise(self) -> float | None:
        """The noise of stochastic rounding over the norm of the expected change."""
        if not self.square_sum:
            return None
        return math.sqrt(self.stochastic_square_sum / self.square_sum)


@dataclass
class Report:
    """What was found of all models.

    Attributes:
        models: By name, in the order of the config.
        pairs: By both names.
        change: What becomes of the merge in a narrow dtype; ``None`` for other methods and dtypes.
        left_out: Tensors that could not be compared, and why: one reason for each model.

    """

    models: dict[str, ModelReport]
    pairs: dict[tuple[str, str], PairStatistics]
    change: MergedChange | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def advice(self) -> list[str]:
        """Return a sentence for each setting that would help."""
        sentences = []
        change = self.change
        if change is not None and change.rounding is Rounding.NEAREST:
            share = change.survives
            if share is not None and not 0.9 < share < 1.1:
                sentences.append(
                    f"rounding to {change.dtype} makes {share:.0%} of the merged change; "
                    "rounding: stochastic keeps its expectation"
                )
        for name, model in self.models.items():
            uniform, magnitude = (model.relative_noise(sampling) for sampling in Sampling)
            if change is not None and change.sampling is Sampling.MAGNITUDE:
                continue
            loud = math.isfinite(uniform) and uniform > model.total.relative_norm * 1.4
            if loud and magnitude < 0.9 * uniform:
                less = 1 - magnitude / uniform
                sentences.append(
                    f"at its density, the noise of drawing is larger than the deltas of {name}; "
                    f"sampling: magnitude takes {less:.0%} of it away"
                )
        return sentences

    def verdicts(self) -> dict[str, Verdict]:
        """Judge every model, also by how it compares with the others."""
        return {
            name: judge(
                model.total, [other.total for other in self.models.values() if other is not model]
            )
            for name, model in self.models.items()
        }


def inspect_config(
    path: str, options: MergeOptions | None = None, *, name: str | None = None
) -> Report:
    """Measure the deltas of every fine-tuned model of a config, one tensor at a time.

    Args:
        path: A config as ``mergekit-yaml`` or ``mergekit-pytorch`` takes it, or a file with
            several as ``mergekit-multi`` takes it.
        options: mergekit's own; of use are those that say how models are loaded, ``device`` and
            ``quiet``.
        name: Which config of a file with several.

    Raises:
        UnusableFileError: the file cannot be read, or a model's files are damaged.
        ValueError: the config has no base model or no fine-tuned model.
        Exception: whatever mergekit raises of a config that it refuses.

    """
    options = options or MergeOptions()
    _check_device(options.device)
    mergekit_dare.register()
    document = choose(path, name)
    with ExitStack() as stack:
        if options.lora_merge_cache is None:
            cache = stack.enter_context(TemporaryDirectory(prefix="mergekit-dare-"))
            options = options.model_copy(update={"lora_merge_cache": cache})
        base, saves = planning.plan_document(document, options)
        planned = (save.tensor_task for save in saves)
        tasks = [task for task in planned if isinstance(task, ExecuteMergeMethodTask)]
        if base is None:
            raise ValueError(f"{path} needs base_model: deltas are differences from it")
        names = [str(model) for model in _in_order(tasks)]
        if not names:
            raise ValueError(f"{path} has no fine-tuned model beside the base model")
        pairs = {pair: PairStatistics() for pair in itertools.combinations(names, 2)}
        report = Report({name: ModelReport() for name in names}, pairs)
        kept: dict[Any, Any] = {}
        for task in tqdm(tasks, desc="Measuring deltas", disable=options.quiet):
            _add_tensor(report, task, planning.loaded(task, kept), options.device or "cpu")
    return report


def _check_device(device: str | None) -> None:
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch has a type of its own for each device that is not there
        raise ValueError(f"--device {device} is of no use here: {error}") from error


def _in_order(tasks: list[ExecuteMergeMethodTask]) -> Iterator[ModelReference]:
    seen: set[ModelReference] = set()
    for task in tasks:
        for model in task.model_order:
            if model != task.base_model and model not in seen:
                seen.add(model)
                yield model


def _add_tensor(
    report: Report, task: ExecuteMergeMethodTask, loaded: dict[Any, Tensor], device: str
) -> None:
    name = task.output_weight.name
    tensors = {model: tensor.to(device) for model, tensor in loaded.items() if tensor is not None}
    base = tensors.pop(task.base_model, None)
    if base is None or not base.is_floating_point():
        report.left_out[name] = ["not in the base model" if base is None else "no floating point"]
        return
    fine_tuned, reasons = {}, []
    for model in task.model_order:
        if model == task.base_model:
            continue
        tensor = tensors.get(model)
        if tensor is None:
            reasons.append(f"not in {model}")
        elif tensor.shape != base.shape:
            shapes = f"{tuple(tensor.shape)} in {model}, {tuple(base.shape)} in the base model"
            reasons.append(f"shapes differ: {shapes}")
        else:
            fine_tuned[str(model)] = tensor
    if reasons:
        report.left_out[name] = reasons
    measured = measure(base, fine_tuned)
    for model in task.input_parameters:
        if str(model) in measured.models:
            statistics = measured.models[str(model)]
            density = float(dict(task.input_parameters[model].items()).get("density", 1.0))
            of_model = report.models[str(model)]
            of_model.total.add(statistics)
            largest = max(-statistics.smallest, statistics.largest) + 0.0  # not -0.0
            of_model.tensors[name] = (largest, statistics.relative_norm)
            of_model.densities.add(density)
            if density > 0:
                uniform = noise_factor(density) ** 2 * statistics.square_sum
                of_model.noise_square_sums[Sampling.UNIFORM] += uniform
                magnitude = magnitude_noise(statistics, density)
                of_model.noise_square_sums[Sampling.MAGNITUDE] += magnitude
    for pair, found in measured.pairs.items():
        report.pairs[pair].add(found)
    if not reasons and all(not m.non_finite for m in measured.models.values()):
        _add_change(report, task, base, tensors)


def _add_change(
    report: Report, task: ExecuteMergeMethodTask, base: Tensor, tensors: dict[Any, Tensor]
) -> None:
    """Merge one tensor with and without drawing and rounding, and add what the one makes of it."""
    methods = {f"dare_{combine.value}": combine for combine in Combine}
    shared = dict(task.parameters.items())
    narrow = base.dtype in NARROW and task.method_name in methods
    if not narrow or "sampling" not in shared:
        return
    of_models = {model: dict(task.input_parameters[model].items()) for model in tensors}
    entries = [
        FineTuned(str(model), tensor, of_models[model]["weight"], of_models[model]["density"])
        for model, tensor in tensors.items()
        if tensor.dtype in SUPPORTED_DTYPES
    ]
    recipe = Recipe(
        methods[task.method_name],
        task.output_weight.name,
        shared["seed"] or 0,
        normalize=shared["normalize"],
        rescale=shared["rescale"],
        lambda_=shared["lambda"],
        sampling=Sampling(shared["sampling"]),
    )
    stochastic = replace(recipe, rounding=Rounding.STOCHASTIC)
    wide = base.float()
    whole = merging.merge(wide, [replace(model, density=1.0) for model in entries], recipe)
    drawn = merging.merge(wide, entries, recipe)
    expected = (whole - wide).double().view(-1)
    if report.change is None:
        report.change = MergedChange(recipe.sampling, Rounding(shared["rounding"]))
        report.change.dtype = str(base.dtype).removeprefix("torch.")
    change = report.change
    change.square_sum += float(expected.dot(expected))
    left = (drawn.to(base.dtype).float() - wide).double().view(-1)
    change.kept += float(expected.dot(left))
    noise = (merging.merge(base, entries, stochastic).float() - drawn).double().view(-1)
    change.stochastic_square_sum += float(noise.dot(noise))


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
            "relative_noise": model.relative_noise(),
            "relative_noise_by_magnitude": model.relative_noise(Sampling.MAGNITUDE),
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
    change = report.change
    merged_change = None
    if change is not None:
        merged_change = {
            "dtype": change.dtype,
            "sampling": change.sampling.value,
            "rounding": change.rounding.value,
            "survives_rounding_to_nearest": change.survives,
            "relative_noise_of_stochastic_rounding": change.stochastic_noise,
        }
    found = {
        "models": models,
        "pairs": pairs,
        "merged_change": merged_change,
        "advice": report.advice(),
        "left_out": report.left_out,
    }
    return {key: _finite(value) for key, value in found.items()}


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(report: Report) -> str:
    """Return the report for people."""
    verdicts = report.verdicts()
    lines = []
    for name, model in report.models.items():
        lines += [name, *_model_lines(model, verdicts[name]), ""]
    for (first, second), pair in report.pairs.items():
        if pair.both:
            lines.append(
                f"{first} and {second}: cosine {pair.cosine:.3f}, opposite signs in "
                f"{pair.conflict_share:.1%} of what both change"
            )
    change = report.change
    if change is not None and change.survives is not None:
        lines += [
            "",
            (
                f"Merged, and rounded to {change.dtype}: {change.survives:.0%} of the expected "
                f"change; stochastic rounding adds noise of {change.stochastic_noise:.2g} of it"
            ),
        ]
    if advice := report.advice():
        lines += ["", *(f"Try this: {sentence}" for sentence in advice)]
    if report.left_out:
        lines += ["", "Not compared:"]
        lines += [
            f"  {name}: {why}" for name, reasons in report.left_out.items() for why in reasons
        ]
    return "\n".join(lines).rstrip()


def _model_lines(model: ModelReport, verdict: Verdict) -> list[str]:
    total = model.total
    lines = [
        f"  verdict        {verdict.sentence}",
        f"  try density    {verdict.density:g}: {verdict.reason}",
    ]
    if not total.count:
        return lines
    quantiles = ", ".join(f"{q:.1%} {total.quantile(q):.2g}" for q in QUANTILES)
    densities = sorted(model.densities)
    shown = " to ".join(f"{d:g}" for d in dict.fromkeys((densities[0], densities[-1])))
    lines += [
        f"  range          {total.smallest:.3g} to {total.largest:.3g}",
        f"  |delta|        mean {total.mean_magnitude:.2g}; within: {quantiles}",
        (
            f"  shares         exactly 0: {total.zero_share:.2%}; above {SMALL}: "
            f"{total.share_above(SMALL):.2%}; above {LARGE}: {total.share_above(LARGE):.2%}"
        ),
        f"  relative norm  {total.relative_norm:.3g} of the base",
        (
            f"  DARE's noise   {model.relative_noise():.3g} of the base, by magnitude "
            f"{model.relative_noise(Sampling.MAGNITUDE):.3g}, at density {shown}"
        ),
        "  standing out   "
        + "\n                 ".join(
            f"{tensor}: |delta| up to {model.tensors[tensor][0]:.3g}, "
            f"relative norm {model.tensors[tensor][1]:.2g}"
            for tensor in model.standing_out()
        ),
    ]
    return lines


def check_plot(path: str) -> None:
    """Make sure that a picture can be drawn, before anything is measured.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder is not there, or cannot be written to.

    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        message = "--plot needs matplotlib: pip install 'mergekit-dare[plot]'"
        raise ImportError(message) from error
    with open(path, "ab"):
        pass


def plot(report: Report, path: str) -> None:
    """Draw the models' deltas and DARE's noise against density into a PNG file."""
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


def noise_curve(
    statistics: DeltaStatistics, sampling: Sampling = Sampling.UNIFORM
) -> tuple[list[float], list[float]]:
    """Return densities from 0.01 to 0.95 and the relative norm of DARE's noise at each.

    By magnitude, as if all deltas were one tensor's.
    """
    densities = torch.logspace(-2, math.log10(0.95), 50, dtype=torch.float64).tolist()
    if sampling is Sampling.UNIFORM or not statistics.square_sum:
        return densities, [noise_factor(d) * statistics.relative_norm for d in densities]
    powers = [magnitude_noise(statistics, d) / statistics.square_sum for d in densities]
    return densities, [math.sqrt(power) * statistics.relative_norm for power in powers]

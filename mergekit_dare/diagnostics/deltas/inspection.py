"""What ``mergekit-dare inspect`` finds out about the models of a config."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

import mergekit_dare
from mergekit_dare.diagnostics.config.reading import choose
from mergekit_dare.diagnostics.deltas.excerpts import Excerpt, ExcerptReader
from mergekit_dare.diagnostics.deltas.statistics import (
    DeltaStatistics,
    PairStatistics,
    magnitude_noise,
    measure,
    noise_factor,
)
from mergekit_dare.diagnostics.deltas.verdict import Verdict, judge
from mergekit_dare.diagnostics.examination import Examination
from mergekit_dare.diagnostics.plan import planning, tasks
from mergekit_dare.kernel import merging, threads
from mergekit_dare.kernel.formula import dtype_name
from mergekit_dare.kernel.masks import unsigned_lanes
from mergekit_dare.kernel.rounding import NARROW, Rounding, round_stochastically
from mergekit_dare.kernel.sampling import Sampling

STANDING_OUT = 5  # tensors that are named for each model
CHANGED_BLOCKS = 8  # blocks of an excerpt that are merged, to see what becomes of the change


@dataclass
class ModelReport:
    """What was found out about one fine-tuned model.

    Attributes:
        total: Statistics of all its deltas.
        tensors: The greatest |delta| and the relative norm of each tensor, by name.
        noise_square_sums: Sum of the variances of the noise that DARE adds at the config's
            densities, by sampling.
        densities: Every density that the config gives it.
        untouched: Number of elements in tensors that equal the base's.
        halves: Statistics of each half of the excerpts, to see how much they differ.

    """

    total: DeltaStatistics = field(default_factory=DeltaStatistics)
    halves: tuple[DeltaStatistics, DeltaStatistics] = field(
        default_factory=lambda: (DeltaStatistics(), DeltaStatistics())
    )
    tensors: dict[str, tuple[float, float]] = field(default_factory=dict)
    noise_square_sums: dict[Sampling, float] = field(
        default_factory=lambda: dict.fromkeys(Sampling, 0.0)
    )
    densities: set[float] = field(default_factory=set)
    untouched: int = 0

    @property
    def changed_share(self) -> float:
        """Share of elements that differ from the base's, of the tensors that do.

        So an adapter that was merged into a few layers does not pass for a sparse change.
        """
        return (self.total.count - self.total.zeros) / max(1, self.total.count - self.untouched)

    def relative_noise(self, sampling: Sampling = Sampling.UNIFORM) -> float:
        """L2 norm of the noise over that of the base."""
        base = self.total.base_square_sum
        return math.sqrt(self.noise_square_sums[sampling] / base) if base else math.inf

    def error(self) -> float:
        """Return how far off its figures may be: how much the halves of the excerpts differ.

        The larger of the relative differences of the 99 % quantile and of the relative norm.
        """
        differences = [0.0]
        for figure in (lambda half: half.quantile(0.99), lambda half: half.relative_norm):
            one, other = map(figure, self.halves)
            if math.isfinite(one + other) and one + other:
                differences.append(abs(one - other) / ((one + other) / 2))
        return max(differences)

    def standing_out(self) -> list[str]:
        """Return the names of the tensors with the greatest |delta|, the greatest first."""
        return sorted(self.tensors, key=lambda name: -self.tensors[name][0])[:STANDING_OUT]


@dataclass
class MergedChange:
    """What becomes of the merged change, lambda D, when deltas are dropped and it is rounded.

    Attributes:
        sampling: That of the config.
        rounding: That of the config.
        dtype: The dtype that it is rounded to.
        square_sum: Sum of the squares of the expected change: nothing dropped, in float32.
        kept: Product of the expected change with the one that remains after dropping and rounding
            to nearest.
        stochastic_square_sum: Sum of the squares of the noise that stochastic rounding adds.

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
    def is_distorted(self) -> bool:
        """Whether rounding to nearest shrinks or exaggerates the change by more than a tenth."""
        return self.survives is not None and not 0.9 < self.survives < 1.1

    @property
    def stochastic_noise(self) -> float | None:
        """The noise of stochastic rounding over the norm of the expected change."""
        if not self.square_sum:
            return None
        return math.sqrt(self.stochastic_square_sum / self.square_sum)


@dataclass
class Report:
    """What was found out about all models.

    Attributes:
        models: By name, in the order of the config.
        pairs: By both names.
        change: What becomes of the merge in a narrow dtype; ``None`` for other methods and dtypes.
        left_out: Tensors that could not be compared, and why: one reason for each model.
        share_read: Fraction of the tensors' bytes that was read, in whole pages.
        is_partial: Whether the figures are from excerpts.

    """

    models: dict[str, ModelReport]
    pairs: dict[tuple[str, str], PairStatistics]
    change: MergedChange | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    share_read: float = 1.0
    is_partial: bool = False

    def advice(self) -> list[str]:
        """Return a sentence for each setting that would help."""
        sentences = []
        change = self.change
        if change is not None and change.rounding is Rounding.NEAREST and change.is_distorted:
            sentences.append(
                f"rounding to {change.dtype} scales the merged change to {change.survives:.0%}; "
                "rounding: stochastic preserves it on average"
            )
        sparse = [
            f"{self.models[name].changed_share:.1%} in {name}"
            for name, verdict in self.verdicts().items()
            if verdict.sparse
        ]
        if sparse:
            sentences.append(
                f"density counts all elements, but few are changed ({', '.join(sparse)}): "
                "sampling: uniform drops the same fraction of the few, sampling: magnitude none "
                "where density exceeds a tensor's changed share"
            )
        for name, model in self.models.items():
            uniform, magnitude = (model.relative_noise(sampling) for sampling in Sampling)
            if change is not None and change.sampling is Sampling.MAGNITUDE:
                continue
            loud = math.isfinite(uniform) and uniform > model.total.relative_norm * 1.4
            if loud and magnitude < 0.9 * uniform:
                less = 1 - magnitude / uniform
                sentences.append(
                    f"at the density of {name}, DARE adds noise that is larger than its deltas; "
                    f"sampling: magnitude removes {less:.0%} of it"
                )
        return sentences

    def verdicts(self) -> dict[str, Verdict]:
        """Judge every model, also by how it compares with the others."""
        return {
            name: judge(
                model.total,
                [other.total for other in self.models.values() if other is not model],
                model.changed_share,
            )
            for name, model in self.models.items()
        }


def inspect_config(
    path: str,
    options: MergeOptions | None = None,
    *,
    name: str | None = None,
    full: bool = False,
) -> Report:
    """Measure the deltas of every fine-tuned model of a config, one tensor at a time.

    Args:
        path: A config as ``mergekit-yaml`` or ``mergekit-pytorch`` takes it, or a file with
            several as ``mergekit-multi`` takes it.
        options: mergekit's own; those used say how models are loaded, ``device`` and
            ``quiet``.
        name: Which config of a file with several.
        full: Whether every tensor is read completely, not only an excerpt of it.

    Raises:
        UnusableFileError: the file cannot be read, or a model's files are damaged.
        ValueError: the config has no base model or no fine-tuned model.
        Exception: whatever mergekit raises for a config that it refuses.

    """
    return inspect(Examination(choose(path, name), options), full=full)


def inspect(examination: Examination, *, full: bool = False) -> Report:
    """Measure the deltas of an examined config, as :func:`inspect_config` does."""
    options, path = examination.options, examination.document.path
    _check_device(options.device)
    planning.take_seed(options)
    mergekit_dare.register()
    with ExitStack() as stack:
        options = stack.enter_context(planning.cached_adapters(options))
        saves = examination.plan.saves_to_run(options)
        planned = (save.tensor_task for save in saves)
        merges = [task for task in planned if isinstance(task, ExecuteMergeMethodTask)]
        if examination.plan.base is None:
            raise ValueError(f"{path} needs base_model, as deltas are differences from it")
        names = [str(model) for model in _in_order(merges)]
        if not names:
            raise ValueError(f"{path} has no fine-tuned model besides the base model")
        pairs = {pair: PairStatistics() for pair in itertools.combinations(names, 2)}
        report = Report({name: ModelReport() for name in names}, pairs)
        reader = ExcerptReader()
        kept: dict[Any, Any] = {}
        if not full:
            # In short operations, several threads would wait longer than they work.
            stack.enter_context(threads.single())
        for task in tqdm(merges, desc="Measuring deltas", disable=options.quiet):
            gather = task.gather_tensors
            found = None
            if not full and isinstance(gather, GatherTensors):
                found = reader.read(gather)
            if found is None:
                loaded = tasks.loaded(task, kept)
                loaded = {model: t for model, t in loaded.items() if t is not None}
                reader.count_whole(loaded)
                of = (lambda t: Excerpt(t, tuple(t.shape))) if full else Excerpt.of
                found = {model: of(tensor) for model, tensor in loaded.items()}
            _add_tensor(report, task, found, options.device or "cpu")
        report.share_read = 1.0 if full else reader.bytes.share
    return report


def _check_device(device: str | None) -> None:
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises a different type for each missing device
        raise ValueError(f"--device {device} cannot be used here: {error}") from error


def _in_order(merges: list[ExecuteMergeMethodTask]) -> Iterator[ModelReference]:
    seen: set[ModelReference] = set()
    for task in merges:
        for model in task.model_order:
            if model != task.base_model and model not in seen:
                seen.add(model)
                yield model


def _add_tensor(
    report: Report, task: ExecuteMergeMethodTask, found: Mapping[Any, Excerpt], device: str
) -> None:
    name = task.output_weight.name
    tensors = {model: excerpt.values.to(device) for model, excerpt in found.items()}
    base = tensors.pop(task.base_model, None)
    if base is None or not base.is_floating_point():
        report.left_out[name] = ["not in the base model" if base is None else "not floating-point"]
        return
    base_shape = found[task.base_model].shape
    fine_tuned, reasons = {}, []
    for model in task.model_order:
        if model == task.base_model:
            continue
        if model not in tensors:
            reasons.append(f"not in {model}")
        elif found[model].shape != base_shape:
            shapes = f"{found[model].shape} in {model} but {base_shape} in the base model"
            reasons.append(f"shapes differ: {shapes}")
        else:
            fine_tuned[str(model)] = tensors[model]
    if reasons:
        report.left_out[name] = reasons
    elements = math.prod(base_shape)
    factor = elements / max(1, base.numel())
    report.is_partial |= factor > 1
    measured = _measure(report, base, fine_tuned, factor)
    for model in task.input_parameters:
        if str(model) not in measured:
            continue
        statistics, of_model = measured[str(model)], report.models[str(model)]
        density = float(dict(task.input_parameters[model].items()).get("density", 1.0))
        of_model.total.add(statistics, factor)
        largest = max(-statistics.smallest, statistics.largest) + 0.0  # not -0.0
        of_model.tensors[name] = (largest, statistics.relative_norm)
        of_model.densities.add(density)
        if statistics.zeros == statistics.count:
            of_model.untouched += round(statistics.count * factor)
        if density > 0:
            uniform = noise_factor(density) ** 2 * statistics.square_sum
            of_model.noise_square_sums[Sampling.UNIFORM] += factor * uniform
            magnitude = magnitude_noise(statistics, density)
            of_model.noise_square_sums[Sampling.MAGNITUDE] += factor * magnitude
    if not reasons and not any(statistics.non_finite for statistics in measured.values()):
        if factor > 1:
            every = max(1, len(base) // CHANGED_BLOCKS)
            base = base[::every]
            tensors = {model: tensor[::every] for model, tensor in tensors.items()}
        _add_change(report, task, base, tensors, elements / max(1, base.numel()))


def _measure(
    report: Report, base: Tensor, fine_tuned: dict[str, Tensor], factor: float
) -> dict[str, DeltaStatistics]:
    """Measure each half of an excerpt, every other block; return figures of all of it by model."""
    halves = [(base, fine_tuned)]
    if factor > 1:
        halves = [(base[k::2], {name: t[k::2] for name, t in fine_tuned.items()}) for k in (0, 1)]
    found = [measure(*half) for half in halves]
    for half in found:
        for pair, statistics in half.pairs.items():
            report.pairs[pair].add(statistics, factor)
    if factor == 1:
        return found[0].models
    measured = {name: DeltaStatistics() for name in fine_tuned}
    for name, whole in measured.items():
        for total, half in zip(report.models[name].halves, found, strict=True):
            total.add(half.models[name], factor)
            whole.add(half.models[name])
    return measured


def _add_change(
    report: Report,
    task: ExecuteMergeMethodTask,
    base: Tensor,
    tensors: dict[Any, Tensor],
    factor: float,
) -> None:
    """Merge a tensor with and without dropping and rounding, and add how the results compare.

    ``factor``: its number of elements over that of its excerpt, which is what is merged.
    """
    recipe = tasks.recipe_of(task)
    if recipe is None or base.dtype not in NARROW:
        return
    entries = tasks.fine_tuned(task, tensors)
    wide = base.float()
    whole = merging.merge(wide, [replace(model, density=1.0) for model in entries], recipe)
    drawn = merging.merge(wide, entries, recipe)
    expected = (whole - wide).double().view(-1)
    if report.change is None:
        report.change = MergedChange(recipe.sampling, recipe.rounding)
        report.change.dtype = dtype_name(base.dtype)
    change = report.change
    change.square_sum += factor * float(expected.dot(expected))
    left = (drawn.to(base.dtype).float() - wide).double().view(-1)
    change.kept += factor * float(expected.dot(left))
    noise = _rounding_noise(drawn.view(-1), base.dtype, recipe.seed).double()
    change.stochastic_square_sum += factor * float(noise.dot(noise))


def _rounding_noise(merged: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """Return what stochastic rounding to ``dtype`` adds; any draw represents a merge's own."""
    lanes = unsigned_lanes(key, slice(0, merged.numel()), merged.device)
    return round_stochastically(merged, lanes, dtype).float() - merged

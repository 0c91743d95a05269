"""Is this model what its config says? Plan as mergekit does, merge again, and compare the bytes.

One tensor at a time is merged, and nothing is written, so memory is that of one tensor's inputs and
output, whatever the model's size.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

import mergekit_dare
from mergekit_dare.diagnostics import model_files, planning
from mergekit_dare.diagnostics.document import Document, choose
from mergekit_dare.diagnostics.files_check import is_local
from mergekit_dare.diagnostics.findings import UnusableFileError
from mergekit_dare.diagnostics.host import configuration
from mergekit_dare.kernel.rounding import Rounding
from mergekit_dare.kernel.sampling import Sampling
from mergekit_dare.plugin.methods import DareMethod

CONFIG_FILE, CARD_FILE = "mergekit_config.yml", "README.md"
# Methods of mergekit's own that draw from a generator whose state no config has.
DRAWING = ("dare_linear", "dare_ties", "della", "della_linear")
# Versions of this package whose merges come out the same as this one's, to the byte.
SAME_BYTES = ("0.1.0",)
# How far two draws' shares of changed elements are apart: by chance, and by what rounding hides.
SIGMAS, MOST_ROUNDED_AWAY = 6, 0.02
WORST = 10  # tensors that are named
FEW = 0.1  # of all tensors: if no more differ, the rest is as merged


class CannotTellError(Exception):
    """It cannot be told whether the model is what its config says, and why."""


@dataclass(frozen=True)
class Difference:
    """How a stored tensor differs from the merge.

    Attributes:
        name: The tensor's.
        what: In words.
        elements: How many elements differ; all of them where shapes or dtypes do.
        largest: The greatest difference.

    """

    name: str
    what: str
    elements: int
    largest: float


@dataclass
class Verification:
    """What was compared, and what came out.

    Attributes:
        method: The merge method's name for people.
        planned: Tensors of the merge.
        compared: Tensors that were compared; fewer than planned in a quick audit.
        size: Their bytes.
        missing: Tensors of the merge that are not stored.
        additional: Stored tensors that are not of the merge.
        differences: Of those that were compared.
        causes: What the pattern speaks for.

    """

    method: str
    planned: int = 0
    compared: int = 0
    size: int = 0
    missing: list[str] = field(default_factory=list)
    additional: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)

    @property
    def is_match(self) -> bool:
        """Whether all that was compared is the same to the byte."""
        return not (self.missing or self.additional or self.differences)

    def as_text(self) -> str:
        """Return the result for people; one line if all is the same."""
        part = f"{self.compared:,} of " if self.compared < self.planned else ""
        scope = f"{part}{self.planned:,} tensors ({self.size:,} bytes)"
        version = f"mergekit-dare {mergekit_dare.__version__}"
        made = self.method if version in self.method else f"{self.method} ({version})"
        if self.is_match:
            return f"The same to the byte: {scope}, merged again by {made}."
        lines = [f"Not what its config says: {scope} merged again by {made}."]
        for what, names in (("missing", self.missing), ("additional", self.additional)):
            lines += [f"  {what}: {name}" for name in names[:WORST]]
            if len(names) > WORST:
                lines.append(f"  {what}: {len(names) - WORST} more")
        count = len(self.differences)
        lines.append(f"  {count:,} tensor{'s differ' if count != 1 else ' differs'}")
        worst = sorted(self.differences, key=lambda d: (-d.elements, -d.largest, d.name))
        lines += [f"  {difference.name}: {difference.what}" for difference in worst[:WORST]]
        lines += [f"It looks like this: {cause}" for cause in self.causes]
        return "\n".join(lines)


def verify(
    out: Path,
    options: MergeOptions,
    *,
    config: Path | None = None,
    name: str | None = None,
    sample: float = 1.0,
    tensors: str = "*",
) -> Verification:
    """Compare a merged model with what its config makes.

    Args:
        out: The model's folder, or its file from ``mergekit-pytorch``.
        options: mergekit's own: those that say how models are loaded, and ``random_seed``.
        config: A config in place of the one that mergekit writes beside each merge.
        name: Which config of a file with several.
        sample: The fraction of the tensors to compare, the same ones each time.
        tensors: Only those whose names match, as in a shell.

    Raises:
        CannotTellError: a model or the config is not there, or the method cannot be repeated.

    """
    mergekit_dare.register()
    stored = _stored(out, options)
    path = config or (out / CONFIG_FILE if out.is_dir() else out.parent / CONFIG_FILE)
    document = _choose(path, name)
    _check_method(document, out)
    planning.take_seed(options)
    saves = _plan(document, options)
    assert document.spec is not None  # as checked
    found = Verification(document.spec.pretty_name or document.spec.name, planned=len(saves))
    planned = {save.tensor_name for save in saves}
    names = set(stored.index.tensor_paths)
    kept: dict[Any, Any] = {}
    chosen = [save for save in saves if _is_chosen(save.tensor_name, sample, tensors)]
    first_differing: tuple[SaveTensor, Tensor] | None = None
    for save in tqdm(chosen, desc="Merging again", disable=options.quiet):
        expected = _merged(save, kept, options)
        if expected is None:  # optional, and nowhere
            found.planned -= 1
            planned.discard(save.tensor_name)
            continue
        if save.tensor_name not in names:
            found.missing.append(save.tensor_name)
            continue
        actual = _read(stored, save.tensor_name, out)
        found.compared += 1
        found.size += actual.numel() * actual.element_size()
        difference = _difference(save.tensor_name, actual, expected)
        if difference is not None:
            found.differences.append(difference)
            first_differing = first_differing or (save, actual)
    found.additional = sorted(
        name for name in names - planned if fnmatch.fnmatchcase(name, tensors)
    )
    if first_differing is not None:
        found.causes = list(_causes(*first_differing, found, options))
    return found


def _stored(out: Path, options: MergeOptions) -> LazyTensorLoader:
    if not out.exists():
        raise CannotTellError(f"there is no model {out}")
    for problem in model_files.examine(out, needs_config=False).problems:
        raise CannotTellError(problem)
    read_index = ShardedTensorIndex.from_disk if out.is_dir() else ShardedTensorIndex.from_file
    return LazyTensorLoader(read_index(str(out)), lazy_unpickle=options.lazy_unpickle)


def _read(stored: LazyTensorLoader, name: str, out: Path) -> Tensor:
    try:
        tensor = stored.get_tensor(name)
    except Exception as error:
        raise CannotTellError(f"tensor {name} of {out} cannot be read: {error}") from error
    assert tensor is not None
    return tensor


def _choose(path: Path, name: str | None) -> Document:
    if not path.is_file():
        raise CannotTellError(f"there is no config {path}; name it with --config")
    return choose(str(path), name)


def _check_method(document: Document, out: Path) -> None:
    """Refuse methods that cannot be repeated, and models of another implementation of ours."""
    if document.spec is None:
        raise CannotTellError(f"{document.path} is no config of a merge that mergekit knows")
    name = document.spec.name
    card = (out if out.is_dir() else out.parent) / CARD_FILE
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    version = re.search(r"\(mergekit-dare ([0-9][^)\s]*)\)", text)
    ours = isinstance(merge_methods.get(name), DareMethod)
    if name in DRAWING and (not ours or (text and version is None)):
        raise CannotTellError(
            f"it was merged by mergekit's own {name}, which draws anew in each run: no merge of it "
            "can be verified"
        )
    if ours and version is not None and version[1] not in SAME_BYTES:
        raise CannotTellError(
            f"it was merged by mergekit-dare {version[1]}, which may draw other masks than this "
            f"version, {mergekit_dare.__version__}: verify it with that one"
        )


def _plan(document: Document, options: MergeOptions) -> list[SaveTensor]:
    for name in sorted(m.model.path for m in configuration(document).referenced_models()):
        if is_local(name) and not Path(name).exists():
            advice = "" if Path(name).is_absolute() else "; verify from the folder of the merge"
            raise CannotTellError(f"there is no model {name}{advice}")
    try:
        return planning.plan_document(document, options)[1]
    except UnusableFileError as error:
        raise CannotTellError(str(error)) from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CannotTellError(f"mergekit cannot plan this merge: {reason}") from error


def _is_chosen(name: str, sample: float, tensors: str) -> bool:
    if not fnmatch.fnmatchcase(name, tensors):
        return False
    drawn = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    return drawn < sample * 2**32


def _merged(
    save: SaveTensor, kept: dict[Any, Any], options: MergeOptions, **changes: Any
) -> Tensor | None:
    """Merge one tensor as mergekit does; ``changes`` replace shared parameters."""
    task = save.tensor_task
    assert isinstance(task, ExecuteMergeMethodTask)
    inputs = planning.loaded(task, kept)
    if options.device not in (None, "cpu"):
        inputs = {k: None if t is None else t.to(options.device) for k, t in inputs.items()}
    if changes:
        parameters = type(task.parameters)(dict(task.parameters.items()) | changes)
        task = task.model_copy(update={"parameters": parameters})
    merged: Tensor | None = task.execute(tensors=inputs)
    if merged is None:
        return None
    dtype = dtype_from_name(save.dtype)
    return (merged if dtype is None else merged.to(dtype)).cpu()


def _difference(name: str, actual: Tensor, expected: Tensor) -> Difference | None:
    for what in ("shape", "dtype"):
        stored, merged = getattr(actual, what), getattr(expected, what)
        if stored != merged:
            found = f"{what} {_plain_name(stored)}, merged again {_plain_name(merged)}"
            return Difference(name, found, actual.numel(), float("inf"))
    different = _bits(actual) != _bits(expected)
    count = int(different.sum())
    if count == 0:
        return None
    apart = (actual.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
    largest = float(apart.max())
    share = count / actual.numel()
    what = (
        f"{count:,} of {actual.numel():,} elements ({share:.1%}) differ, by {largest:.3g} at most"
    )
    return Difference(name, what, count, largest)


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(-1).view(integers[tensor.element_size()])


def _plain_name(value: object) -> str:
    return str(value).removeprefix("torch.").removeprefix("Size(").rstrip(")")


def _causes(
    save: SaveTensor, actual: Tensor, found: Verification, options: MergeOptions
) -> Iterator[str]:
    """Try on one tensor what the pattern may speak for."""
    task = save.tensor_task
    assert isinstance(task, ExecuteMergeMethodTask)
    kept: dict[Any, Any] = {}
    if found.compared > 3 and len(found.differences) <= FEW * found.compared:
        yield (
            f"a merge that was edited afterwards: {found.compared - len(found.differences)} of "
            f"{found.compared} tensors are as merged"
        )
        return
    if not bool(actual.count_nonzero()):
        yield "all zeros, as of a file that was never filled"
        return
    for model, tensor in planning.loaded(task, kept).items():
        if tensor is not None and _is_same(tensor.to(actual.dtype), actual):
            role = "the base model" if model == task.base_model else f"the input {model}"
            yield f"{role} itself, not a merge"
            return
    for what, attempt in _attempts(save, options):
        try:
            merged = attempt()
        except Exception:  # an attempt that makes no sense for this merge
            continue
        if merged is not None and _is_same(merged.to(actual.dtype), actual):
            yield what
            return
    if _is_drawn_otherwise(save, actual, options):
        yield (
            "a merge that was drawn otherwise: as many elements are changed, but others; with "
            "another seed, or by mergekit's own method of that name, which draws anew in each run"
        )


def _is_drawn_otherwise(save: SaveTensor, actual: Tensor, options: MergeOptions) -> bool:
    """Tell whether as many of the base's elements are changed as the config changes, but others."""
    task = save.tensor_task
    assert isinstance(task, ExecuteMergeMethodTask)
    expected, base = _merged(save, {}, options), planning.loaded(task, {}).get(task.base_model)
    if task.method_name not in DRAWING or expected is None or base is None:
        return False
    if not actual.shape == expected.shape == base.shape:
        return False
    ours, theirs = (t.to(base.dtype) != base for t in (expected, actual))
    shares = [float(changed.double().mean()) for changed in (ours, theirs)]
    error = SIGMAS * math.sqrt(shares[0] * (1 - shares[0]) / base.numel()) + MOST_ROUNDED_AWAY
    return (
        0 < shares[0] < 1 and abs(shares[0] - shares[1]) < error and not torch.equal(ours, theirs)
    )


def _attempts(
    save: SaveTensor, options: MergeOptions
) -> Iterator[tuple[str, Callable[[], Tensor | None]]]:
    task = save.tensor_task
    assert isinstance(task, ExecuteMergeMethodTask)
    shared = dict(task.parameters.items())
    changes: list[tuple[str, Any]] = []
    if "seed" in shared:
        changes += [("seed", seed) for seed in (0, options.random_seed, 42, 1) if seed is not None]
    changes += [("sampling", sampling.value) for sampling in Sampling]
    changes += [("rounding", rounding.value) for rounding in Rounding]
    for name, value in dict.fromkeys(changes):
        if name in shared and shared[name] != value:
            what = f"the merge with {name}: {value}, where the config has {shared[name]}"
            yield what, partial(_merged, save, {}, options, **{name: value})
    for dtype in ("float32", "bfloat16", "float16"):
        what = f"the merge computed from {dtype} inputs and rounded afterwards (dtype, out_dtype)"
        yield what, partial(_merged_from, save, dtype, options)


def _merged_from(save: SaveTensor, dtype: str, options: MergeOptions) -> Tensor | None:
    return _merged(_with_dtype(save, dtype), {}, options)


def _with_dtype(save: SaveTensor, dtype: str) -> SaveTensor:
    """Return the same save with inputs that are converted to another dtype when they are read."""
    task = save.tensor_task
    assert isinstance(task, ExecuteMergeMethodTask)
    gather = planning.gathered(task).model_copy(update={"dtype": dtype})
    if not planning.aligns_tokens(task):
        task = task.model_copy(update={"gather_tensors": gather})
    else:
        aligned = task.gather_tensors.model_copy(update={"gather_tensors": gather})
        task = task.model_copy(update={"gather_tensors": aligned})
    return save.model_copy(update={"tensor_task": task})


def _is_same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(torch.equal(_bits(first), _bits(second)))


def input_files(config: Path, options: MergeOptions, name: str | None = None) -> str:
    """Return the sha256 of each file that a merge reads, as YAML that can stand beside the config.

    Raises:
        CannotTellError: a model is not there.

    """
    document = _choose(config, name)
    models: dict[str, dict[str, Any]] = {}
    for model in configuration(document).referenced_models():
        models[str(model)] = _files_of(model, options)
    header = f"# What a merge was made of, by mergekit-dare {mergekit_dare.__version__}.\n"
    return header + str(yaml.safe_dump({"inputs": models}, sort_keys=True))


def _files_of(model: ModelReference, options: MergeOptions) -> dict[str, Any]:
    found: dict[str, Any] = {}
    parts = [("files", model.model.path)]
    if model.lora is not None:
        parts.append(("adapter", model.lora.path))
    for key, path in parts:
        folder = Path(path)
        if not folder.exists():
            reference = ModelReference.model_validate({"model": {"path": path}})
            folder = Path(reference.local_path(cache_dir=options.transformers_cache))
            found["revision"] = folder.name  # of the hub's snapshot
        files = [folder] if folder.is_file() else sorted(folder.iterdir())
        weights = [f for f in files if f.suffix in (".safetensors", ".bin") and f.is_file()]
        if not weights:
            raise CannotTellError(f"model {model} has no weights in {folder}")
        found[key] = {file.name: _sha256(file) for file in weights}
    return found


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def changed_inputs(record: Path, config: Path, options: MergeOptions) -> list[str]:
    """Return what is not as it was recorded by :func:`input_files`.

    Raises:
        CannotTellError: the record cannot be read.

    """
    try:
        before = yaml.safe_load(record.read_text(encoding="utf-8"))["inputs"]
        now = yaml.safe_load(input_files(config, options))["inputs"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise CannotTellError(f"{record} is no record of inputs: {error}") from error
    found = []
    for model in sorted(before.keys() | now.keys()):
        if model not in before or model not in now:
            found.append(f"{model} is {'new' if model not in before else 'no longer used'}")
            continue
        for key in ("files", "adapter"):
            old, new = before[model].get(key, {}), now[model].get(key, {})
            for file in sorted(old.keys() | new.keys()):
                if old.get(file) != new.get(file):
                    found.append(f"{model}: {file} is not the file that was merged")
    return found

"""Is this model what its config says? Plan as mergekit does, merge again, and compare the bytes.

One tensor at a time is merged and nothing is written, so memory is that of one tensor's inputs and
output, whatever the model's size.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit import merge_methods
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import SaveTensor
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

import mergekit_dare
from mergekit_dare.diagnostics.config.document import Document
from mergekit_dare.diagnostics.config.reading import choose
from mergekit_dare.diagnostics.examination import Examination
from mergekit_dare.diagnostics.findings import UnusableFileError, reason
from mergekit_dare.diagnostics.models import files as model_files
from mergekit_dare.diagnostics.models.files import is_local
from mergekit_dare.diagnostics.plan import completeness, planning
from mergekit_dare.diagnostics.repetition import bits, merge_again, what_it_is
from mergekit_dare.plugin.methods import DareMethod

CONFIG_FILE, CARD_FILE = "mergekit_config.yml", "README.md"
# mergekit's own methods that draw from a generator whose state is in no config.
DRAWING = ("dare_linear", "dare_ties", "della", "della_linear")
# Versions of this package whose merges are identical to this one's, to the byte.
SAME_BYTES = ("0.1.0",)
WORST = 10  # tensors that the text names


class CannotVerifyError(Exception):
    """Whether the model is what its config says cannot be verified; the message says why."""


@dataclass(frozen=True)
class Difference:
    """How a stored tensor differs from the merge.

    Attributes:
        name: The tensor's.
        what: The difference in words.
        elements: How many elements differ; all of them where shapes or dtypes do.
        largest: The greatest difference.

    """

    name: str
    what: str
    elements: int
    largest: float


@dataclass
class Verification:
    """What was compared, and the result.

    Attributes:
        method: The merge method's display name.
        planned: Number of tensors in the merge.
        compared: Number of tensors that were compared; fewer than planned in a quick audit.
        size: Their size in bytes.
        missing: Tensors of the merge that are not stored.
        additional: Stored tensors that are not in the merge.
        differences: Those of the tensors that were compared.
        what_it_is: What the first of them is instead of the merge, if that can be told.
        lost: Which weights its class needs and mergekit leaves out of such a merge, if any.

    """

    method: str
    planned: int = 0
    compared: int = 0
    size: int = 0
    missing: list[str] = field(default_factory=list)
    additional: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    what_it_is: str | None = None
    lost: str | None = None

    @property
    def is_match(self) -> bool:
        """Whether everything that was compared is identical to the byte."""
        return not (self.missing or self.additional or self.differences)

    def as_text(self) -> str:
        """Return the result for people; one line if everything is identical."""
        part = f"{self.compared:,} of " if self.compared < self.planned else ""
        scope = f"{part}{self.planned:,} tensors ({self.size:,} bytes)"
        version = f"mergekit-dare {mergekit_dare.__version__}"
        made = self.method if version in self.method else f"{self.method} ({version})"
        lost = [] if self.lost is None else [f"But {self.lost}."]
        if self.is_match:
            return "\n".join([f"Identical to the byte: {scope}, merged again by {made}.", *lost])
        lines = [f"Not what its config says: {scope}, merged again by {made}."]
        for what, names in (("missing", self.missing), ("additional", self.additional)):
            lines += [f"  {what}: {name}" for name in names[:WORST]]
            if len(names) > WORST:
                lines.append(f"  {what}: {len(names) - WORST} more")
        count = len(self.differences)
        lines.append(f"  {count:,} tensor{'s differ' if count != 1 else ' differs'}")
        worst = sorted(self.differences, key=lambda d: (-d.elements, -d.largest, d.name))
        lines += [f"  {difference.name}: {difference.what}" for difference in worst[:WORST]]
        if self.what_it_is is not None:
            lines.append(f"{self.differences[0].name} is {self.what_it_is}")
        return "\n".join(lines + lost)


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
        config: A config to use instead of the one that mergekit writes beside each merge.
        name: Which config of a file with several.
        sample: The fraction of the tensors to compare, the same ones each time.
        tensors: Pattern of the names of tensors to compare, as in a shell.

    Raises:
        CannotVerifyError: a model or the config does not exist, or the method cannot be repeated.

    """
    mergekit_dare.register()
    stored = _open_model(out, options)
    path = config or (out / CONFIG_FILE if out.is_dir() else out.parent / CONFIG_FILE)
    document = choose_config(path, name)
    _check_method(document, out)
    planning.take_seed(options)
    examination = Examination(document, options)
    saves = _plan(examination)
    assert document.spec is not None  # as checked
    found = Verification(document.spec.pretty_name or document.spec.name, planned=len(saves))
    planned = {save.tensor_name for save in saves}
    names = set(stored.index.tensor_paths)
    kept: dict[Any, Any] = {}
    chosen = [save for save in saves if _is_chosen(save.tensor_name, sample, tensors)]
    for save in tqdm(chosen, desc="Merging again", disable=options.quiet):
        expected = merge_again(save, kept, options)
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
            if not found.differences:
                found.what_it_is = what_it_is(save, actual, options)
            found.differences.append(difference)
    found.additional = sorted(
        name for name in names - planned if fnmatch.fnmatchcase(name, tensors)
    )
    found.lost = completeness.what_is_lost(examination.plan)
    return found


def _open_model(out: Path, options: MergeOptions) -> LazyTensorLoader:
    if not out.exists():
        raise CannotVerifyError(f"there is no model {out}")
    found = model_files.examine(out, needs_config=False)
    for problem in [*found.why_unusable, found.ambiguous]:
        if problem is not None:
            raise CannotVerifyError(problem)
    read_index = ShardedTensorIndex.from_disk if out.is_dir() else ShardedTensorIndex.from_file
    return LazyTensorLoader(read_index(str(out)), lazy_unpickle=options.lazy_unpickle)


def _read(stored: LazyTensorLoader, name: str, out: Path) -> Tensor:
    try:
        tensor = stored.get_tensor(name)
    except Exception as error:
        raise CannotVerifyError(f"tensor {name} of {out} cannot be read: {error}") from error
    assert tensor is not None
    return tensor


def choose_config(path: Path, name: str | None) -> Document:
    """Return the config of a merge, of that name if its file has several.

    Raises:
        CannotVerifyError: there is no such file.
        UnusableFileError: see :func:`mergekit_dare.diagnostics.config.reading.choose`.

    """
    if not path.is_file():
        raise CannotVerifyError(f"there is no config {path}; give its path with --config")
    return choose(str(path), name)


def _check_method(document: Document, out: Path) -> None:
    """Refuse methods that cannot be repeated, and models of another implementation of ours."""
    if document.spec is None:
        raise CannotVerifyError(f"{document.path} names no merge method that mergekit has")
    name = document.spec.name
    card = (out if out.is_dir() else out.parent) / CARD_FILE
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    version = re.search(r"\(mergekit-dare ([0-9][^)\s]*)\)", text)
    ours = isinstance(merge_methods.get(name), DareMethod)
    if name in DRAWING and (not ours or (text and version is None)):
        raise CannotVerifyError(
            f"it was merged by mergekit's own {name}, which draws anew in each run, so its merges "
            "cannot be verified"
        )
    if ours and version is not None and version[1] not in SAME_BYTES:
        raise CannotVerifyError(
            f"it was merged by mergekit-dare {version[1]}, which may draw different masks than "
            f"this version, {mergekit_dare.__version__}: verify it with version {version[1]}"
        )


def _plan(examination: Examination) -> list[SaveTensor]:
    for name in sorted(m.model.path for m in examination.config.referenced_models()):
        if is_local(name) and not Path(name).exists():
            advice = (
                ""
                if Path(name).is_absolute()
                else "; run verify in the folder where the merge was run"
            )
            raise CannotVerifyError(f"there is no model {name}{advice}")
    try:
        return examination.plan.saves_to_run(examination.options)
    except UnusableFileError as error:
        raise CannotVerifyError(str(error)) from error
    except Exception as error:
        raise CannotVerifyError(f"mergekit cannot plan this merge: {reason(error)}") from error


def _is_chosen(name: str, sample: float, tensors: str) -> bool:
    if not fnmatch.fnmatchcase(name, tensors):
        return False
    drawn = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    return drawn < sample * 2**32


def _difference(name: str, actual: Tensor, expected: Tensor) -> Difference | None:
    for what in ("shape", "dtype"):
        stored, merged = getattr(actual, what), getattr(expected, what)
        if stored != merged:
            found = f"{what} {_plain_name(stored)}, but {_plain_name(merged)} when merged again"
            return Difference(name, found, actual.numel(), float("inf"))
    different = bits(actual) != bits(expected)
    count = int(different.sum())
    if count == 0:
        return None
    apart = (actual.double() - expected.double()).abs().nan_to_num(nan=float("inf"))
    largest = float(apart.max())
    share = count / actual.numel()
    what = (
        f"{count:,} of {actual.numel():,} elements ({share:.1%}) differ, by at most {largest:.3g}"
    )
    return Difference(name, what, count, largest)


def _plain_name(value: object) -> str:
    return str(value).removeprefix("torch.").removeprefix("Size(").rstrip(")")

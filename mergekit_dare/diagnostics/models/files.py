"""Whether the files of a local model are intact, judged by their headers: no weights are read.

mergekit ends with a traceback when it meets a damaged file, but not every traceback says which.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mergekit_dare.diagnostics.findings import cut
from mergekit_dare.plugin import headers, quantization
from mergekit_dare.plugin.headers import StoredTensor

_LARGEST_JSON = 256 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_WEIGHT_STEMS = ("model.safetensors", "pytorch_model.bin", "model-", "pytorch_model-")


@dataclass
class ModelFiles:
    """What the files of a model say about themselves.

    Attributes:
        problems: One sentence for each problem, with the file's name.
        ambiguous: The sentence that says so, if mergekit reads other weights than transformers.
        quantized: The sentence that says so, if it is quantized.
        tensors: Those that are stored in safetensors, by name.
        config: The content of config.json, if there is one.
        folder: Where its JSON files are, if it is not a single file.
        same_as: JSON files that are elsewhere, because another model has the same ones, by name.
        is_pickled: Whether its weights are pickled, so that nothing is known of its tensors.
        download: Bytes that a merge would have to fetch first.

    """

    problems: list[str] = field(default_factory=list)
    ambiguous: str | None = None
    quantized: str | None = None
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    same_as: dict[str, Path] = field(default_factory=dict)
    is_pickled: bool = False
    download: int = 0

    @property
    def why_unusable(self) -> list[str]:
        """One sentence for each reason that it cannot be merged."""
        return self.problems + ([] if self.quantized is None else [self.quantized])

    def json_file(self, name: str) -> Path | None:
        """Return where one of its JSON files is, if it has it."""
        if name in self.same_as:
            return self.same_as[name]
        file = None if self.folder is None else self.folder / name
        return file if file is not None and file.is_file() else None


def examine(path: Path, *, needs_config: bool = True) -> ModelFiles:
    """Examine a model's folder, or a single file as ``mergekit-pytorch`` takes it.

    ``needs_config``: whether a model's folder must have a config.json.
    """
    found = ModelFiles()
    try:
        if path.is_dir():
            _examine_folder(path, found, needs_config)
        elif path.exists():
            _examine_weights(path, found)
        else:
            found.problems.append(f"there is no folder {cut(str(path))}")
    except (OSError, ValueError, RecursionError) as error:  # a name too long, a NUL in it
        found.problems.append(f"{cut(str(path))} cannot be read: {cut(str(error))}")
    note_quantization(str(path), found)
    return found


def note_quantization(model: str, found: ModelFiles) -> None:
    """Note whether the model is quantized."""
    dtypes = {name: tensor.dtype for name, tensor in found.tensors.items()}
    if not found.problems and (kind := quantization.kind(found.config, dtypes)) is not None:
        found.quantized = quantization.problem(cut(model), kind)


def why_not_a_model(names: Iterable[str], model: str) -> str | None:
    """Say what a folder is instead, if its files are not a model's.

    Args:
        names: Those of its files.
        model: How the config names it.

    """
    found = set(names)
    if "adapter_config.json" in found and not any(n.startswith(_WEIGHT_STEMS) for n in found):
        return (
            f"{cut(model)} is an adapter, not a model: write BASE+{cut(model)}, where BASE is the "
            "model that it was trained on"
        )
    if any(n.endswith(".gguf") for n in found) and not any(n.endswith(_WEIGHTS) for n in found):
        return (
            f"{cut(model)} has its weights only as GGUF, which mergekit cannot read: use the "
            "safetensors model that they were made from"
        )
    return None


def _examine_folder(folder: Path, found: ModelFiles, needs_config: bool) -> None:
    found.folder = folder
    if (what := why_not_a_model((file.name for file in folder.iterdir()), str(folder))) is not None:
        found.problems.append(what)
        return
    if needs_config or (folder / "config.json").exists():
        read_config(folder / "config.json", found)
    for file in _weight_files(folder, found):
        _examine_weights(file, found)


def read_config(file: Path, found: ModelFiles) -> None:
    """Read a model's settings, or note why they cannot be read."""
    try:
        config = read_json(file)
    except ValueError as error:
        found.problems.append(str(error))
        return
    if isinstance(config, dict):
        found.config = config
    else:
        found.problems.append(f"{file} contains no settings: it is not a JSON object")


def read_json(file: Path) -> object:
    """Return the content of a JSON file.

    Raises:
        ValueError: it is missing, not a file, too large, or not JSON; the message names it.

    """
    try:
        if file.exists() and not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("it is not a file")
        if file.exists() and file.stat().st_size > _LARGEST_JSON:
            raise ValueError("it is too large")
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{cut(str(file))} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        message = f"{cut(str(file))} cannot be read as JSON: {cut(str(error))}"
        raise ValueError(message) from error
    return content


def _weight_files(folder: Path, found: ModelFiles) -> list[Path]:
    """Return the files that hold the weights, in the order in which mergekit looks for them.

    Safetensors come before pickled files, and an index before the file that may be beside it.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if not index.exists() and not whole.exists():
            continue
        found.is_pickled = suffix == "bin"
        if not index.exists():
            return [whole]
        try:
            content = read_json(index)
        except ValueError as error:
            found.problems.append(str(error))
            return []
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            found.problems.append(f"{index} has no weight_map")
            return []
        names = dict.fromkeys(map(str, weight_map.values()))
        if suffix == "safetensors" and whole.is_file() and whole.name not in names:
            found.ambiguous = (
                f"{cut(str(folder))} has two sets of weights: mergekit reads those that "
                f"{index.name} lists, transformers reads {whole.name}; remove the one that is "
                "out of date"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            file = cut(str(folder / missing[0]))
            found.problems.append(f"{file}{more} missing, but listed in {index}")
        return [folder / name for name in names if name not in missing]
    found.problems.append(f"{folder} has no weights: it has neither model.safetensors nor an index")
    return []


def _examine_weights(file: Path, found: ModelFiles) -> None:
    if not stat.S_ISREG(file.stat().st_mode):
        found.problems.append(f"{cut(str(file))} is not a file")
    elif file.suffix == ".safetensors":
        _examine_safetensors(file, found)
    elif not zipfile.is_zipfile(file) and _start(file) != b"\x80":  # neither new nor old torch.save
        found.problems.append(f"{file} is truncated or damaged: torch cannot load it")


def _start(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(1)


def _examine_safetensors(file: Path, found: ModelFiles) -> None:
    try:
        tensors = headers.read(file)
    except headers.DamagedFileError as error:
        found.problems.append(f"{file} {cut(str(error))}")
        return
    if not tensors:
        found.problems.append(f"{file} contains no tensors")
    found.tensors.update(tensors)


def is_local(name: str) -> bool:
    """Tell whether a model's name is a path on this machine, and not the name of one on the hub."""
    if "\\" in name or PureWindowsPath(name).drive:  # as no name on the hub, whatever the system
        return True
    path = Path(name)
    try:
        if path.exists():
            return True
        beside_others = len(path.parts) == 2 and path.parent.is_dir()  # not the hub's owner/name
    except (OSError, ValueError):  # longer than a path may be
        return True
    return path.is_absolute() or name.startswith(".") or len(path.parts) > 2 or beside_others


def why_not_a_path(name: str) -> str | None:
    """Say what is wrong with how a config writes a model's path, if something is."""
    if name.startswith("~"):
        return "mergekit does not expand ~; write the full path"
    unprintable = next((character for character in name if character < " "), None)
    if unprintable is not None and not os.path.exists(name):
        return (
            f"the path {cut(repr(name))} contains the control character {unprintable!r}: write it "
            "in single quotes, as a backslash in double quotes is an escape"
        )
    return None


def looks_like_a_hub_name(name: str) -> bool:
    """Tell whether mergekit may mistake a folder's name for that of a model on the hub.

    After a merge, for the model card, it asks the hub even about names of local models, unless no
    model on the hub can have that name.
    """
    if name.startswith(("/", "~")) or name.count("/") > 1 or not is_local(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True

"""Whether the files of a local model are whole, told from their headers: no weight is read.

mergekit ends with a traceback when it meets a damaged file, but some of them do not say which.
"""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
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
    """What the files of a model say of themselves.

    Attributes:
        problems: One sentence for each, with the file's name.
        quantized: The sentence that says so, if its weights are codes.
        tensors: Those that are stored in safetensors, by name.
        config: The content of config.json, if there is one.
        folder: Where its JSON files lie, if it is not a single file.
        same_as: Names of JSON files that lie elsewhere, because another model's are the same.
        is_pickled: Whether its weights are pickled, so that nothing is known of its tensors.
        download: Bytes that a merge would fetch first.

    """

    problems: list[str] = field(default_factory=list)
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
    """Look at a model's folder, or at a single file as ``mergekit-pytorch`` takes it.

    ``needs_config``: whether a folder without config.json is none of a model.
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
    """Note whether the weights are codes."""
    dtypes = {name: tensor.dtype for name, tensor in found.tensors.items()}
    if not found.problems and (kind := quantization.kind(found.config, dtypes)) is not None:
        found.quantized = quantization.problem(cut(model), kind)


def no_model(names: Iterable[str], model: str) -> str | None:
    """Say what a folder is instead, if its files are not those of a model.

    Args:
        names: Of its files.
        model: How the config names it.

    """
    found = set(names)
    if "adapter_config.json" in found and not any(n.startswith(_WEIGHT_STEMS) for n in found):
        return (
            f"{cut(model)} is an adapter, no model: write BASE+{cut(model)}, with the model that "
            "it was trained on as BASE"
        )
    if any(n.endswith(".gguf") for n in found) and not any(n.endswith(_WEIGHTS) for n in found):
        return (
            f"{cut(model)} has weights as GGUF only, which mergekit does not read: take the model "
            "in safetensors that they were made from"
        )
    return None


def _examine_folder(folder: Path, found: ModelFiles, needs_config: bool) -> None:
    found.folder = folder
    if (what := no_model((file.name for file in folder.iterdir()), str(folder))) is not None:
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
        found.problems.append(f"{file} holds no settings: it is no mapping")


def read_json(file: Path) -> object:
    """Return the content of a JSON file.

    Raises:
        ValueError: it is missing, no file, too large, or no JSON; the message names it.

    """
    try:
        if file.exists() and not stat.S_ISREG(file.stat().st_mode):
            raise ValueError("it is no file")
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

    Safetensors come before pickled files, and an index before the file that it may stand beside.
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
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            file = cut(str(folder / missing[0]))
            found.problems.append(f"{file}{more} is missing, which {index} names")
        return [folder / name for name in names if name not in missing]
    found.problems.append(f"{folder} has no weights: neither model.safetensors nor an index")
    return []


def _examine_weights(file: Path, found: ModelFiles) -> None:
    if not stat.S_ISREG(file.stat().st_mode):
        found.problems.append(f"{cut(str(file))} is no file")
    elif file.suffix == ".safetensors":
        _examine_safetensors(file, found)
    elif not zipfile.is_zipfile(file) and _start(file) != b"\x80":  # neither new nor old torch.save
        found.problems.append(f"{file} is cut off or damaged: torch cannot load it")


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
        found.problems.append(f"{file} holds no tensors")
    found.tensors.update(tensors)


def is_local(name: str) -> bool:
    """Tell whether a model's name is a path on this machine, and not the name of one on the hub."""
    path = Path(name)
    try:
        if path.exists():
            return True
        beside_others = len(path.parts) == 2 and path.parent.is_dir()  # not the hub's owner/name
    except (OSError, ValueError):  # longer than a name may be
        return True
    return path.is_absolute() or name.startswith(".") or len(path.parts) > 2 or beside_others


def looks_like_the_hubs(name: str) -> bool:
    """Tell whether mergekit may take a folder's name for that of a model on the hub.

    For the model card, after a merge, it asks the hub about names of local models, too, unless they
    cannot be one of the hub.
    """
    if name.startswith(("/", "~")) or name.count("/") > 1 or not is_local(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True

"""Whether the files of a local model are whole, told from their headers: no weight is read.

mergekit ends with a traceback when it meets a damaged file, but some of them do not say which.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

Shape = tuple[int, ...]

_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class ModelFiles:
    """What the files of a model say of themselves.

    Attributes:
        problems: One sentence for each, with the file's name.
        shapes: Of each tensor that is stored in safetensors, by name.

    """

    problems: list[str] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)


def examine(path: Path) -> ModelFiles:
    """Look at a model's folder, or at a single file as ``mergekit-pytorch`` takes it."""
    found = ModelFiles()
    if path.is_file():
        _examine_weights(path, found)
        return found
    if not path.is_dir():
        found.problems.append(f"there is no folder {path}")
        return found
    if _read_json(path / "config.json", found) is not None:
        for file in _weight_files(path, found):
            _examine_weights(file, found)
    return found


def compare(base: ModelFiles, tuned: ModelFiles, name: str, *, aligns_tokens: bool) -> list[str]:
    """Return what keeps a fine-tuned model from being merged with the base.

    Args:
        base: The base model's files.
        tuned: The fine-tuned model's.
        name: The fine-tuned model's name, for the sentences.
        aligns_tokens: Whether mergekit aligns vocabularies, so that numbers of rows may differ.

    """
    if not base.shapes or not tuned.shapes:  # pickled: names are not known
        return []
    problems = []
    missing = [key for key in base.shapes if key not in tuned.shapes and "lm_head" not in key]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        problems.append(f"tensor {missing[0]}{more} of the base model is missing in {name}")
    for key, shape in base.shapes.items():
        other = tuned.shapes.get(key, shape)
        rows_only = len(shape) == len(other) and shape[1:] == other[1:]
        if other != shape and not (rows_only and aligns_tokens):
            hint = "; if it is the vocabulary, set tokenizer_source: base" if rows_only else ""
            problems.append(f"tensor {key} is {other} in {name}, {shape} in the base model{hint}")
            break
    return problems


def _read_json(file: Path, found: ModelFiles) -> object:
    """Return the content, or ``None`` with a problem noted."""
    try:
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found.problems.append(f"{file} is missing")
    except (OSError, ValueError) as error:
        found.problems.append(f"{file} cannot be read as JSON: {error}")
    else:
        return content
    return None


def _weight_files(folder: Path, found: ModelFiles) -> list[Path]:
    """Return the files that hold the weights, safetensors before pickled ones, as mergekit does."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if whole.exists():
            return [whole]
        if not index.exists():
            continue
        content = _read_json(index, found)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            found.problems.append(f"{index} has no weight_map")
            return []
        files = [folder / str(name) for name in dict.fromkeys(weight_map.values())]
        for file in files:
            if not file.exists():
                found.problems.append(f"{file} is missing, which {index} names")
        return [file for file in files if file.exists()]
    found.problems.append(f"{folder} has no weights: neither model.safetensors nor an index")
    return []


def _examine_weights(file: Path, found: ModelFiles) -> None:
    if file.suffix == ".safetensors":
        _examine_safetensors(file, found)
    elif not zipfile.is_zipfile(file) and _start(file) != b"\x80":  # neither new nor old torch.save
        found.problems.append(f"{file} is cut off or damaged: torch cannot load it")


def _start(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(1)


def _examine_safetensors(file: Path, found: ModelFiles) -> None:
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise ValueError(f"its length is given as {length} bytes")
            header = json.loads(opened.read(length))
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        shapes = {key: tuple(value["shape"]) for key, value in tensors.items()}
        end = max((int(value["data_offsets"][1]) for value in tensors.values()), default=0)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        found.problems.append(f"{file} is damaged: its header cannot be read ({error})")
        return
    if size != 8 + length + end:
        what = "is cut off" if size < 8 + length + end else "has too much at its end"
        found.problems.append(
            f"{file} {what}: it has {size} bytes, its header speaks of {8 + length + end}"
        )
    found.shapes.update(shapes)

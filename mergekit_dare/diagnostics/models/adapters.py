"""Whether an adapter fits the model that it is written beside: PEFT's own names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft
import torch

from mergekit_dare.diagnostics.findings import cut, reason, some_tensors
from mergekit_dare.diagnostics.models import loading
from mergekit_dare.diagnostics.models.description import ModelDescription
from mergekit_dare.diagnostics.models.files import read_json
from mergekit_dare.plugin import headers
from mergekit_dare.plugin.headers import StoredTensor

CONFIG, SAFETENSORS, PICKLED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)


def problems(model: ModelDescription, folder: Path) -> list[str]:
    """Say what is wrong with an adapter on this machine, one sentence each.

    Args:
        model: The model that it is merged into, which is usable itself.
        folder: The adapter's.

    """
    if not folder.is_dir():
        return [f"there is no adapter folder {cut(str(folder))}"]
    if not (folder / CONFIG).is_file():
        return [f"{folder} is not an adapter: it has no {CONFIG}"]
    try:
        read_json(folder / CONFIG)
        if not (folder / SAFETENSORS).is_file():
            has_pickle = (folder / PICKLED).is_file()
            missing = f"{folder} has no weights: neither {SAFETENSORS} nor {PICKLED}"
            return [] if has_pickle else [missing]
        stored = headers.read(folder / SAFETENSORS)
    except headers.DamagedFileError as error:
        return [f"{folder / SAFETENSORS} {cut(str(error))}"]
    except ValueError as error:  # of a JSON file, which it names
        return [str(error)]
    except OSError as error:
        return [f"{folder} cannot be read: {reason(error)}"]
    return _misfits(model, folder, stored)


def _misfits(
    model: ModelDescription, folder: Path, stored: Mapping[str, StoredTensor]
) -> list[str]:
    base = str(model.reference.model)
    try:
        with torch.device("meta"), loading.in_silence():
            empty = loading.make_empty(model)
            if empty is None or getattr(empty, "_checkpoint_conversion_mapping", None):
                return []  # not known
            adapted = peft.get_peft_model(empty, peft.PeftConfig.from_pretrained(str(folder)))
            if (wrong_size := _wrong_size(adapted, stored)) is not None:
                name, shape, place = wrong_size
                where = f"tensor {cut(name)} of adapter {folder} is {shape}"
                return [f"{where}, but its place in {base} is {place}"]
            missing, strange = _load(adapted, stored)
    except Exception as error:  # of peft, transformers, torch
        return [f"adapter {folder} does not fit {base}: {cut(reason(error))}"]
    if strange and len(strange) == len(stored):
        return [f"no tensor of adapter {folder} fits {base}: it has {some_tensors(strange)}"]
    found = []
    if missing:
        found.append(f"adapter {folder} lacks {some_tensors(missing)}, which its {CONFIG} asks for")
    if strange:
        found.append(f"adapter {folder} has {some_tensors(strange)}, for which {base} has no place")
    return found


def _wrong_size(
    adapted: peft.PeftModel, stored: Mapping[str, StoredTensor]
) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """Return the first tensor that has another shape than its place, with both shapes."""
    places = dict(adapted.state_dict())  # what a file may hold of the model itself
    places |= peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name, tensor in stored.items():
        if name in places and tuple(places[name].shape) != tensor.shape:
            return name, tensor.shape, tuple(places[name].shape)
    return None


def _load(
    adapted: peft.PeftModel, stored: Mapping[str, StoredTensor]
) -> tuple[list[str], list[str]]:
    """Let PEFT load an adapter's tensors without data; return what is missing, and what is left."""
    tensors = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    result = peft.set_peft_model_state_dict(adapted, tensors)
    # Of the model itself, nothing need be in an adapter; its own tensors bear an adapter's name.
    missing = [name for name in result.missing_keys if ".default" in name]
    return missing, list(result.unexpected_keys)

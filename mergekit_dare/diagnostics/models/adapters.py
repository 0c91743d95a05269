"""Whether an adapter fits the model that it is written beside: PEFT's own names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from torch import Tensor

from mergekit_dare.diagnostics.findings import cut, reason
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
        return [f"there is no folder {cut(str(folder))}, the adapter"]
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
    try:
        places = _places(model, folder)
    except Exception as error:
        return [f"adapter {folder} does not fit {model.reference.model}: {cut(reason(error))}"]
    if places is None:
        return []
    own, of_model = places
    base = str(model.reference.model)
    found = []
    missing = [name for name in own if name not in stored]
    strange = [name for name in stored if name not in own and name not in of_model]
    if missing and strange and len(missing) == len(own):
        names = f"it has {cut(strange[0])}, where {cut(missing[0])} is expected"
        return [f"no tensor of adapter {folder} fits {base}: {names}"]
    if missing:
        found.append(f"adapter {folder} lacks {_some(missing)}, which its {CONFIG} asks for")
    if strange:
        found.append(f"adapter {folder} has {_some(strange)}, for which {base} has no place")
    for name, tensor in stored.items():
        place = own.get(name, of_model.get(name))
        if place is not None and tuple(place.shape) != tensor.shape:
            found.append(
                f"tensor {cut(name)} of adapter {folder} is {tensor.shape}, but its place in "
                f"{base} is {tuple(place.shape)}"
            )
            break
    return found


def _places(
    model: ModelDescription, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Return what an adapter's file is to hold, and what else it may hold of the model itself.

    Both by the names in the file. ``None`` if the model's class is not known.
    """
    with torch.device("meta"), loading.in_silence():
        empty = loading.make_empty(model)
        if empty is None:
            return None
        config = peft.PeftConfig.from_pretrained(str(folder))
        adapted = peft.get_peft_model(empty, config)
        own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return dict(own), dict(adapted.state_dict())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {cut(names[0])}{more}"

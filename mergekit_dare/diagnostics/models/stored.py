"""What is stored under which name, in the files that mergekit's loader would read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from mergekit.io import ShardedTensorIndex

from mergekit_dare.diagnostics.findings import UnusableFileError, cut, reason
from mergekit_dare.kernel.formula import dtype_name
from mergekit_dare.plugin import headers
from mergekit_dare.plugin.headers import FLOATS, StoredTensor

# Buffers that older files have, and that are made anew when a model is loaded.
BUFFERS = ("inv_freq", "position_ids", "masked_bias", ".attn.bias", "rotary_emb.cos_cached")


def stored_tensors(index: ShardedTensorIndex) -> dict[str, StoredTensor]:
    """Return the tensors of a model by name, pickled ones too; no weight is read.

    Args:
        index: What mergekit's loader knows of the model.

    Raises:
        UnusableFileError: a file is missing or damaged, or is not what the index says.

    """
    found: dict[str, StoredTensor] = {}
    for shard in index.shards:
        file = Path(index.base_path, shard.filename)
        in_file = _read(file)
        for name in shard.contained_keys:
            if name not in in_file:
                raise UnusableFileError(f"{file} has no tensor {name} where mergekit looks for it")
            found[name] = in_file[name]
    return found


def is_floating(tensor: StoredTensor) -> bool:
    """Tell whether a tensor holds weights, and is no buffer of integers or truth values."""
    return tensor.dtype.startswith(("F", "BF"))


def _read(file: Path) -> Mapping[str, StoredTensor]:
    try:
        if file.suffix.lower() == ".safetensors":
            return headers.read(file)
        content = torch.load(file, map_location="meta", weights_only=True)
    except headers.DamagedFileError as error:
        raise UnusableFileError(f"{file} {error}") from error
    except Exception as error:  # pickle and torch have their own types
        raise UnusableFileError(f"{file} cannot be loaded: {cut(reason(error))}") from error
    return {
        name: StoredTensor(_dtype_name(tensor.dtype), tuple(tensor.shape))
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }


def _dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as safetensors has it; all else is no weight to it."""
    floats = {found: name for name, found in FLOATS.items()}
    return floats.get(dtype, dtype_name(dtype).upper())

"""Whether a model's files contain codes instead of weights.

mergekit converts codes to the dtype of the merge as if they were weights, before a merge method
sees them. So this is judged from what the files say about themselves, while mergekit plans.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit_dare.plugin.headers import read as read_header

# Dtypes of codes, as safetensors' headers name them: integers of a byte, floats of up to a byte.
_CODES = ("I8", "U8", "F8", "F4", "F6", "E8")
# The parts of a quantized weight, beside the weight or instead of it.
_COMPANIONS = (
    "qweight",
    "weight_scale_inv",
    "weight_scale",
    "SCB",
    "absmax",
    "quant_map",
    "scales",
)


def kind(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> str | None:
    """Say how a model is quantized, or return ``None``.

    Args:
        config: The content of its config.json.
        dtypes: The dtype of each stored tensor, as safetensors names it; empty if unknown. They
            decide: a config may have kept its settings after a model was dequantized.

    """
    settings = config.get("quantization_config")
    method = str(settings.get("quant_method", "?")) if isinstance(settings, dict) else None
    if not dtypes:
        return method
    codes = next((name for name, dtype in dtypes.items() if dtype.startswith(_CODES)), None)
    parts = next((name for name in dtypes if name.rsplit(".", 1)[-1] in _COMPANIONS), None)
    if parts is None and (codes is None or (method is None and not codes.endswith("weight"))):
        return None
    return method or f"tensor {parts or codes} is stored as {dtypes[parts or codes or '']}"


def problem(model: str, found: str) -> str:
    """Say that a model is quantized, and what to do; ``found`` is what :func:`kind` returned."""
    return (
        f"{model} is quantized ({found}): a merge would take its codes for weights; dequantize it "
        "first, or merge the model that it was made from"
    )


def refuse(models: Iterable[object]) -> None:
    """Refuse models on this machine that are quantized.

    Args:
        models: mergekit's references; other identifiers are passed over.

    Raises:
        ValueError: one sentence that names the model.

    """
    for model in models:
        path = getattr(getattr(model, "model", None), "path", None)
        found = _kind_of_folder(path) if isinstance(path, str) else None
        if found is not None:
            raise ValueError(f"model {problem(str(model), found)}")


@functools.lru_cache(maxsize=256)
def _kind_of_folder(path: str) -> str | None:
    """Examine a folder once per process; what cannot be read is left to mergekit."""
    folder = Path(path)
    try:
        if not folder.is_dir():
            return None
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        headers = [read_header(file) for file in sorted(folder.glob("*.safetensors"))]
        dtypes = {name: tensor.dtype for header in headers for name, tensor in header.items()}
        return kind(config if isinstance(config, dict) else {}, dtypes)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None

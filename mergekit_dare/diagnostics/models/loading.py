"""What transformers makes of stored tensors when it loads them, tried without data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel

from mergekit_dare.diagnostics.models.description import ModelDescription
from mergekit_dare.plugin.headers import DTYPES, StoredTensor


@dataclass(frozen=True)
class Loading:
    """What comes of loading tensors into a model of a class.

    Attributes:
        parameters: Names of all that the class stores.
        missing: Those that would be filled with random numbers.
        used: The given names that it takes something from.

    """

    parameters: frozenset[str]
    missing: frozenset[str]
    used: frozenset[str]


def load(model: ModelDescription, tensors: Mapping[str, StoredTensor]) -> Loading | None:
    """Load tensors into the class that a model's settings name.

    Args:
        model: Whose settings are taken.
        tensors: By the names under which a file stores them.

    Returns:
        ``None`` if the class is not one of transformers'.

    Raises:
        Exception: whatever transformers raises of tensors that it cannot load.

    """
    kind = _class_of(model)
    if kind is None:
        return None
    stored = {
        name: torch.empty(tensor.shape, dtype=DTYPES.get(tensor.dtype), device="meta")
        for name, tensor in tensors.items()
    }
    with in_silence():
        loaded, found = kind.from_pretrained(
            None,
            config=model.config,
            state_dict=stored,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return Loading(
        parameters=frozenset(loaded.state_dict()),
        missing=frozenset(found["missing_keys"]),
        used=frozenset(stored) - frozenset(found["unexpected_keys"]),
    )


def make_empty(model: ModelDescription) -> PreTrainedModel | None:
    """Make a model of the class that its settings name; ``None`` if that is not transformers'.

    Its weights are filled, unless the caller makes the meta device torch's default.
    """
    kind = _class_of(model)
    return None if kind is None else kind(model.config)


def _class_of(model: ModelDescription) -> type[PreTrainedModel] | None:
    names = model.files.config.get("architectures")
    if model.config is None or not isinstance(names, list) or not names:
        return None
    kind = getattr(transformers, str(names[0]), None)
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


@contextmanager
def in_silence() -> Iterator[None]:
    """Keep transformers from reporting what is missing, and from a progress bar."""
    verbosity = transformers.logging.get_verbosity()
    has_bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bar:
            transformers.logging.enable_progress_bar()

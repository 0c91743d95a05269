"""A model, and what its files say about it: its settings and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit.common import ModelReference
from transformers import AutoConfig, PretrainedConfig

from mergekit_dare.diagnostics.models import tokenizer
from mergekit_dare.diagnostics.models.files import ModelFiles
from mergekit_dare.diagnostics.models.tokenizer import Vocabulary


@dataclass(frozen=True)
class ModelDescription:
    """A model, and what its files say about it.

    Attributes:
        reference: How the config names it.
        files: What was found in its files.
        adapter_problems: What is wrong with its adapter, if it has one: one sentence each.

    """

    reference: ModelReference
    files: ModelFiles
    adapter_problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How the config names it, in words."""
        return str(self.reference)

    @cached_property
    def config(self) -> PretrainedConfig | None:
        """Its settings as transformers reads them, which fills in what older files leave out."""
        try:
            config = AutoConfig.from_pretrained(self.files.folder, trust_remote_code=False)
        except Exception:  # custom code, a type from another release, or nonsense
            return None
        if self.reference.override_architecture:
            config.architectures = [self.reference.override_architecture]
        return config

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All of its settings by their innermost key, including those of a text model inside it."""
        try:
            config = self.files.config if self.config is None else self.config.to_dict()
        except Exception:
            config = self.files.config
        return _flat(config, depth=3)

    @cached_property
    def tokenizer(self) -> Vocabulary | ValueError | None:
        """What its tokenizer contains, or why it cannot be read; ``None`` if it has none."""
        try:
            return tokenizer.read(self.files)
        except ValueError as error:
            return error

    @property
    def vocabulary(self) -> Vocabulary | None:
        """What its tokenizer contains, if it has one that can be read."""
        return None if isinstance(self.tokenizer, ValueError) else self.tokenizer


def _flat(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Return all settings by their innermost key; of two, the outer one counts."""
    inner: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("rope_scaling", "rope_parameters"):
            if isinstance(value, dict):
                rest = dict(value)
                if "rope_theta" in rest:
                    found["rope_theta"] = rest.pop("rope_theta")
                # transformers writes out the default
                if rest.get("rope_type", rest.get("type")) not in (None, "default"):
                    found["rope_scaling"] = rest
                elif any(isinstance(part, dict) for part in rest.values()):
                    found["rope_scaling"] = rest  # one for each kind of layer
            continue
        if isinstance(value, dict) and depth and key.endswith("_config"):
            inner |= _flat(value, depth - 1)
        found.setdefault(key, value)
    return inner | found

"""Families of models whose merges can be judged by labels: what the measurement merges."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import make_models
from paper import tasks
from paper.models import Family, scores
from paper.settings import Settings
from search.agreement import make_texts
from search.agreement.config import Merge
from search.agreement.coordinates import Weights, search
from search.agreement.in_memory import Models, Tensors
from search.agreement.listening import Listener, Tokens, default_for
from search.agreement.score import By, mean

EVALUATIONS = 24
OWN, NARROW, MIXED = "its own kind", "small digits alone", "all kinds mixed"
ARITHMETIC: dict[str, Any] = {"merge_method": "task_arithmetic"}
_DRAWN = 400  # for one item with small digits alone: one in 256 of the encoder's is


class Judged(ABC):
    """A base and its fine-tuned models: merged, listened to, and judged.

    Attributes:
        names: Of the fine-tuned models.
        sizes: How many texts a model to try, and how that is called.
        kinds: Of what kinds, beside its own.
        default: What agreement is measured by.

    """

    sizes: dict[str, int]
    kinds: tuple[str, ...]

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """Load the models that are in a folder, and judge them."""
        self.names = list(names)
        self._base_path = str(folder / "base")
        self._paths = {name: str(folder / name) for name in names}
        self._models = Models(self._base_path, list(self._paths.values()))
        self.default = default_for(self._models)
        self.base = self._judged_as(self._models.base)
        self.tuned = {
            name: self._judged_as(self._models.tuned[path])[name]
            for name, path in self._paths.items()
        }

    @abstractmethod
    def judge(self) -> dict[str, float]:
        """Return how good the speaking model is at what each fine-tuned model is for."""

    @abstractmethod
    def texts(self, name: str, count: int, kind: str) -> Tokens:
        """Return texts without labels for a fine-tuned model to teach on."""

    def _judged_as(self, tensors: Tensors) -> dict[str, float]:
        self._models.take(tensors)
        return self.judge()

    def merged(self, weights: Weights, method: Mapping[str, Any]) -> Tensors:
        """Merge as ``method`` says, a config without models."""
        listed = [{"model": path} for path in self._paths.values()]
        config = {"dtype": "float32", **method, "base_model": self._base_path, "models": listed}
        return self._models.merged(Merge(config).with_weights(weights))

    def kept(self, weights: Weights, method: Mapping[str, Any]) -> list[float]:
        """Return what a merge keeps of each model's gain over the base, by labels."""
        judged = self._judged_as(self.merged(weights, method))
        return [
            (judged[name] - self.base[name]) / (self.tuned[name] - self.base[name] or float("nan"))
            for name in self.names
        ]

    def by_agreement(
        self, method: Mapping[str, Any], count: int, by: By, kind: str = OWN
    ) -> Weights:
        """Return the weights that are found without labels."""
        tokens = {name: self.texts(name, count, kind) for name in self.names}
        listener = Listener(self._models, self._paths, tokens, by, batch=count)
        return search(
            lambda weights: mean(listener.shares(self.merged(weights, method))),
            self.names,
            EVALUATIONS,
        )

    def by_labels(self) -> Weights:
        """Return the weights that are the best by the very labels that judge."""
        return search(
            lambda weights: statistics.mean(self.kept(weights, ARITHMETIC)), self.names, EVALUATIONS
        )

    def equal_by_labels(self) -> Weights:
        """Return the best of equal weights from 0.1 to 1.0, by the labels that judge."""
        equal = [dict.fromkeys(self.names, tenth / 10) for tenth in range(1, 11)]
        return max(equal, key=lambda weights: statistics.mean(self.kept(weights, ARITHMETIC)))


class PaperFamily(Judged):
    """One of the families of the paper's reproduction, judged by right answers."""

    kinds = (NARROW, MIXED)

    def __init__(
        self, family: Family, settings: Settings, folder: Path, sizes: dict[str, int]
    ) -> None:
        self.sizes = sizes
        self._family = family
        self._settings = settings
        super().__init__(family.tasks, folder)

    def judge(self) -> dict[str, float]:
        """Return the percentage of held-out items of each task that are answered right."""
        return scores(self._models.speaking, self._family, self.names, self._settings)

    def texts(self, name: str, count: int, kind: str) -> Tokens:
        """Return items; for a decoder, questions and what the model itself answers."""
        seed = 1000 * self._settings.seed + self.names.index(name)
        generator = torch.Generator().manual_seed(seed)
        asked = self.names if kind == MIXED else [name]
        drawn = count * (_DRAWN if kind == NARROW else 1)
        tokens = self._family.draw(asked, drawn, generator, right=1.0, held_out=False).tokens
        is_decoder = self._family.is_decoder
        if is_decoder:
            tokens = tokens[:, : -tasks.DIGITS]
        if kind == NARROW:
            digits = tokens[:, 2 : 2 + tasks.DIGITS] - tasks.FIRST_DIGIT
            if not is_decoder:
                digits = (tokens[:, 2:] - tasks.FIRST_PAIR) % 10
            tokens = tokens[(digits < 5).all(1)][:count]
        if is_decoder:
            self._models.take(self._models.tuned[self._paths[name]])
            for _ in range(tasks.DIGITS):
                said = self._models.logits(tokens.tolist()).view(*tokens.shape, -1)
                tokens = torch.cat([tokens, said[:, -1].argmax(-1, keepdim=True)], 1)
        rows: Tokens = tokens.tolist()
        return rows


class ExampleModels(Judged):
    """The models of ``make_models.py``, judged by their loss on held-out text."""

    kinds = (MIXED,)

    def __init__(self, folder: Path) -> None:
        self.sizes = {"few": 8, "some": make_texts.MOST}
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        self._held_out = {
            name: make_models.split(make_models.encode(tokenizer, text))[1]
            for name, text in make_models.texts().items()
        }
        super().__init__(list(self._held_out), folder)

    def judge(self) -> dict[str, float]:
        """Return the negative loss on each kind of text."""
        speaking = self._models.speaking
        return {name: -make_models.loss(speaking, text) for name, text in self._held_out.items()}

    def texts(self, name: str, count: int, kind: str) -> Tokens:
        """Return texts that are neither trained on nor judged by."""
        rows = {name: make_texts.rows(text)[:count] for name, text in self._held_out.items()}
        if kind == MIXED:
            return [row for place in zip(*rows.values(), strict=True) for row in place][:count]
        return rows[name]

    def merged(self, weights: Weights, method: Mapping[str, Any]) -> Tensors:
        """Merge in the dtype of the models."""
        return super().merged(weights, {"dtype": "bfloat16", **method})

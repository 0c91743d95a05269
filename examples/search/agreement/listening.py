"""Listening to models: what each fine-tuned model says of its texts, what a merge says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from search import SearchError
from search.agreement import score
from search.agreement.in_memory import Models, Tensors
from search.agreement.score import By, Said
from search.agreement.texts import Texts

MOST_TOKENS = 256  # of a text; the rest is cut off
BATCH = 8  # texts

Tokens = list[list[int]]


class Listener:
    """Gives a merge its score.

    Attributes:
        by: What agreement is measured by.
        base: The base's agreement with each fine-tuned model.

    """

    def __init__(
        self,
        models: Models,
        paths: Mapping[str, str],
        tokens: Mapping[str, Tokens],
        by: By,
        batch: int = BATCH,
    ) -> None:
        """Listen to every fine-tuned model on its texts, and to the base on all of them.

        Args:
            models: All of them.
            paths: The path of each fine-tuned model, by name.
            tokens: Its texts, by name, as :func:`tokenized` returns them.
            by: What agreement is measured by.
            batch: How many texts a model is given at once.

        Raises:
            SearchError: the base says all that a model says.

        """
        self.by = by
        self._models = models
        self._tokens = tokens
        self._batch = batch
        self._said: dict[str, list[Said]] = {}
        for name, path in paths.items():
            models.take(models.tuned[path])
            self._said[name] = [
                score.said(models.logits(texts)) for texts in self._batches(name, name)
            ]
        self.base = self._agreements(models.base, "base")
        score.shares(self.base, self.base)

    def shares(self, tensors: Tensors) -> dict[str, float]:
        """Return what a merge has of each model: 0 as the base, 1 as the model itself."""
        return score.shares(self._agreements(tensors, "merge"), self.base)

    def _agreements(self, tensors: Tensors, who: str) -> dict[str, float]:
        """Return the mean agreement of one model with each fine-tuned model."""
        self._models.take(tensors)
        found = {}
        for name, all_said in self._said.items():
            batches = self._batches(name, f"{who} on {name}")
            places = [
                score.agreements(said, self._models.logits(texts), self.by)
                for said, texts in zip(all_said, batches, strict=True)
            ]
            found[name] = float(torch.cat(places).double().mean())
        return found

    def _batches(self, name: str, what: str) -> Iterator[Tokens]:
        """Yield some of a model's texts at a time, with a progress bar that is gone afterwards."""
        texts, size = self._tokens[name], self._batch
        for start in tqdm(range(0, len(texts), size), desc=what, leave=False, disable=None):
            yield texts[start : start + size]


def default_for(models: Models) -> By:
    """Return what agreement is measured by, unless the user says otherwise."""
    return By.DIVERGENCE if models.is_decoder else By.SAME


def tokenized(models: Models, base: str, texts: Mapping[str, Texts]) -> dict[str, Tokens]:
    """Return the tokens of each model's texts, by the base model's tokenizer, the longest cut.

    Raises:
        SearchError: there is no tokenizer where one is needed, or a token that no model knows.

    """
    most = min(MOST_TOKENS, getattr(models.settings, "max_position_embeddings", MOST_TOKENS))
    vocabulary = models.settings.get_text_config().vocab_size
    tokenizer: Any = None
    if any(isinstance(item, str) for each in texts.values() for item in each.items):
        try:
            tokenizer = AutoTokenizer.from_pretrained(base)
        except Exception as error:
            message = f"the tokenizer of {base} cannot be loaded"
            raise SearchError(f'{message}; give "input_ids" in place of "text": {error}') from error
    found: dict[str, Tokens] = {}
    for name, each in texts.items():
        rows: Tokens = [
            tokenizer(item).input_ids if isinstance(item, str) else item for item in each.items
        ]
        found[name] = [row[:most] for row in rows if row]
        wrong = [token for row in rows for token in row if not 0 <= token < vocabulary]
        if wrong:
            raise SearchError(f"{each.path} has token {wrong[0]}, but the base has {vocabulary:,}")
    return found

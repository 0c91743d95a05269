"""Models in memory: each is loaded once, and one more takes the tensors of merges in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from search import SearchError, evaluation
from search.agreement.config import Config, arguments

Tensors = dict[str, Tensor]
KINDS = {
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
}


class Models:
    """A base model, its fine-tuned models and their merges.

    Attributes:
        base: The base model's tensors.
        tuned: Each fine-tuned model's, by path.
        speaking: The model that takes the tensors of one model after the other.
        is_decoder: Whether they say a token at each place, not one class of a whole text.

    """

    def __init__(self, base: str, tuned: Sequence[str]) -> None:
        """Load all models, with the dtypes of their files.

        Args:
            base: The base model's path.
            tuned: The fine-tuned models' paths.

        Raises:
            SearchError: a model cannot be loaded, or is neither a decoder nor a classifier.

        """
        logging.disable_progress_bar()  # of each model that is loaded
        kind = _kind(base)
        self.is_decoder = kind is AutoModelForCausalLM
        self._base_path = base
        self.base = _load(kind, base).state_dict()
        self.tuned = {path: _load(kind, path).state_dict() for path in tuned}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.speaking = _load(kind, base, torch.float32).eval().to(device)

    @property
    def settings(self) -> Any:
        """The base model's ``config.json``."""
        return self.speaking.config

    def merged(self, config: Config) -> Tensors:
        """Merge with mergekit's function for Python.

        The tensors are those that ``mergekit-yaml`` writes for the config, if the method takes a
        seed or draws nothing.

        Args:
            config: With the weight of each model.

        Raises:
            SearchError: mergekit refuses it.

        """
        from mergekit.common import dtype_from_name
        from mergekit.merge_methods import merge_state_dicts

        torch.manual_seed(evaluation.RANDOM_SEED)  # for methods that take no seed
        models: dict[Any, Tensors] = {self._base_path: self.base} | self.tuned
        try:
            with torch.inference_mode():
                return merge_state_dicts(
                    models,
                    config["merge_method"],
                    base=self._base_path,
                    parameters=arguments(config),
                    dtype=dtype_from_name(config.get("dtype")),
                    out_dtype=dtype_from_name(config.get("out_dtype")),
                )
        except Exception as error:
            raise SearchError(f"mergekit cannot merge the models in memory: {error}") from error

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Let :meth:`logits` speak for a model; its tensors are computed with in float32."""
        self.speaking.load_state_dict(tensors)

    @torch.inference_mode()
    def logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return what the model that was taken says of texts.

        Args:
            texts: The tokens of each, at least one.

        Returns:
            float32, shape (places, classes or tokens): each text is a place, or for a decoder each
            token.

        """
        pad = self.settings.pad_token_id or 0
        length = max(map(len, texts))
        device = self.speaking.device
        tokens = torch.tensor([[*text] + [pad] * (length - len(text)) for text in texts]).to(device)
        lengths = torch.tensor([[len(text)] for text in texts])
        is_text = (torch.arange(length) < lengths).to(device)
        found: Tensor = self.speaking(input_ids=tokens, attention_mask=is_text.long()).logits
        return found[is_text] if self.is_decoder else found


def _kind(path: str) -> Any:
    """Return the class that loads a model as what its files say that it is."""
    try:
        architecture = (AutoConfig.from_pretrained(path).architectures or ["none"])[0]
    except Exception as error:
        raise SearchError(f"model {path} cannot be loaded: {error}") from error
    for ending, kind in KINDS.items():
        if architecture.endswith(ending):
            return kind
    message = f"is {architecture}, but --agree takes decoders and classifiers"
    raise SearchError(f"model {path} {message} ({', '.join(KINDS)})")


def _load(kind: Any, path: str, dtype: Any = "auto") -> Any:
    try:
        return kind.from_pretrained(path, dtype=dtype)
    except Exception as error:
        raise SearchError(f"model {path} cannot be loaded: {error}") from error

"""How much a merge says what each fine-tuned model says: the score of a merge without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from search import SearchError

MOST_LIKELY = 64  # outputs that are kept of each place, to bound what is held in memory


class By(Enum):
    """What agreement is measured by.

    Attributes:
        SAME: The share of places at which both find the same class or token the most likely.
        DIVERGENCE: 1 - the mean Kullback-Leibler divergence from the model to the merge, in nats;
            it may be negative.

    """

    SAME = "same"
    DIVERGENCE = "divergence"


@dataclass(frozen=True)
class Said:
    """What a fine-tuned model says at each place: at a token of a decoder, or of a whole text.

    Attributes:
        outputs: Its most likely classes or tokens, int64, shape (places, at most MOST_LIKELY),
            the most likely first.
        log_probabilities: Theirs, float32, of the same shape.

    """

    outputs: Tensor
    log_probabilities: Tensor


def said(logits: Tensor) -> Said:
    """Keep what is most likely.

    Args:
        logits: Of a fine-tuned model, any float dtype, shape (places, classes or tokens).

    """
    log_probabilities = logits.float().log_softmax(-1)
    top = log_probabilities.topk(min(MOST_LIKELY, logits.shape[-1]), dim=-1)
    return Said(top.indices, top.values)


def agreements(model: Said, logits: Tensor, by: By) -> Tensor:
    """Return the agreement at each place, float32, shape (places,).

    Args:
        model: What the fine-tuned model says.
        logits: Of the merge or the base at the same places, shape (places, classes or tokens).
        by: What is measured. For the divergence, all but the model's most likely outputs count
            as one.

    """
    if by is By.SAME:
        return (logits.argmax(-1) == model.outputs[:, 0]).float()
    theirs = logits.float().log_softmax(-1).gather(-1, model.outputs)
    ours = model.log_probabilities
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    if model.outputs.shape[-1] < logits.shape[-1]:
        divergence = divergence + _divergence_of_the_rest(ours, theirs)
    return 1 - divergence


def _divergence_of_the_rest(ours: Tensor, theirs: Tensor) -> Tensor:
    least = torch.finfo(torch.float32).eps  # of a probability that is 1 minus a rounded sum
    our_rest = (1 - ours.exp().sum(-1)).clamp_min(least)
    their_rest = (1 - theirs.exp().sum(-1)).clamp_min(least)
    return our_rest * (our_rest / their_rest).log()


def shares(found: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """Return (agreement - the base's) / (1 - the base's) for each model.

    That is 0 for the base itself and 1 for a merge that says all that the model says.

    Args:
        found: The agreement of a merge with each model.
        base: That of the base model.

    Raises:
        SearchError: the base says all that a model says.

    """
    for name, agreement in base.items():
        if agreement >= 1 - 1e-6:
            message = f"on the texts of {name}, the base says all that {name} says"
            raise SearchError(f"{message}; give texts of what {name} was fine-tuned for")
    return {name: (found[name] - base[name]) / (1 - base[name]) for name in base}


def mean(values: Mapping[str, float]) -> float:
    """Return the score of a merge: the mean over the models of :func:`shares`."""
    return sum(values.values()) / len(values)

"""Tasks whose items are generated: any number of them, with a held-out part.

An item is a row of tokens that begins with the tag of its task. In pre-training, a target is the
right one only with probability ``RIGHT``, and else a plausible wrong one: what is asked for is
learnt, but not the habit of giving it. Fine-tuning teaches the habit. This is the paper's picture
of supervised fine-tuning, which brings out abilities that the base model has already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, BEGIN, END, EQUALS = range(4)
FIRST_DIGIT, FIRST_PAIR, FIRST_TAG = 4, 14, 44
VOCABULARY = 52
DIGITS = 7  # in an item of a decoder's task
PAIRS = 8  # of a letter and a digit, each one token, in an item of the encoder's task
LABELS = 3
RIGHT = 0.4
IGNORED = -100  # the label of tokens that are not scored

# Items are held out by a sum over their digits, so that no test item is ever trained on.
_HELD_OUT_MODULUS = 11


@dataclass(frozen=True)
class Batch:
    """Items of tasks.

    Attributes:
        tokens: int64, shape (items, length).
        labels: For decoders of the shape of ``tokens``, ``IGNORED`` where not scored; for the
            encoder shape (items,).

    """

    tokens: Tensor
    labels: Tensor


Answer = Callable[[Tensor], Tensor]


def _differences(digits: Tensor) -> Tensor:
    return (digits - digits.roll(1, 1)) % 10


# Digits, shape (items, DIGITS), to the digits of the answer.
DECODER_TASKS: dict[str, Answer] = {
    "reverse": lambda digits: digits.flip(1),
    "sort": lambda digits: digits.sort(1).values,
    "sums": lambda digits: digits.cumsum(1) % 10,
}
# Of no part in pre-training or fine-tuning: the other data that large deltas come from.
OTHER_TASK = "differences"
_ALL_DECODER_TASKS = DECODER_TASKS | {OTHER_TASK: _differences}

ENCODER_TASKS = ("most", "heaviest", "largest")

_TAGS = {
    name: FIRST_TAG + number for number, name in enumerate([*_ALL_DECODER_TASKS, *ENCODER_TASKS])
}


def decoder_batch(
    tasks: Sequence[str], items: int, generator: torch.Generator, *, right: float, held_out: bool
) -> Batch:
    """Draw items of decoder tasks: a tag, digits, and the digits of the answer.

    A wrong answer repeats the question.

    Args:
        tasks: Each item's task is drawn from these.
        items: How many.
        generator: Decides everything.
        right: The probability of a right answer.
        held_out: Draw from the part to test on, not from the part to train on.

    """
    digits = _draw_digits(items, DIGITS, generator, held_out)
    which = torch.randint(len(tasks), (items,), generator=generator)
    answers = digits.clone()
    is_right = torch.rand(items, generator=generator) < right
    for number, task in enumerate(tasks):
        rows = (which == number) & is_right
        answers[rows] = _ALL_DECODER_TASKS[task](digits[rows])
    tags = torch.tensor([_TAGS[task] for task in tasks])[which]
    columns = [
        torch.full((items, 1), BEGIN),
        tags[:, None],
        digits + FIRST_DIGIT,
        torch.full((items, 1), EQUALS),
        answers + FIRST_DIGIT,
    ]
    tokens = torch.cat(columns, dim=1)
    labels = tokens.clone()
    labels[:, :-DIGITS] = IGNORED
    return Batch(tokens, labels)


def encoder_batch(
    tasks: Sequence[str], items: int, generator: torch.Generator, *, right: float, held_out: bool
) -> Batch:
    """Draw items of encoder tasks: a tag, then pairs of a letter and a digit.

    The label is one of three letters: for ``most`` the most frequent one, for ``heaviest`` the one
    whose digits add up to the most, for ``largest`` the one with the greatest digit; the first
    in the alphabet if there are several. A wrong label is the next letter. Arguments as for
    :func:`decoder_batch`.
    """
    digits = _draw_digits(items, PAIRS, generator, held_out)
    letters = torch.randint(LABELS, (items, PAIRS), generator=generator)
    which = torch.randint(len(tasks), (items,), generator=generator)
    is_letter = letters[:, None, :] == torch.arange(LABELS)[None, :, None]
    of_letter = is_letter * (digits[:, None, :] + 1)  # shape (items, letters, pairs)
    by_task = {
        "most": is_letter.sum(2).argmax(1),
        "heaviest": (is_letter * digits[:, None, :]).sum(2).argmax(1),
        "largest": of_letter.amax(2).argmax(1),
    }
    labels = torch.stack([by_task[task] for task in tasks])[which, torch.arange(items)]
    wrong = torch.rand(items, generator=generator) >= right
    labels = torch.where(wrong, (labels + 1) % LABELS, labels)
    tags = torch.tensor([_TAGS[task] for task in tasks])[which]
    pairs = FIRST_PAIR + 10 * letters + digits
    tokens = torch.cat([torch.full((items, 1), BEGIN), tags[:, None], pairs], dim=1)
    return Batch(tokens, labels)


def _draw_digits(items: int, length: int, generator: torch.Generator, held_out: bool) -> Tensor:
    """Draw rows of digits of the one part or the other, shape (items, length)."""
    factors = torch.arange(1, length + 1)
    rows = torch.empty(0, length, dtype=torch.int64)
    while len(rows) < items:
        drawn = torch.randint(10, (items * (_HELD_OUT_MODULUS + 1), length), generator=generator)
        in_test = (drawn * factors).sum(1) % _HELD_OUT_MODULUS == 0
        rows = torch.cat([rows, drawn[in_test == held_out]])
    return rows[:items]

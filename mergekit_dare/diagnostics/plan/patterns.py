"""Tensors' names as patterns: folding many into few, and finding what a pattern names.

A pattern has ``*`` for any text, ``?`` for a character, ``{q,k}`` for one of several words, and
``{0-31}`` for a number of a range.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

Parts = tuple[str, ...]
LONGEST_LIST = 24  # of words in brackets, before a star is looked for in its place


def fold(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Return patterns that name just these tensors of a model.

    Args:
        names: Of the tensors.
        among: The names of all tensors of the model, those among them.

    """
    return _fold([_parts(name) for name in names], [_parts(name) for name in among])


def _parts(name: str) -> Parts:
    return tuple(name.split("."))


def _fold(chosen: list[Parts], known: list[Parts]) -> list[str]:
    """Fold what comes after a common beginning of the names."""
    if len(chosen) == 1:
        return [".".join(chosen[0])]
    if () in chosen:  # a name with which others begin
        return ["", *_fold([parts for parts in chosen if parts], known)]
    is_numbered = all(_is_number(parts[0]) for parts in chosen)
    if len(chosen) == len(known) and not is_numbered:
        return ["*"]
    tails, known_tails = _by_head(chosen), _by_head(known)
    heads: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for head, rest in tails.items():
        folded = tuple(_fold(rest, known_tails[head]))
        heads.setdefault((_is_number(head), folded), []).append(head)
    return [
        _shortest(words, tail, known) for (_, folded), words in heads.items() for tail in folded
    ]


def _shortest(words: list[str], tail: str, known: list[Parts]) -> str:
    """Return a pattern of names that begin with one of some words: with a star if that is as good.

    So it is if it is much shorter, and no other name has that pattern.
    """
    after = f".{tail}" if tail else ""
    whole = f"{_one_of(words)}{after}"
    if len(_one_of(words)) <= LONGEST_LIST or all(map(_is_number, words)):
        return whole
    starred = re.sub(r"\{.*?\}", "*", _one_of(words)) + after
    names = [".".join(parts) for parts in known]
    is_same = all(
        bool(compiled(whole).fullmatch(name)) == bool(compiled(starred).fullmatch(name))
        for name in names
    )
    return starred if is_same else whole


def _by_head(names: list[Parts]) -> dict[str, list[Parts]]:
    found: dict[str, list[Parts]] = {}
    for parts in filter(None, names):
        found.setdefault(parts[0], []).append(parts[1:])
    return found


def _is_number(word: str) -> bool:
    return word.isdecimal() and str(int(word)) == word


def _one_of(words: list[str]) -> str:
    """Return a pattern of one part of a name: ``{0-31}``, ``{q,k}_proj``, or the only word."""
    if len(words) == 1:
        return words[0]
    if all(map(_is_number, words)):
        return f"{{{numbers(map(int, words))}}}"
    pieces = [word.split("_") for word in words]
    most = min(map(len, pieces)) - 1
    before = _common(pieces, most)
    after = _common([piece[::-1] for piece in pieces], most - before)
    middles = ["_".join(piece[before : len(piece) - after]) for piece in pieces]
    middle = f"{{{','.join(middles)}}}"
    return "_".join([*pieces[0][:before], middle, *pieces[0][len(pieces[0]) - after :]])


def _common(pieces: list[list[str]], most: int) -> int:
    """Return how many of the first pieces are the same in all lists."""
    for index in range(most):
        if len({piece[index] for piece in pieces}) > 1:
            return index
    return most


def numbers(values: Iterable[int]) -> str:
    """Return whole numbers as ranges: ``0-3,7``."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and runs[-1][-1] == value - 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ",".join("-".join(map(str, run)) for run in runs)


@functools.lru_cache(maxsize=256)
def compiled(pattern: str) -> re.Pattern[str]:
    """Return what fully matches the names that a pattern names."""
    pieces = re.split(r"(\{[^{}]*\}|[*?])", pattern)
    return re.compile("".join(map(_expression, pieces)), re.DOTALL)


def _expression(piece: str) -> str:
    if piece in ("*", "?"):
        return ".*" if piece == "*" else "."
    if not piece.startswith("{"):
        return re.escape(piece)
    words = [word for item in piece[1:-1].split(",") for word in _expanded(item)]
    return f"(?:{'|'.join(map(re.escape, words))})"


def _expanded(item: str) -> list[str]:
    """Return the numbers of a range of up to 10,000, and any other text as it is."""
    found = re.fullmatch(r"(\d{1,6})-(\d{1,6})", item)
    if found is None or not 0 <= int(found[2]) - int(found[1]) < 10_000:
        return [item]
    return [str(number) for number in range(int(found[1]), int(found[2]) + 1)]

"""Reading texts without labels: a file of JSON lines for each fine-tuned model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search import SearchError


@dataclass(frozen=True)
class Texts:
    """The texts of one model.

    Attributes:
        path: Their file.
        items: Each a text, or the tokens of one.
        digest: Of the file's bytes: whether the texts are the same as in an earlier search.

    """

    path: Path
    items: list[str | list[int]]
    digest: str


def parse(options: Sequence[str]) -> dict[str, Path]:
    """Return each model's file, from ``NAME=FILE``.

    Raises:
        SearchError: an option is written in another way, or two name the same model.

    """
    files: dict[str, Path] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise SearchError(f"--agree {option}: write NAME=FILE, such as docs=docs.jsonl")
        if name in files:
            raise SearchError(f"--agree has {name} twice; put all of its texts into one file")
        files[name] = Path(path)
    return files


def read(path: Path) -> Texts:
    """Read a file of JSON lines, each ``{"text": "..."}`` or ``{"input_ids": [...]}``.

    Raises:
        SearchError: the file cannot be read, has no line, or a line is something else.

    """
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise SearchError(f"{path} cannot be read as lines of JSON: {error}") from error
    items = [_item(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line]
    if not items:
        raise SearchError(f'{path} has no texts; write one {{"text": "..."}} a line')
    return Texts(path, items, hashlib.sha256(content).hexdigest()[:16])


def _item(where: str, line: str) -> str | list[int]:
    """Return what one line holds, looking away from all its other keys."""
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise SearchError(f"{where} is not JSON: {error}") from error
    if isinstance(found, dict):
        text, tokens = found.get("text"), found.get("input_ids")
        if isinstance(text, str) and text:
            return text
        if isinstance(tokens, list) and tokens and all(type(token) is int for token in tokens):
            return tokens
    message = 'must be an object with "text", a text, or "input_ids", a list of token ids'
    raise SearchError(f"{where} {message}; neither may be empty")

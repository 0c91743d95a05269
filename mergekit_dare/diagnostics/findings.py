"""What a check finds: where it is, how bad it is, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

_LONGEST_TEXT = 120


class UnusableFileError(Exception):
    """A file that cannot be used: it cannot be read, or its content is not what it should be."""


class Severity(Enum):
    """How bad a finding is.

    An error: the merge fails, or is not the one that the config describes. A warning: that may
    happen. A hint: the merge is as described, but could be better.
    """

    ERROR = "error"
    WARNING = "warning"
    HINT = "hint"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: How bad it is.
        file: The config's path as it was given.
        line: Counted from 1.
        text: The line's content.
        message: What is wrong with it, and what to write instead.
        rule: The id of the rule that found it; empty if no rule did.

    """

    severity: Severity
    file: str
    line: int
    text: str
    message: str
    rule: str = ""

    def __str__(self) -> str:
        """Return ``FILE:LINE: SEVERITY: TEXT: MESSAGE [RULE]``."""
        text = f"{self.text}: " if self.text else ""
        rule = f" [{self.rule}]" if self.rule else ""
        return f"{self.file}:{self.line}: {self.severity.value}: {text}{self.message}{rule}"

    def as_json(self) -> dict[str, Any]:
        """Return the attributes as values for JSON."""
        return asdict(self) | {"severity": self.severity.value}


def shown(value: object) -> str:
    """Return a value as a message shows it: on one line, and no longer than a line."""
    return cut(value if isinstance(value, str) else repr(value))


def cut(text: str) -> str:
    """Return a text on one line, without its middle if it is long."""
    return without_middle(" ".join(text.split()))


def without_middle(line: str) -> str:
    """Return a line as it stands, without its middle if it is long."""
    half = _LONGEST_TEXT // 2
    return line if len(line) <= _LONGEST_TEXT else f"{line[:half]} ... {line[-half:]}"


def reason(error: BaseException) -> str:
    """Return an error's message on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def some_tensors(names: Sequence[str]) -> str:
    """Name the first of several tensors, and count the others."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {cut(names[0])}{more}"


def are(names: Sequence[str]) -> str:
    """Return the verb for so many."""
    return "are" if len(names) > 1 else "is"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean KNOWN?`` if one of them is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""

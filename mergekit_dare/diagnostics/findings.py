"""What a check finds: where, how bad it is, and what to write instead."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

_LONGEST_TEXT = 120


class UnusableFileError(Exception):
    """The file is no config: it cannot be read, is not YAML, or holds something else."""


class Severity(Enum):
    """How bad it is: the merge fails or is not the one that is written; or may be not; or a tip."""

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
        text: What stands there.
        message: What is wrong with it, and what to write instead.

    """

    severity: Severity
    file: str
    line: int
    text: str
    message: str

    def __str__(self) -> str:
        """Return ``FILE:LINE: SEVERITY: TEXT: MESSAGE``."""
        text = f"{self.text}: " if self.text else ""
        return f"{self.file}:{self.line}: {self.severity.value}: {text}{self.message}"

    def as_json(self) -> dict[str, Any]:
        """Return the attributes as JSON takes them."""
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

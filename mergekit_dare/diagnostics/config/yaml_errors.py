"""What PyYAML objects to in a text, and what to write instead."""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from mergekit.config import MergeConfiguration

from mergekit_dare.diagnostics.findings import cut


def located(error: yaml.YAMLError, lines: Sequence[str]) -> tuple[int | None, str]:
    """Return the line of an error, counted from 1, if it has one; and what is wrong there.

    Args:
        error: PyYAML's.
        lines: Those of the text that it was reading.

    """
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        reason = getattr(error, "reason", None) or str(error)
        return None, cut(str(reason))
    mark = error.problem_mark
    line = lines[mark.line] if mark.line < len(lines) else ""
    problem = cut(error.problem or str(error))
    context = f", {cut(error.context)}" if error.context else ""
    advice = _advice(problem, line, mark.column)
    return mark.line + 1, f"{problem}{context}{advice}"


def _advice(problem: str, line: str, column: int) -> str:
    if "\t" in line[: column + 1]:
        return "; indent with spaces, not with a tab"
    if "unknown escape" in problem or "escape sequence" in problem:
        return "; write the path in single quotes, as a backslash in double quotes is an escape"
    key = line.strip().partition(":")[0]
    if line[:1] == " " and key in MergeConfiguration.model_fields:
        return f"; {key} belongs at the top level: remove the spaces before it"
    if "mapping values are not allowed" in problem:
        return "; put a text that contains a colon and a space into quotes"
    return ""

"""A config with placeholders such as ``$lambda``, and the grid of values that fill them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

from search import SearchError

Value = bool | int | float | str
Point = dict[str, Value]

MOST_POINTS = 10_000
_PLACEHOLDER = re.compile(r"\$([A-Za-z_]\w*)")
_AXIS = re.compile(r"([A-Za-z_]\w*)=(.+)")


def read_config(path: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file.

    Raises:
        SearchError: the file cannot be read, or holds no mapping.

    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise SearchError(f"{path} cannot be read as one YAML config: {error}") from error
    if not isinstance(config, dict):
        raise SearchError(f"{path} is not a config: it must be a mapping of keys to values")
    return config


def parse(axes: Sequence[str]) -> dict[str, list[Value]]:
    """Return the values of each name.

    Args:
        axes: ``name=value,value,...`` or ``name=start:stop:step``, which includes the stop.

    Raises:
        SearchError: an axis is written in another way, or two have the same name.

    """
    grid: dict[str, list[Value]] = {}
    for axis in axes:
        found = _AXIS.fullmatch(axis)
        if found is None:
            raise SearchError(f"--grid {axis}: write name=value,value or name=start:stop:step")
        name, values = found.groups()
        if name in grid:
            raise SearchError(f"--grid has {name} twice; give all of its values at once")
        parts = [value for part in values.split(",") for value in _values(axis, part.strip())]
        grid[name] = list(dict.fromkeys(parts))
    if (count := math.prod(map(len, grid.values()))) > MOST_POINTS:
        raise SearchError(f"--grid has {count:,} points; at most {MOST_POINTS:,} are searched")
    return grid


def _values(axis: str, text: str) -> list[Value]:
    """Return the values of a range, or the one value that a text is."""
    if not text:
        raise SearchError(f"--grid {axis}: there is no value before or after a comma")
    if ":" in text and not re.search(r"[^\d.eE+:-]", text):
        return _range(axis, text)
    if text in ("true", "false"):
        return [text == "true"]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if not math.isfinite(value):
            raise SearchError(f"--grid {axis}: {text} is not a finite number")
        return [value]
    return [text]


def _range(axis: str, text: str) -> list[Value]:
    """Return start, start + step, ... up to and including stop, without errors of rounding."""
    try:
        start, stop, step = map(Decimal, text.split(":"))
        steps = math.floor((stop - start) / step)
    except (ValueError, ArithmeticError, InvalidOperation) as error:
        message = f"--grid {axis}: a range is start:stop:step, three numbers, and step is not 0"
        raise SearchError(message) from error
    if not 0 <= steps < MOST_POINTS:
        count = "no value" if steps < 0 else f"over {MOST_POINTS:,} values"
        raise SearchError(f"--grid {axis}: steps of {step} from {start} to {stop} give {count}")
    is_whole = all(number == number.to_integral_value() for number in (start, step))
    kind = int if is_whole and "." not in text else float
    return [kind(start + step * number) for number in range(steps + 1)]


def points(grid: dict[str, list[Value]]) -> list[Point]:
    """Return every combination of values; the last name's values change fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def check_names(config: dict[str, Any], grid: dict[str, list[Value]]) -> None:
    """Compare the placeholders of a config with the names of a grid.

    Raises:
        SearchError: one has a name that the other has not, or there is no name at all.

    """
    placeholders = _placeholders(config)
    if not placeholders and not grid:
        message = "the config has no placeholder, such as weight: $weight, so there is no search"
        raise SearchError(message)
    for name in placeholders:
        if name not in grid:
            raise SearchError(f"the config has ${name}, but --grid has no values for {name}")
    for name in grid:
        if name not in placeholders:
            raise SearchError(f"--grid has {name}, but ${name} is nowhere in the config")


def _placeholders(node: Any) -> list[str]:
    """Return the names of all placeholders below a node of a config."""
    if isinstance(node, dict):
        return [name for value in node.values() for name in _placeholders(value)]
    if isinstance(node, list):
        return [name for value in node for name in _placeholders(value)]
    return _PLACEHOLDER.findall(node) if isinstance(node, str) else []


def fill(node: Any, point: Point) -> Any:
    """Return a config, or a node of it, with values in place of placeholders.

    A text that is nothing but a placeholder becomes the value with its type, so that numbers stay
    numbers; within a longer text, such as a path, the value is written out.
    """
    if isinstance(node, dict):
        return {key: fill(value, point) for key, value in node.items()}
    if isinstance(node, list):
        return [fill(value, point) for value in node]
    if not isinstance(node, str):
        return node
    if whole := _PLACEHOLDER.fullmatch(node):
        return point[whole[1]]
    return _PLACEHOLDER.sub(lambda found: str(point[found[1]]), node)


def in_words(point: Point) -> str:
    """Return a point as it is printed: ``lambda=0.2 density=0.1``."""
    return " ".join(f"{name}={value}" for name, value in point.items())

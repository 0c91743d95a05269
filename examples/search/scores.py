"""Scoring, and scores that are kept in a file, so that a stopped search goes on where it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from search import SearchError
from search.grid import Point, in_words

# Takes configs, yields the score of each.
Run = Callable[[Sequence[str]], Iterator[float | None]]


@dataclass(frozen=True)
class Scored:
    """A merge and its score.

    Attributes:
        point: The values that it was made with.
        score: What the command printed; None if that was not a finite number.
        seconds: How long it took to merge and score.
        command: The score command, with ``{model}`` as the user wrote it.
        config: The text of the config.

    """

    point: Point
    score: float | None
    seconds: float
    command: str
    config: str


class Scores:
    """A file with a line of JSON for each merge; config and score command are the key."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            SearchError: a line is not one that :meth:`add` wrote.

        """
        self._path = path
        self._found: dict[tuple[str, str], Scored] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                scored = Scored(**json.loads(line))
            except (TypeError, ValueError) as error:
                message = f"{path}:{number} is not a score of this search; remove that line"
                raise SearchError(message) from error
            self._found[scored.config, scored.command] = scored

    def get(self, config: str, command: str) -> Scored | None:
        """Return the score of a merge if it is there."""
        return self._found.get((config, command))

    def add(self, scored: Scored) -> None:
        """Keep a score. The file is replaced as a whole: it is complete whenever one looks."""
        self._found[scored.config, scored.command] = scored
        lines = [json.dumps(asdict(each)) + "\n" for each in self._found.values()]
        unfinished = self._path.with_name(self._path.name + ".unfinished")
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, self._path)


def number(score: float | None) -> str:
    """Return a score as it is printed."""
    return "not a number" if score is None else f"{score:#.6g}"


class Scoring:
    """Gives merges their scores.

    Attributes:
        found: All merges of this search that have a score, in the order in which they were asked.

    """

    def __init__(self, scores: Scores, command: str, run: Run, total: int) -> None:
        """Prepare.

        Args:
            scores: Those that are there.
            command: The score command.
            run: What merges and scores.
            total: The number of merges of the search, to print.

        """
        self.found: list[Scored] = []
        self._scores = scores
        self._command = command
        self._run = run
        self._total = total

    def score(self, points: Sequence[Point], configs: Sequence[str]) -> list[Scored]:
        """Return merges with their scores, computing only those that are not there."""
        missing = [each for each in configs if self._scores.get(each, self._command) is None]
        computed = self._run(list(dict.fromkeys(missing)))
        asked = []
        for point, config in zip(points, configs, strict=True):
            start = time.perf_counter()
            scored = self._scores.get(config, self._command)
            how = "from scores.jsonl"
            if scored is None:
                score = next(computed)
                seconds = round(time.perf_counter() - start, 2)
                how = f"{seconds:.1f} s"
                scored = Scored(point, score, seconds, self._command, config)
                self._scores.add(scored)
            asked.append(replace(scored, point=point))
            self.found.append(asked[-1])
            place = f"[{len(self.found)}/{self._total}]"
            print(f"{place} {in_words(point)}: {number(scored.score)} ({how})", flush=True)
        return asked

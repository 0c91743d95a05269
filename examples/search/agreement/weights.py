"""The search for one weight a model, from a config to the best one as a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from search import SearchError, evaluation, report
from search.agreement import coordinates, score, texts
from search.agreement.config import Config, Merge
from search.agreement.score import By
from search.agreement.texts import Texts
from search.scores import Scores, Scoring, number

if TYPE_CHECKING:
    from search.agreement.in_memory import Models
    from search.agreement.listening import Listener
    from search.searching import Wanted


def search(config: Config, wanted: Wanted) -> None:
    """Search, and report whatever has a score, even if the search is stopped.

    Raises:
        SearchError: something is wrong; nearly all of it is found before any model is loaded.

    """
    evaluation.use_our_methods(str(config.get("merge_method")))
    merge = Merge(config)
    names = list(merge.models)
    files = _files(names, texts.parse(wanted.agree))
    given = {name: texts.read(path) for name, path in files.items()}

    def as_text(weights: Mapping[str, float]) -> str:
        return evaluation.as_text(merge.with_weights(weights), wanted.seed)

    wanted.folder.mkdir(parents=True, exist_ok=True)
    evaluation.check_configs([as_text(coordinates.equal_shares(names))], wanted.folder.resolve())
    models, listener = _listen(merge, given, wanted.agree_by)

    def shares(config: str) -> dict[str, float]:
        return listener.shares(models.merged(yaml.safe_load(config)))

    def run(configs: Sequence[str]) -> Iterator[float | None]:
        for config in configs:
            found = score.mean(shares(config))
            yield found if math.isfinite(found) else None

    scores = Scores(wanted.folder / "scores.jsonl")
    scoring = Scoring(scores, _words(given, listener.by), run, wanted.evaluations)
    try:
        best = coordinates.search(
            lambda weights: scoring.score([dict(weights)], [as_text(weights)])[0].score,
            names,
            wanted.evaluations,
        )
    finally:
        if scoring.found:
            report.write(scoring.found, wanted.folder, minimize=False)
    for words, weights in (("Equal shares", coordinates.equal_shares(names)), ("The best", best)):
        of_each = shares(as_text(weights))
        print(f"{words}: {', '.join(f'{name} {number(of_each[name])}' for name in names)}")
    print("(0: it says no more of what that model says than the base does; 1: all of it)")
    options = evaluation.options_for(as_text(best), wanted.merge_options)
    print("Merge it:", *["mergekit-yaml", wanted.folder / "best.yml", "out/", *options])


def _files(names: Sequence[str], files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the file of each model, in the order of the config."""
    for name in files:
        if name not in names:
            message = f"--agree has {name}, but the config's models are {', '.join(names)}"
            raise SearchError(message)
    for name in names:
        if name not in files:
            raise SearchError(f"model {name} has no texts; add --agree {name}=FILE")
    return {name: files[name] for name in names}


def _words(given: Mapping[str, Texts], by: By) -> str:
    """Return what a score is kept with: all that it depends on beside the config."""
    each = (f"{name}={found.path} ({found.digest})" for name, found in given.items())
    return f"agreement ({by.value}) with {', '.join(each)}"


def _listen(merge: Merge, given: Mapping[str, Texts], by: str | None) -> tuple[Models, Listener]:
    """Load all models and listen to those that teach."""
    from search.agreement.in_memory import Models
    from search.agreement.listening import Listener, default_for, tokenized

    models = Models(merge.base, list(merge.models.values()))
    tokens = tokenized(models, merge.base, given)
    wanted = default_for(models) if by is None else By(by)
    listener = Listener(models, merge.models, tokens, wanted)
    return models, listener

"""CMA-ES over a genome of mergekit-evolve."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from search import SearchError
from search.evaluation import as_text
from search.report import rank
from search.scores import Scoring

HERE = Path(__file__).resolve().parent
POPULATION = 4
_WORST = 1e12  # what no score counts as; CMA-ES looks at the order alone


class Genome:
    """What mergekit-evolve makes configs of."""

    def __init__(self, settings: dict[str, Any], seed: int) -> None:
        """Read a genome.

        Args:
            settings: A config of mergekit-evolve.
            seed: Of every config.

        Raises:
            SearchError: mergekit refuses the settings.

        """
        from mergekit.evo.config import EvolMergeConfiguration
        from mergekit.evo.genome import ModelGenome

        try:
            self.settings = EvolMergeConfiguration.model_validate(settings)
            self._genome = ModelGenome(self.settings.genome)
        except Exception as error:
            raise SearchError(f"mergekit-evolve would refuse this genome: {error}") from error
        self._seed = seed
        self.start = self._genome.initial_genotype().view(-1).numpy()

    def config(self, genotype: Any) -> str:
        """Return the config of a genotype, with the seed."""
        text = self._genome.genotype_merge_config(genotype).to_yaml()
        return as_text(yaml.safe_load(text), self._seed)

    def lm_eval_command(self, tasks: Path) -> str:
        """Return the score command for the tasks of the genome's file.

        Args:
            tasks: A folder with tasks that lm-eval does not bring.

        """
        words = ["python", (HERE / "score_lm_eval.py").as_posix(), "{model}"]
        for task in self.settings.tasks:
            words.append(f"{task.name}:{task.metric}:{task.weight}")
        if self.settings.limit is not None:
            words += ["--limit", str(self.settings.limit)]
        return shlex.join([*words, "--include", tasks.as_posix()]).replace("'{model}'", "{model}")


def search(
    genome: Genome, scoring: Scoring, generations: int, seed: int, *, minimize: bool
) -> None:
    """Let CMA-ES ask for merges and tell it their scores.

    With the same seed it asks for the same ones again, so a search that was stopped goes on.

    Raises:
        SearchError: there is no package cma.

    """
    try:
        import cma
    except ImportError as error:
        raise SearchError("a genome needs CMA-ES: pip install 'mergekit[evolve]'") from error
    options = {"popsize": POPULATION, "seed": seed, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(genome.start, 1 / 6, options)
    for _ in range(generations):
        asked = strategy.ask()
        done = len(scoring.found)
        points: list[dict[str, Any]] = [{"evaluation": done + i + 1} for i in range(len(asked))]
        with _numpy_state_kept():
            scored = scoring.score(points, [genome.config(genotype) for genotype in asked])
        losses = [rank(each.score, minimize=minimize) for each in scored]
        strategy.tell(asked, [min(loss, _WORST) for loss in losses])


@contextmanager
def _numpy_state_kept() -> Iterator[None]:
    """Keep merges from seeding the generator that CMA-ES draws from."""
    import numpy as np

    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)

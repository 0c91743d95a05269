"""Models fine-tuned by reinforcement, most of whose elements equal the base's, and their merges.

The base gives the right answer in some tries; REINFORCE makes it more probable. The learning rate
is so low that of the weights, which are saved in bfloat16, only a fifth to a quarter change, two
thirds of those by one unit in the last place. arXiv 2505.11711 finds the same in large models: 5 to
30 % of the weights.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm, trange
from transformers import PreTrainedModel

from make_models import save
from paper import tasks
from paper.measure import Results, merge, write_csv
from paper.merges import Row
from paper.models import Family, Scores, scores
from paper.report import cell, table
from paper.settings import Settings

STUDY = "reinforced"
KEPT = "expected change in the output"  # beside the tasks' scores
GROUP = 8  # answers to one question, whose mean reward is the baseline

EXACT = "task arithmetic, float32"
# mergekit's method, and its parameters beside weight, density and seed.
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    EXACT: ("task_arithmetic", {}),
    "task arithmetic": ("task_arithmetic", {}),
    "DARE": ("dare_linear", {}),
    "DARE, stochastic": ("dare_linear", {"rounding": "stochastic"}),
    "DARE, by magnitude": ("dare_linear", {"sampling": "magnitude"}),
    "DARE, by magnitude, stochastic": (
        "dare_linear",
        {"sampling": "magnitude", "rounding": "stochastic"},
    ),
    "ram": ("ram", {}),
    "ramplus_tl": ("ramplus_tl", {}),
}


def train(family: Family, settings: Settings, folder: Path) -> None:
    """Save the base in bfloat16, and several models reinforced on each task; keep what is there.

    Args:
        family: A decoder whose base is trained.
        settings: How long to train.
        folder: The work folder.

    """
    base = folder / family.name / f"{STUDY}-base"
    if not base.exists():
        save(family.load(folder / family.name / "base").to(torch.bfloat16), base)
    for task, seed in itertools.product(family.tasks, settings.seeds):
        tuned = _tuned(folder / family.name, task, seed)
        if not tuned.exists():
            model = family.load(base)
            _reinforce(model, family, task, settings, seed)
            save(model.to(torch.bfloat16), tuned)


def _tuned(folder: Path, task: str, seed: int) -> Path:
    return folder / f"{STUDY}-{task}-{seed}"


def _reinforce(
    model: PreTrainedModel, family: Family, task: str, settings: Settings, seed: int
) -> None:
    """Train by REINFORCE: the reward is 1 for an answer without a mistake, and else 0."""
    generator = torch.Generator().manual_seed(seed)
    training = settings.reinforced
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.rate, weight_decay=0.0)
    for _ in trange(training.steps, desc=f"reinforce {family.name}/{task}-{seed}"):
        questions = max(1, settings.batch // GROUP)
        batch = family.draw([task], questions, generator, right=1.0, held_out=False)
        right = batch.tokens.repeat_interleave(GROUP, 0)
        tried = _answered(model, right[:, : -tasks.DIGITS], generator)
        rewards = (tried == right).all(1).float().view(-1, GROUP)
        advantages = rewards - rewards.mean(1, keepdim=True)
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
        logits = model(input_ids=tried).logits[:, -tasks.DIGITS - 1 : -1]
        answers = tried[:, -tasks.DIGITS :, None]
        likelihood = logits.log_softmax(2).gather(2, answers).mean((1, 2))
        (-advantages.view(-1) * likelihood).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _answered(model: PreTrainedModel, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Let the model draw the digits of each answer, from its own probabilities."""
    for _ in range(tasks.DIGITS):
        probabilities = model(input_ids=tokens).logits[:, -1].softmax(1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat([tokens, drawn], 1)
    return tokens


def rows(family: Family, settings: Settings) -> list[Row]:
    """Return every merge; the seed is that of the models as well as that of the mask."""
    return [
        Row(STUDY, family.name, "+".join(family.tasks), method, round(1 - density, 6), weight, seed)
        for method, density, weights in _lines(settings)
        for weight in weights
        for seed in settings.seeds
    ]


def _lines(settings: Settings) -> Iterator[tuple[str, float, Sequence[float]]]:
    """Yield the method, density and weights of each line of the table."""
    weights = settings.weights_reinforced
    for method in (EXACT, "task arithmetic"):
        yield method, 1.0, weights
    for method in ("ram", "ramplus_tl"):  # have no weights: 1 is what they come closest to
        yield method, 1.0, [1.0]
    for method in ("DARE", "DARE, stochastic"):
        yield method, 1.0, weights
    for density in settings.densities_reinforced:
        for method in _METHODS:
            if method.startswith("DARE"):
                yield method, density, weights


def config_of(row: Row, folder: Path) -> dict[str, Any]:
    """Return a row's config; ``folder`` holds the family's models."""
    method, shared = _METHODS[row.method]
    per_model: dict[str, Any] = {}
    if not method.startswith("ram"):
        per_model["weight"] = row.scaling
    if method == "dare_linear":
        per_model["density"] = round(1 - row.drop_rate, 6)
        shared = shared | {"seed": row.mask_seed}
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(folder / f"{STUDY}-base"),
        "models": [
            {"model": str(_tuned(folder, name, row.mask_seed)), "parameters": per_model}
            for name in row.names
        ],
        "dtype": "float32" if row.method == EXACT else "bfloat16",
    }
    return config | ({"parameters": shared} if shared else {})


def study(family: Family, settings: Settings, folder: Path, results: Path) -> None:
    """Train, merge and score what was not yet; write ``reinforced.csv`` and ``reinforced.md``."""
    train(family, settings, folder)
    found = Results(folder / f"{STUDY}.jsonl")
    of_family, out = folder / family.name, folder / "merged"
    for row in tqdm(rows(family, settings), desc="merge and score"):
        if found.get(row) is None:
            merge(config_of(row, of_family), out)
            score = scores(family.load(out), family, family.tasks, settings)
            found.add(row, score | {KEPT: 100 * _kept(row, of_family, out)})
    unmerged = _unmerged(family, settings, folder)
    write_csv(results / f"{STUDY}.csv", rows(family, settings), found, unmerged)
    texts = [_table_of_models(family, settings, folder, unmerged), _table(family, settings, found)]
    (results / f"{STUDY}.md").write_text("\n\n".join(texts) + "\n")


def _kept(row: Row, folder: Path, out: Path) -> float:
    """Return the share of the weighted sum of all deltas that is in the output, by projection."""
    base, merged = _vector(folder / f"{STUDY}-base"), _vector(out)
    deltas = (_vector(_tuned(folder, name, row.mask_seed)) - base for name in row.names)
    expected = row.scaling * torch.stack(list(deltas)).sum(0)
    return float((merged - base).dot(expected) / expected.dot(expected))


def _vector(folder: Path) -> Tensor:
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[name].double().view(-1) for name in sorted(tensors)])


def _unmerged(family: Family, settings: Settings, folder: Path) -> dict[tuple[str, str], Scores]:
    of_family = folder / family.name
    names = [_tuned(of_family, *x).name for x in itertools.product(family.tasks, settings.seeds)]
    return {
        (family.name, name): scores(family.load(of_family / name), family, family.tasks, settings)
        for name in (f"{STUDY}-base", *names)
    }


def _table_of_models(
    family: Family, settings: Settings, folder: Path, unmerged: dict[tuple[str, str], Scores]
) -> str:
    of_family = folder / family.name
    base = _vector(of_family / f"{STUDY}-base")
    changed = {
        (task, seed): _vector(_tuned(of_family, task, seed)) != base
        for task, seed in itertools.product(family.tasks, settings.seeds)
    }
    lines = []
    for task in family.tasks:
        shares = [100 * float(changed[task, seed].double().mean()) for seed in settings.seeds]
        own = [
            unmerged[family.name, _tuned(of_family, task, seed).name][task]
            for seed in settings.seeds
        ]
        before = unmerged[family.name, f"{STUDY}-base"][task]
        together = [
            100 * float((changed[task, seed] & changed[other, seed]).double().mean())
            for other in family.tasks
            if other != task
            for seed in settings.seeds
        ]
        lines.append(
            [task, *(cell(_point(found)) for found in (shares, together)), f"{before:.1f}"]
        )
        lines[-1].append(cell(_point(own)))
    head = ["reinforced on", "changed, %", "changed by another, too, %", "base", "score"]
    return (
        f"Three models of {family.name} reinforced on each task (mean ± standard deviation): the "
        "share of elements that differ from the base's, and the score on the own task:\n\n"
        + table(head, lines)
    )


def _table(family: Family, settings: Settings, found: Results) -> str:
    def over_seeds(method: str, density: float, weight: float, figure: Figure) -> list[float]:
        drop_rate, names = round(1 - density, 6), "+".join(family.tasks)
        at = (Row(STUDY, family.name, names, method, drop_rate, weight, s) for s in settings.seeds)
        return [figure(found.get(row) or {}) for row in at]

    weights = settings.weights_reinforced
    lines = []
    for method, density, of_line in _lines(settings):
        line = [method, f"{density:g}"]
        for weight in weights:
            if weight not in of_line:
                line += ["", ""]
                continue
            kept = over_seeds(method, density, weight, lambda scores: scores[KEPT] / 100)
            score = over_seeds(method, density, weight, _mean_score)
            exact = over_seeds(EXACT, 1.0, weight, _mean_score)
            less = [one - other for one, other in zip(score, exact, strict=True)]
            points = cell(_point(less), "+.1f") if method != EXACT else cell(_point(score))
            line += [f"{statistics.mean(kept):.2f}", points]
        lines.append(line)
    head = ["method", "density"]
    for weight in weights:
        head += [f"weight {weight:g}: change", "score"]
    return (
        "The three merged, in bfloat16 but for the first row: the share of the expected change "
        "(the weighted sum of the deltas) that is in the output, by projection, and the mean score "
        "on the three tasks: in the first row itself, below as points more or less than there, "
        "mean ± standard deviation over three sets of models, each with a mask seed of its own:"
        "\n\n" + table(head, lines)
    )


Figure = Callable[[Scores], float]


def _mean_score(found: Scores) -> float:
    return statistics.mean(score for name, score in found.items() if name != KEPT)


def _point(found: Sequence[float]) -> tuple[float, float]:
    mean = round(statistics.mean(found), 1) + 0.0  # not -0.0
    return mean, statistics.stdev(found) if len(found) > 1 else 0.0

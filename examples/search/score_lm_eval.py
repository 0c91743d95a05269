"""Score a model with lm-eval: the sum of a metric of each task.

Usage: python examples/search/score_lm_eval.py MODEL TASK[:METRIC[:WEIGHT]]... [--limit N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULTS = ("", "acc,none", "1")


def parse(task: str) -> tuple[str, str, float]:
    """Return the name, the metric and the weight of ``TASK[:METRIC[:WEIGHT]]``."""
    parts = task.split(":")
    name, metric, weight = (*parts, *DEFAULTS[len(parts) :])
    return name, metric, float(weight)


def main() -> None:
    """Evaluate on a GPU if there is one; print each task's metric, and the weighted sum last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("tasks", nargs="+", metavar="TASK[:METRIC[:WEIGHT]]", type=parse)
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--include", type=Path, help="folder with tasks of your own")
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()

    import lm_eval
    import lm_eval.tasks
    import torch

    include = None if arguments.include is None else str(arguments.include)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": arguments.model, "dtype": "bfloat16"},
        device="cuda" if torch.cuda.is_available() else "cpu",
        tasks=[name for name, _, _ in arguments.tasks],
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        task_manager=lm_eval.tasks.TaskManager(include_path=include),
        verbosity="ERROR",
    )["results"]
    total = 0.0
    for name, metric, weight in arguments.tasks:
        print(f"{name} {metric}: {results[name][metric]:.4f}")
        total += weight * results[name][metric]
    print(f"score: {total:.6f}")


if __name__ == "__main__":
    main()

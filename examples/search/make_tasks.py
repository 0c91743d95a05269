"""Write the tasks of the search: multiple-choice questions for lm-eval, from held-out text.

Usage: python examples/search/make_tasks.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from make_models import HELD_OUT, SEED, texts

QUESTIONS = 200
CHOICES = 4


def sums(draw: random.Random) -> dict[str, object]:
    """Ask for a sum or a product; the wrong answers are near the right one."""
    a, b = draw.randrange(100), draw.randrange(100)
    sign, right = ("+", a + b) if draw.random() < 0.5 else ("*", a * b)
    near = [right + d for d in (-11, -10, -2, -1, 1, 2, 10, 11) if right + d >= 0]
    return question(draw, f"{a} {sign} {b} =", [f" {n}" for n in (right, *draw.sample(near, 3))])


def continuation(text: str, draw: random.Random) -> dict[str, object]:
    """Ask which of four lines of like length goes on after some lines of the text."""
    lines = [line for line in text.splitlines() if len(line.strip()) > 20]
    start = draw.randrange(len(lines) - 4)
    before, right = "\n".join(lines[start : start + 3]), lines[start + 3]
    near = {line: abs(len(line) - len(right)) for line in draw.sample(lines, 40) if line != right}
    others = sorted(near, key=lambda line: (near[line], line))
    return question(draw, before + "\n", [right, *others[: CHOICES - 1]])


def question(draw: random.Random, text: str, choices: list[str]) -> dict[str, object]:
    """Return a question whose first choice is the right one, shuffled."""
    order = list(range(CHOICES))
    draw.shuffle(order)
    return {"text": text, "choices": [choices[i] for i in order], "answer": order.index(0)}


def main(folder: Path) -> None:
    """Write one data file and one lm-eval task for each kind of text."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = texts()
    draw = random.Random(SEED)
    held_out = {name: text[-int(len(text) * HELD_OUT) :] for name, text in corpus.items()}
    for name in corpus:
        made = [
            sums(draw) if name == "arithmetic" else continuation(held_out[name], draw)
            for _ in range(QUESTIONS)
        ]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in made))
        task = {
            "task": f"our_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        (folder / f"our_{name}.yaml").write_text(yaml.safe_dump(task))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

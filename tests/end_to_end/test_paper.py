"""The reproduction of the paper: its tasks, its configs, and the whole of it at toy size."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_dare.diagnostics.checking import check_file
from paper import __main__ as program
from paper import measure, merges, models, reinforced, tasks
from paper.settings import FULL, TOY
from tests.running import PROJECT


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", [*tasks.DECODER_TASKS, tasks.OTHER_TASK])
def test_answers_of_decoder_tasks(name: str) -> None:
    batch = tasks.decoder_batch([name], 200, generator(), right=1.0, held_out=False)
    n = tasks.DIGITS
    for row, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        digits = [token - tasks.FIRST_DIGIT for token in row[2 : 2 + n]]
        answer = [token - tasks.FIRST_DIGIT for token in row[3 + n :]]
        expected = {
            "reverse": digits[::-1],
            "sort": sorted(digits),
            "sums": [sum(digits[: i + 1]) % 10 for i in range(n)],
            "differences": [(digits[i] - digits[i - 1]) % 10 for i in range(n)],
        }
        assert answer == expected[name]
        assert labels[: 3 + n] == [tasks.IGNORED] * (3 + n)
        assert labels[3 + n :] == row[3 + n :]


@pytest.mark.parametrize("name", tasks.ENCODER_TASKS)
def test_labels_of_encoder_tasks(name: str) -> None:
    batch = tasks.encoder_batch([name], 900, generator(), right=1.0, held_out=False)
    for row, label in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        pairs = [divmod(token - tasks.FIRST_PAIR, 10) for token in row[2:]]
        by_letter = [[digit for letter, digit in pairs if letter == x] for x in range(3)]
        values = {
            "most": [len(digits) for digits in by_letter],
            "heaviest": [sum(digits) for digits in by_letter],
            "largest": [max(digits, default=-1) for digits in by_letter],
        }[name]
        assert label == values.index(max(values))
    counts = Counter(batch.labels.tolist())
    assert all(150 < counts[label] < 500 for label in range(3))  # no label is a good guess


def test_wrong_targets_and_held_out_items() -> None:
    """40 % of pre-training's targets are right; 4.9 standard deviations of 4,000 items."""
    for draw, names in (
        (tasks.decoder_batch, list(tasks.DECODER_TASKS)),
        (tasks.encoder_batch, list(tasks.ENCODER_TASKS)),
    ):
        right = draw(names, 4000, generator(), right=1.0, held_out=False)
        mixed = draw(names, 4000, generator(), right=tasks.RIGHT, held_out=False)
        assert torch.equal(right.tokens[:, :9], mixed.tokens[:, :9])
        same = (right.labels == mixed.labels).reshape(4000, -1).all(1).double().mean()
        assert abs(float(same) - tasks.RIGHT) < 4.9 * (0.24 / 4000) ** 0.5
        tests = draw(names, 4000, generator(), right=1.0, held_out=True)
        question = slice(2, 9 if draw is tasks.decoder_batch else None)
        trained = {tuple(row) for row in right.tokens[:, question].tolist()}
        assert not trained & {tuple(row) for row in tests.tokens[:, question].tolist()}


def test_configs_are_clean(tmp_path: Path) -> None:
    families = [*models.decoders(FULL), models.encoder(FULL)]
    rows = merges.rows(families, FULL)
    assert len(set(rows)) == len(rows)
    one_of_each = {(row.study, row.method, row.scaling): row for row in rows}
    path = tmp_path / "config.yml"
    for row in one_of_each.values():
        path.write_text(yaml.safe_dump(merges.config_of(row, tmp_path)))
        found = [f for f in check_file(str(path)) if "nothing is dropped" not in f.message]
        assert found == [], row
    for row in reinforced.rows(models.middle_decoder(families), FULL):
        path.write_text(yaml.safe_dump(reinforced.config_of(row, tmp_path)))
        found = [f for f in check_file(str(path)) if "nothing is dropped" not in f.message]
        assert found == [], row


def test_readme_has_the_table_of_the_committed_results() -> None:
    summary = (PROJECT / "examples" / "paper" / "results" / "summary.md").read_text()
    table = summary.split("\n\n")[1]
    assert table.startswith("| model | method | base |")
    readme = (PROJECT / "examples" / "paper" / "README.md").read_text()
    assert table in readme
    of_reinforced = PROJECT / "examples" / "paper" / "results" / "reinforced.md"
    for table in of_reinforced.read_text().split("\n\n")[1::2]:
        assert table.strip() in readme


@pytest.mark.slow
def test_all_of_it_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, results = tmp_path / "work", tmp_path / "results"
    program.reproduce(TOY, folder, results)
    assert {path.name for path in results.iterdir()} == {
        "scores.csv",
        "summary.md",
        "inspect.json",
        "drop_rates.png",
        "width.png",
        "merges.png",
        "deltas.png",
        "reinforced.csv",
        "reinforced.md",
    }
    families = [*models.decoders(TOY), models.encoder(TOY)]
    rows = merges.rows(families, TOY)
    with (results / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    unmerged = [line for line in lines if line["study"] == "unmerged"]
    assert len(unmerged) == 3 * 4 * 3 + 5 * 4
    merged = {tuple(line[key] for key in ("study", "family", "models")) for line in lines}
    assert {(row.study, row.family, row.models) for row in rows} <= merged
    several = (merges.MERGE, merges.ROUND)
    assert len(lines) - len(unmerged) == sum(3 if row.study in several else 1 for row in rows)
    assert all(0 <= float(line["score"]) <= 100 for line in lines)
    tables = (results / "summary.md").read_text()
    for words in (
        "by drop rate",
        "by width",
        "fine-tuned weights themselves",
        "verdict",
        "Merges",
        "gently",
    ):
        assert words in tables

    # Once more: nothing is trained or merged again but what is missing, and results are the same.
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(models, "_train", forbidden)
    scores = folder / "scores.jsonl"
    scores.write_text(scores.read_text()[:-20])  # stopped while it wrote the last line
    csv_before = (results / "scores.csv").read_bytes()
    program.reproduce(TOY, folder, results)
    assert (results / "scores.csv").read_bytes() == csv_before
    monkeypatch.setattr(measure, "merge", forbidden)
    program.reproduce(TOY, folder, results)
    assert (results / "summary.md").read_text() == tables

"""Weights without labels: the score, the coordinate search, the files, and all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from search import SearchError
from search.agreement import coordinates, judged, measure, score, texts
from search.agreement.config import Merge, arguments
from search.agreement.in_memory import Models
from search.agreement.listening import Listener, tokenized
from search.agreement.score import By
from search.searching import Wanted, search
from tests import zoo
from tests.running import Config, dare, merge_yaml, write

PROBABILITIES = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]


def logits(probabilities: list[list[float]]) -> torch.Tensor:
    return torch.tensor(probabilities).log() + 3  # any constant


def test_same_is_whether_the_most_likely_is_the_same() -> None:
    said = score.said(logits(PROBABILITIES))
    found = score.agreements(said, logits([[0.4, 0.35, 0.25], [0.5, 0.1, 0.4]]), By.SAME)
    assert found.tolist() == [1, 0]


def test_divergence_is_that_from_the_model_to_the_merge() -> None:
    merge = [[0.25, 0.25, 0.5], [0.1, 0.1, 0.8]]
    found = score.agreements(score.said(logits(PROBABILITIES)), logits(merge), By.DIVERGENCE)
    divergence = 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4)
    assert found.tolist() == pytest.approx([1 - divergence, 1], abs=1e-6)


def test_the_least_likely_outputs_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "MOST_LIKELY", 1)
    said = score.said(logits(PROBABILITIES))
    found = score.agreements(said, logits([[0.25, 0.7, 0.05], [0.2, 0.0, 0.8]]), By.DIVERGENCE)
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.tolist() == pytest.approx([1 - divergence, 1], abs=1e-6)


def test_score_by_hand() -> None:
    """(0.8 - 0.6) / 0.4 and (0.2 - 0.5) / 0.5, and their mean."""
    found = score.shares({"a": 0.8, "b": 0.2}, {"a": 0.6, "b": 0.5})
    assert found == pytest.approx({"a": 0.5, "b": -0.6})
    assert score.mean(found) == pytest.approx(-0.05)


def test_texts_that_tell_nothing() -> None:
    with pytest.raises(SearchError, match="on the texts of b, the base says all that b says; give"):
        score.shares({"a": 0.5, "b": 1.0}, {"a": 0.5, "b": 1.0})


def test_coordinate_search_finds_the_top() -> None:
    top = {"a": 0.25, "b": 0.625, "c": 1 / 6}
    asked: list[dict[str, float]] = []

    def of(weights: dict[str, float]) -> float:
        asked.append(weights)
        return -sum((weights[name] - top[name]) ** 2 for name in top)

    found = coordinates.search(of, "abc", 100)
    assert found == pytest.approx(top, abs=1 / 24)  # of the last step
    assert asked[0] == dict.fromkeys("abc", 0.3333)
    assert len(asked) < 40
    assert len({tuple(weights.values()) for weights in asked}) == len(asked)
    assert min(min(weights.values()) for weights in asked) >= 0


def test_coordinate_search_stops_with_the_best() -> None:
    count = 0

    def of(weights: dict[str, float]) -> float | None:
        nonlocal count
        count += 1
        return weights["a"] if weights["a"] < 0.8 else None

    found = coordinates.search(of, "ab", 5)
    assert count == 5
    assert found == {"a": 0.75, "b": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["docs"], "--agree docs: write NAME=FILE, such as docs=docs.jsonl"),
        (["=docs.jsonl"], "--agree =docs.jsonl: write NAME=FILE"),
        (["a=1.jsonl", "a=2.jsonl"], "--agree has a twice"),
    ],
)
def test_options_that_are_no_texts(options: list[str], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        texts.parse(options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("word", "texts.jsonl:2 is not JSON"),
        ('["word"]', "texts.jsonl:2 must be an object with"),
        ('{"text": ""}', "neither may be empty"),
        ('{"input_ids": [1, "2"]}', "a list of token ids"),
    ],
)
def test_lines_that_are_no_texts(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "right"}}\n{line}\n')
    with pytest.raises(SearchError, match=message) as error:
        texts.read(path)
    assert "\n" not in str(error.value)


def test_files_without_texts(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="cannot be read"):
        texts.read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SearchError, match="has no texts"):
        texts.read(tmp_path / "empty.jsonl")


def test_texts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a b", "label": 3}\n\n{"input_ids": [4, 5]}\n')
    assert texts.read(path).items == ["a b", [4, 5]]


def with_slices(config: Config) -> None:
    config["slices"] = config.pop("models")


def with_a_gradient(config: Config) -> None:
    config["models"][0]["parameters"]["density"] = [0.1, 0.9]


def with_an_adapter(config: Config) -> None:
    config["models"][0]["model"] += "+adapter"


def without_a_base(config: Config) -> None:
    del config["base_model"]


def without_weights(config: Config) -> None:
    config["merge_method"] = "slerp"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_slices, "a config with models: a list of them, not slices"),
        (with_a_gradient, "density is a list"),
        (with_an_adapter, "has an adapter; merge it into its model first"),
        (without_a_base, "the config needs base_model"),
        (without_weights, "slerp has no weight for each fine-tuned model"),
    ],
)
def test_configs_without_one_weight_a_model(change: Callable[[Config], None], message: str) -> None:
    config = dare(Path("models"))
    change(config)
    with pytest.raises(SearchError, match=message):
        Merge(config)


def test_parameters_of_all_models_and_of_one() -> None:
    config = dare(Path("m"), seed=3, density=0.25)
    del config["models"][1]["parameters"]["density"]
    config["parameters"]["density"] = 0.75
    assert arguments(config) == {
        "weight": {"m/a": 0.5, "m/b": 0.5},
        "density": {"m/a": 0.25, "m/b": 0.75},
        "seed": 3,
    }


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "task_arithmetic"])
def test_merges_in_memory_are_those_of_mergekit_yaml(
    llamas: Path, tmp_path: Path, method: str
) -> None:
    config = dare(llamas, method, weight=0.4) | {"dtype": "bfloat16"}
    if method == "task_arithmetic":
        for model in config["models"]:
            del model["parameters"]["density"]
    else:
        config["parameters"] = {"seed": 5, "lambda": 0.9}
    models = Models(config["base_model"], list(Merge(config).models.values()))
    in_memory = models.merged(config)
    from_files = merge_yaml(config, tmp_path)
    zoo.assert_same_tensors({name: in_memory[name] for name in from_files}, from_files)


def jsonl(path: Path, rows: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def rows_of(seed: int) -> list[list[int]]:
    """Texts of several lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, 60, (length,), generator=generator).tolist()
        for length in (5, 12, 7, 3, 9, 11, 4, 8, 10, 6)
    ]


def test_base_keeps_nothing_and_the_model_itself_all(llamas: Path, tmp_path: Path) -> None:
    paths = {name: str(llamas / name) for name in "ab"}
    models = Models(str(llamas / "base"), list(paths.values()))
    given = {
        name: texts.read(jsonl(tmp_path / f"{name}.jsonl", rows_of(place)))
        for place, name in enumerate(paths)
    }
    tokens = tokenized(models, str(llamas / "base"), given)
    found = {}
    for batch in (1, 4):  # padding changes nothing
        listener = Listener(models, paths, tokens, By.DIVERGENCE, batch)
        assert listener.shares(models.base) == pytest.approx({"a": 0, "b": 0}, abs=1e-5)
        assert listener.shares(models.tuned[paths["a"]])["a"] == pytest.approx(1, abs=1e-5)
        found[batch] = listener.shares(models.tuned[paths["b"]])
    assert found[1] == pytest.approx(found[4], abs=1e-3)
    jsonl(tmp_path / "a.jsonl", [[1, 10**6]])
    with pytest.raises(SearchError, match=r"a\.jsonl has token 1000000, but the base has"):
        tokenized(models, str(llamas / "base"), {"a": texts.read(tmp_path / "a.jsonl")})


def wanted(config: Config, tmp_path: Path, **others: Any) -> Wanted:
    agree = [
        f"{name}={jsonl(tmp_path / f'{name}.jsonl', rows_of(place))}"
        for place, name in enumerate("ab")
    ]
    fields: dict[str, Any] = {
        "folder": tmp_path / "found",
        "evaluations": 6,
        "agree": agree,
    } | others
    return Wanted(config=Path(write(config, tmp_path / "in.yml")), **fields)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"grid": ["x=1"]}, "--agree and --grid do not go together"),
        ({"score": "true"}, "--agree and --score do not go together"),
        ({"agree": ["a=none.jsonl"]}, "model b has no texts; add --agree b=FILE"),
        ({"agree": ["c=none.jsonl"]}, "--agree has c, but the config's models are a, b"),
    ],
)
def test_what_does_not_go_together(
    llamas: Path, tmp_path: Path, others: dict[str, Any], message: str
) -> None:
    with pytest.raises(SearchError, match=message):
        search(wanted(dare(llamas), tmp_path, **others))


@pytest.mark.slow
def test_search_goes_on_and_its_best_can_be_merged(
    llamas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = wanted(dare(llamas, "dare_linear"), tmp_path)
    search(replace(asked, evaluations=3))
    assert "from scores.jsonl" not in capsys.readouterr().out
    search(asked)
    out = capsys.readouterr().out
    assert out.count("from scores.jsonl") == 3
    assert "Equal shares: a " in out
    scored = [json.loads(line) for line in (asked.folder / "scores.jsonl").open()]
    assert scored[0]["point"] == {"a": 0.5, "b": 0.5}
    best = max(scored, key=lambda each: float(each["score"]))
    config = yaml.safe_load((asked.folder / "best.yml").read_text())
    assert config == yaml.safe_load(best["config"])
    assert [m["parameters"]["weight"] for m in config["models"]] == list(best["point"].values())
    merge_yaml(config, tmp_path / "merged")

    jsonl(tmp_path / "a.jsonl", rows_of(7))  # other texts: nothing of this is still true
    search(replace(asked, evaluations=1))
    assert "from scores.jsonl" not in capsys.readouterr().out


@pytest.mark.slow
def test_measurement_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged, "EVALUATIONS", 2)
    monkeypatch.setattr(measure, "FOLDER", tmp_path)  # no example models
    arguments = ["measure", "--toy", "--folder", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", [*arguments, "--results", str(tmp_path)])
    measure.main()
    lines = (tmp_path / "measured.csv").read_text().splitlines()
    assert measure.table(measure.read(tmp_path / "measured.csv"))
    assert len(lines) == 1 + 2 * (3 + 2 * 2 + 2 + 4 * 3)  # families, ways

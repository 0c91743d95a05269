"""The search example: grids, the score command, scores that are kept, and all of it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from search import SearchError, evaluation, grid, report
from search.evaluation import Evaluator
from search.scores import Scored, Scores
from search.searching import Wanted, search
from tests.running import PROJECT, Config, dare, merge_yaml, write

SEARCH = PROJECT / "examples" / "search"
HASH = """
import hashlib, pathlib, sys
text = (pathlib.Path(sys.argv[1]) / "model.safetensors").read_bytes()
print("loaded", file=sys.stderr)
print("merge number", int(hashlib.sha256(text).hexdigest()[:6], 16))
"""


def number_of(folder: Path) -> int:
    """Return what HASH prints: a number that only one merge has."""
    text = (folder / "model.safetensors").read_bytes()
    return int(hashlib.sha256(text).hexdigest()[:6], 16)


def command(tmp_path: Path, script: str = HASH) -> str:
    """Return a score command that runs a script on the model."""
    path = tmp_path / "score.py"
    path.write_text(script)
    return shlex.join(["python", str(path)]) + " {model}"


def with_placeholders(llamas: Path, **parameters: Any) -> Config:
    config = dare(llamas, **({"lambda": "$lambda"} | parameters))
    for model in config["models"]:
        model["parameters"]["density"] = "$density"
    return config


def wanted(config: Config, tmp_path: Path, **others: Any) -> Wanted:
    path = Path(write(config, tmp_path / "in.yml"))
    axes = ["lambda=0.5:1.0:0.5", "density=0.3,0.6"]
    if "score" not in others:
        others["score"] = command(tmp_path)
    return replace(Wanted(path, tmp_path / "found", grid=axes), **others)


@pytest.fixture
def no_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(*_: Any) -> None:
        raise AssertionError("there is nothing to merge")

    monkeypatch.setattr(evaluation, "merge", merge)


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("lambda=0.2:1.0:0.2", [0.2, 0.4, 0.6, 0.8, 1.0]),
        ("x=1:7:3", [1, 4, 7]),
        ("x=1.0:0.0:-0.4", [1.0, 0.6, 0.2]),
        ("x=0.1,0.3, 1", [0.1, 0.3, 1]),
        ("x=1e-5,0:0.2:0.1,0.1", [1e-5, 0.0, 0.1, 0.2]),
        ("x=random,magnitude,true", ["random", "magnitude", True]),
        ("x=./a=b,C:\\model", ["./a=b", "C:\\model"]),
    ],
)
def test_values_of_an_axis(axis: str, values: list[Any]) -> None:
    (found,) = grid.parse([axis]).values()
    assert found == values
    assert list(map(type, found)) == list(map(type, values))


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["lambda"], "write name=value,value or name=start:stop:step"),
        (["a=1,"], "no value before or after a comma"),
        (["a=1:2"], "a range is start:stop:step"),
        (["a=1:2:0"], "step is not 0"),
        (["a=2:1:0.5"], "give no value"),
        (["a=0:1:1e-9"], "over 10,000 values"),
        (["a=0:200:1", "b=0:200:1"], "40,401 points"),
        (["a=nan"], "not a finite number"),
        (["a=1", "a=2"], "a twice"),
    ],
)
def test_errors_of_an_axis(axes: list[str], words: str) -> None:
    with pytest.raises(SearchError, match=r"^--grid ") as error:
        grid.parse(axes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_arrive_as_numbers() -> None:
    text = "a: $x\nb: {c: $x, d: [$x, 1]}\ne: ./step-$n/$x\nf: '$s' # $comment\n"
    filled = grid.fill(yaml.safe_load(text), {"x": 1e-05, "n": 3, "s": "random"})
    inner = {"c": 1e-05, "d": [1e-05, 1]}
    expected = {"a": 1e-05, "b": inner, "e": "./step-3/1e-05", "f": "random"}
    assert filled == expected
    assert yaml.safe_load(evaluation.as_text(filled, 1)) == expected
    grid.check_names(yaml.safe_load(text), {"x": [1], "n": [3], "s": ["random"]})


def test_points_are_all_combinations() -> None:
    words = [grid.in_words(point) for point in grid.points(grid.parse(["a=1,2", "b=x,y"]))]
    assert words == ["a=1 b=x", "a=1 b=y", "a=2 b=x", "a=2 b=y"]


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"grid": ["lambda=1"]}, "the config has $density, but --grid has no values for density"),
        (
            {"grid": ["lambda=1", "density=1", "t=1"]},
            "--grid has t, but $t is nowhere in the config",
        ),
        ({"score": None}, "there is no score: give a command"),
        ({"score": "python score.py"}, "{model}, the merged model's folder, is missing"),
        ({"score": "no-such-program {model}"}, "there is no program no-such-program"),
        ({"score": "python 'score.py {model}"}, "this is no command"),
        ({"merge_options": ("--cudda",)}, "--merge-options: No such option"),
        ({"grid": ["lambda=1", "density=0.5,1.5"]}, "density"),
        ({"ray": True}, "--ray is for a genome"),
    ],
)
@pytest.mark.usefixtures("no_merge")
def test_mistakes_are_found_before_any_work(
    llamas: Path, tmp_path: Path, others: dict[str, Any], words: str
) -> None:
    with pytest.raises(SearchError) as error:
        search(wanted(with_placeholders(llamas), tmp_path, **others))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "found" / "scores.jsonl").exists()


@pytest.mark.usefixtures("no_merge")
def test_configs_that_cannot_be_searched(llamas: Path, tmp_path: Path) -> None:
    for config, words in (
        (dare(llamas), "the config has no placeholder"),
        (dare(llamas / "none", seed="$seed"), "none"),
    ):
        axes = ["seed=1,2"] if "none" in words else []
        with pytest.raises(SearchError, match=words):
            search(wanted(config, tmp_path, grid=axes))
    for text in ("a: [", "- 1", "a: 1\n---\na: 2\n"):
        (tmp_path / "bad.yml").write_text(text)
        with pytest.raises(SearchError, match=r"bad\.yml"):
            search(Wanted(tmp_path / "bad.yml", tmp_path / "found"))


def test_a_grid_is_searched_and_not_searched_again(
    llamas: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = wanted(with_placeholders(llamas), tmp_path)
    search(asked)
    out = capsys.readouterr().out
    found = tmp_path / "found"
    assert {path.name for path in found.iterdir()} == {"scores.jsonl", "best.yml", "scores.png"}
    lines = [json.loads(line) for line in (found / "scores.jsonl").read_text().splitlines()]
    assert [line["point"] for line in lines] == grid.points(grid.parse(asked.grid))
    best = max(lines, key=lambda line: line["score"])
    table = out[out.index("seconds\n") :].splitlines()
    assert table[1].split()[:2] == [str(value) for value in best["point"].values()]

    # Everything that the best was made of is in its file.
    config = yaml.safe_load((found / "best.yml").read_text())
    assert config["parameters"] == {"seed": 42, "lambda": best["point"]["lambda"]}
    merge_yaml(config, tmp_path / "again")
    assert number_of(tmp_path / "again" / "out") == best["score"]

    merge = evaluation.merge
    merged = []

    def counted(config: str, *others: Any) -> None:
        merged.append(yaml.safe_load(config)["parameters"]["lambda"])
        merge(config, *others)

    monkeypatch.setattr(evaluation, "merge", counted)
    search(asked)
    assert merged == []
    assert "[4/4] lambda=1.0 density=0.6" in (again := capsys.readouterr().out)
    assert again.count("from scores.jsonl") == 4
    assert again[again.index("seconds\n") :] == out[out.index("seconds\n") :]
    search(wanted(with_placeholders(llamas), tmp_path, grid=["lambda=0.5,0.7", "density=0.3"]))
    assert merged == [0.7]
    (tmp_path / "other").mkdir()
    search(wanted(with_placeholders(llamas), tmp_path, score=command(tmp_path / "other")))
    assert merged == [0.7, 0.5, 0.5, 1.0, 1.0]


def test_what_was_scored_before_an_error_is_kept_and_reported(
    llamas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    script = HASH + f"sys.exit('no room' if pathlib.Path({str(full)!r}).exists() else 0)"
    asked = wanted(with_placeholders(llamas), tmp_path, score=command(tmp_path, script))
    search(replace(asked, grid=["lambda=0.5", "density=0.3"]))
    full.touch()
    with pytest.raises(SearchError, match=r"failed with exit code 1(?s:.)*no room"):
        search(asked)
    assert "best of 1" in (tmp_path / "found" / "best.yml").read_text()
    assert not list((tmp_path / "found").glob("merged-*"))
    assert "The best config" in capsys.readouterr().out
    full.unlink()
    search(asked)
    assert len((tmp_path / "found" / "scores.jsonl").read_text().splitlines()) == 4


def test_the_seed_is_in_the_config_where_the_method_takes_one() -> None:
    with_seed = evaluation.as_text({"merge_method": "dare_linear"}, 7)
    assert yaml.safe_load(with_seed)["parameters"] == {"seed": 7}
    kept = evaluation.as_text({"merge_method": "dare_ties", "parameters": {"seed": 1}}, 7)
    assert yaml.safe_load(kept)["parameters"] == {"seed": 1}
    without = evaluation.as_text({"merge_method": "della"}, 7)
    assert yaml.safe_load(without) == {"merge_method": "della"}
    assert evaluation.options_for(with_seed, ["--cuda"]) == ["--cuda"]
    assert evaluation.options_for(without, ["--cuda"]) == ["--random-seed", "42", "--cuda"]


@pytest.mark.parametrize(
    ("printed", "score"),
    [
        ("0.5", 0.5),
        ("loading 7\\naccuracy: 56.3%\\n\\n", 56.3),
        ("docs 1.5, mean -2.5e-3", -2.5e-3),
        ("{\\'acc\\': .25}", 0.25),
        ("loss nan", None),
        ("1 -inf", None),
    ],
)
def test_the_last_number_of_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, score: float | None
) -> None:
    monkeypatch.setattr(evaluation, "merge", lambda *_: None)
    line = command(tmp_path, f"import sys\nprint('{printed}')\nprint('12', file=sys.stderr)")
    assert Evaluator(line, tmp_path).score("merge_method: linear") == score


def test_commands_that_give_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "merge", lambda *_: None)
    for script, words in (
        ("raise ValueError('bad model')", "failed with exit code 1"),
        ("print('1')\nprint('bad model')", "printed no number in its last line"),
        ("pass", "printed no number in its last line"),
    ):
        with pytest.raises(SearchError) as error:
            Evaluator(command(tmp_path, script), tmp_path).score("merge_method: linear")
        first, last, *_ = str(error.value).split("\n")
        assert words in first
        assert first.endswith("score.py {model}")
        assert ("bad model" in str(error.value)) == ("bad model" in script)
        assert last.startswith("The last of what it printed:")


def test_scores_are_whole_whenever_one_looks(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    scores = Scores(path)
    scores.add(Scored({"a": 1}, 0.5, 1.0, "x {model}", "config"))
    scores.add(Scored({"a": 2}, None, 1.0, "x {model}", "other"))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]
    again = Scores(path)
    assert again.get("config", "x {model}") == Scored({"a": 1}, 0.5, 1.0, "x {model}", "config")
    assert again.get("other", "x {model}") is not None
    assert again.get("config", "y {model}") is None
    path.write_text(path.read_text() + '{"point": \n')
    with pytest.raises(SearchError, match=r"scores.jsonl:3 is not a score"):
        Scores(path)


def test_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values: list[Any] = ["random", True, 0.5]
    scores = [None if i == 3 else float(i) for i in range(30)]
    found = [
        Scored({"x": values[i % 3], "y": 30 - i}, score, 1.0, "s", f"n: {i}\n")
        for i, score in enumerate(scores)
    ]
    report.write(found, tmp_path, minimize=True)
    assert yaml.safe_load((tmp_path / "best.yml").read_text()) == {"n": 0}
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert "and 10 more" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.write(found, tmp_path, minimize=False)
    assert yaml.safe_load((tmp_path / "best.yml").read_text()) == {"n": 29}
    assert "for want of matplotlib" in capsys.readouterr().out
    last = sorted(found, key=lambda scored: report.rank(scored.score, minimize=False))[-1]
    assert last.score is None


@contextmanager
def started(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(SEARCH), *arguments],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_and_on(llamas: Path, tmp_path: Path) -> None:
    """The program itself: stopped while it scores the second merge, and started again."""
    asked = wanted(with_placeholders(llamas), tmp_path)
    slow = f"""
import time
folder = pathlib.Path({str(tmp_path)!r})
if (folder / "one").exists() and not (folder / "go").exists():
    (folder / "here").touch()
    time.sleep(600)
(folder / "one").touch()
"""
    line = command(tmp_path, HASH.replace("\ntext", slow + "text"))
    arguments = ["in.yml", "--grid", *asked.grid, "--score", line]
    with started(*arguments, cwd=tmp_path) as process:
        end = time.monotonic() + 200
        while not (tmp_path / "here").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        folder = tmp_path / "in-search"
        assert len(list(folder.glob("merged-*/model.safetensors"))) == 1
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.endswith("Stopped. The same command goes on from here.\n")
    assert "best of 1" in (folder / "best.yml").read_text()
    assert {path.name for path in folder.iterdir()} == {"scores.jsonl", "best.yml", "scores.png"}
    (tmp_path / "go").touch()
    with started(*arguments, cwd=tmp_path) as process:
        out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert out.count("from scores.jsonl") == 1
    assert "Merge it: mergekit-yaml in-search/best.yml out/" in out
    assert len((folder / "scores.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_the_example_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config and its score, on models of its architecture that were hardly trained."""
    import make_models

    monkeypatch.setattr(make_models, "FOLDER", tmp_path / "examples" / "models")
    monkeypatch.setattr(make_models, "BASE_STEPS", 3)
    monkeypatch.setattr(make_models, "TUNED_STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["make_models.py"])
    make_models.main()
    line = shlex.join(["python", str(SEARCH / "score_example.py")]) + " {model}"
    axes = ["lambda=0.5,1.0", "density=0.5"]
    arguments = [str(SEARCH / "example.yml"), "--grid", *axes, "--score", line, "--minimize"]
    with started(*arguments, cwd=tmp_path) as process:
        out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    lines = [json.loads(each) for each in (tmp_path / "example-search/scores.jsonl").open()]
    assert [each["point"]["lambda"] for each in lines] == [0.5, 1.0]
    assert all(5 < each["score"] < 8 for each in lines)  # ln 1,024 is 6.9
    assert "[2/2] lambda=1.0 density=0.5" in out

"""The example configs on models of the example's architecture."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import zoo
from tests.running import PROJECT, merge_yaml

EXAMPLES = sorted((PROJECT / "examples").glob("*.yml"))


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PROJECT / "examples")
    spec = importlib.util.spec_from_file_location(name, PROJECT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_models_are_made_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script itself, with a few training steps instead of hundreds."""
    script = load_script("make_models", monkeypatch)
    show = load_script("show_merge", monkeypatch)
    monkeypatch.setattr(script, "FOLDER", tmp_path / "examples" / "models")
    monkeypatch.setattr(script, "BASE_STEPS", 3)
    monkeypatch.setattr(script, "TUNED_STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["make_models.py"])
    script.main()
    names = ["base", "docs", "code", "arithmetic"]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    trained = {row[0]: row for row in rows if row[0] in names}
    folders = {name: tmp_path / "examples" / "models" / name for name in names}
    base = zoo.load(folders["base"])
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert type(model).__name__ == "LlamaForCausalLM"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = "def f(x):\n    return x + 12\n"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        if name != "base":
            assert zoo.moved(zoo.load(folder), base) > 0.2
    assert not list(folders["base"].parent.glob("*.unfinished"))
    script.main()
    assert "already exist" in capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    for example in EXAMPLES:
        config = yaml.safe_load(example.read_text())
        merge_yaml(config, tmp_path / example.stem)
        show.main(tmp_path / example.stem / "out")
        *_, heading, of_base, of_merge, last = capsys.readouterr().out.splitlines()
        assert heading.split() == ["loss", *names[1:]]
        assert of_base.split() == trained["base"]
        assert of_merge.split()[0] == "merge"
        assert of_merge.split()[1:] != trained["base"][1:]
        combine = "TIES" if config["merge_method"] == "dare_ties" else "linear"
        assert re.search(rf"was merged by DARE-{combine} \(mergekit-dare .* LlamaForCaus", last)

    adapters = load_script("adapters", monkeypatch)
    monkeypatch.setattr(adapters, "FOLDER", tmp_path / "examples" / "models")
    monkeypatch.setattr(adapters, "STEPS", 2)
    monkeypatch.setattr(adapters, "DENSITIES", (0.5,))
    monkeypatch.setattr(adapters, "RANKS", (8, 256))
    adapters.main()
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[-6:]]
    assert [row[:2] for row in rows] == [
        [title, rank]
        for title in ("adapters, density 0.5", "dare.yml")
        for rank in ("all", "8", "256")
    ]
    lost = [int(row[2].removesuffix("%")) for row in rows]
    assert lost[0] == lost[2] == lost[3] == lost[5] == 0
    assert lost[1] > 50
    assert lost[4] > 50


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_weights_of_the_examples_make_an_average(example: Path) -> None:
    """Of weights of 0.7 each, the example's merge was worse than its base on one of the texts."""
    config = yaml.safe_load(example.read_text())
    weights = [model["parameters"]["weight"] for model in config["models"]]
    shared = config["parameters"]
    total = 1.0 if shared.get("normalize") else sum(weights)
    assert total * shared.get("lambda", 1.0) == pytest.approx(1, abs=0.02)


def test_examples_are_there() -> None:
    assert [path.name for path in EXAMPLES] == ["dare.yml", "dare_linear.yml"]

"""``explain`` against what mergekit plans and what the methods are called with."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from safetensors.torch import save_file

from mergekit_dare.cli import main
from mergekit_dare.diagnostics.plan import grouping, patterns
from mergekit_dare.plugin.methods import DareMethod
from tests import zoo
from tests.running import Config, dare, merge_yaml, write

LAYERS = 6
WORDS = ["mlp", "self_attn", "q_proj", "layers.1.", "norm", "embed", "lm_head", "*", "none"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    zoo.make_family(zoo.llama_of(num_hidden_layers=LAYERS), folder)
    return folder


def explain(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def as_json(config: Config, folder: Path, *arguments: str) -> dict[str, Any]:
    result = explain(write(config, folder / "c.yml"), "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def as_text(config: Config, folder: Path, *arguments: str) -> str:
    result = explain(write(config, folder / "c.yml"), *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def number(draw: random.Random) -> Any:
    """A value or a gradient."""
    values = [round(draw.random(), 2) for _ in range(draw.choice([1, 2, 2, 3, 5]))]
    return values[0] if len(values) == 1 else values


def setting(draw: random.Random) -> Any:
    """A value, a gradient or a list of filters with either."""
    if draw.random() < 0.5:
        return number(draw)
    words = draw.sample(WORDS, draw.randint(1, 3))
    return [*({"filter": word, "value": number(draw)} for word in words), {"value": number(draw)}]


def drawn_config(models: Path, draw: random.Random, method: str) -> Config:
    names = draw.sample("abc", draw.randint(1, 3))
    entries: list[Any] = [{"model": str(models / name)} for name in names]
    shared: dict[str, Any] = {"normalize": draw.choice([True, False, [True, False]])}
    if "dare" in method:
        shared |= {"lambda": setting(draw), "seed": 1}
    config: Config = {"merge_method": method, "parameters": shared}
    config["base_model"] = str(models / "base")
    if draw.random() < 0.3:
        shared["density"] = setting(draw)
    parts: list[Config] = []
    first = 0
    while first < LAYERS:
        last = min(LAYERS, first + draw.randint(1, LAYERS))
        shift = draw.randint(0, LAYERS - last)
        sources: list[Any] = [e | {"layer_range": [first + shift, last + shift]} for e in entries]
        base = {"model": config["base_model"], "layer_range": [first, last]}
        parts.append({"sources": [base, *sources]})
        first = last
    as_slices = draw.random() < 0.5
    lists = [part["sources"][1:] for part in parts] if as_slices else [entries]
    for entry in (entry for entries in lists for entry in entries):
        entry["parameters"] = {"weight": setting(draw)}
        if draw.random() < 0.6:
            entry["parameters"]["density"] = setting(draw)
    return config | ({"slices": parts} if as_slices else {"models": entries})


@pytest.mark.parametrize("seed", range(16))
def test_the_values_are_those_that_methods_are_called_with(
    seed: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    method = draw.choice(["dare_linear", "dare_ties", "task_arithmetic"])
    config = drawn_config(models, draw, method)
    found = as_json(config, tmp_path)
    calls: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for kind in (DareMethod, GeneralizedTaskArithmeticMerge):

        def recorded(
            self: Any, group: TensorGroup, /, _own: Any = kind.merge_group, **p: Any
        ) -> Any:
            calls[str(group.metadata.name)] = [str(entry.id) for entry in group.entries], p
            return _own(self, group, **p)

        monkeypatch.setattr(kind, "merge_group", recorded)
    merged = merge_yaml(config, tmp_path)
    base = zoo.load(models / "base")
    assert found["tensors"].keys() == calls.keys() == merged.keys()
    for name, tensor in found["tensors"].items():
        entries, parameters = calls[name]
        assert list(tensor["models"]) == entries
        for model, values in tensor["models"].items():
            expected = {
                key: {str(m): v for m, v in value.items()}[model]
                for key, value in parameters.items()
                if hasattr(value, "items") and model in {str(m) for m in value}
            }
            assert values == expected
        assert tensor["shared"] == {k: v for k, v in parameters.items() if not hasattr(v, "items")}
        assert tensor["shape"] == list(merged[name].shape)
        assert tensor["dtype"] == str(merged[name].dtype).removeprefix("torch.")
        # What is said to be as in the base model is: that of the layer that is taken from it.
        if tensor["as_in_base"]:
            assert torch.equal(merged[name], base[tensor["from"][config["base_model"]]])
        elif method == "task_arithmetic" and "norm" not in name:  # 1 + delta is rounded to 1
            assert not torch.equal(merged[name], base[tensor["from"][config["base_model"]]])
    check_groups(found)


def check_groups(found: dict[str, Any]) -> None:
    """Each tensor is in one group, whose values hold its own."""
    tensors = found["tensors"]
    assert found["parameters"] == sum(math.prod(t["shape"]) for t in tensors.values())
    assert found["parameters"] == sum(group["parameters"] for group in found["groups"])
    seen: list[str] = []
    for group in found["groups"]:
        matching = [
            name
            for name in tensors
            if any(patterns.compiled(p).fullmatch(name) for p in group["patterns"])
        ]
        assert len(matching) == group["tensors"]
        seen += matching
        for model, parameters in group["models"].items():
            for key, values in parameters.items():
                own = [tensors[name]["models"][model][key] for name in matching]
                if isinstance(own[0], float):
                    assert (min(own), max(own)) == (min(values), max(values))
                    assert len(values) == 1 or len(set(own)) > 1
                else:
                    assert set(own) == set(values)
        for key, values in group["shared"].items():
            assert {tensors[name]["shared"][key] for name in matching} >= set(values)
    assert sorted(seen) == sorted(tensors)


OTHERS: dict[str, Config] = {
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [{"sources": [{"model": m, "layer_range": [0, LAYERS]} for m in "ab"]}],
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
    },
    "franken": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 4]}]},
            {
                "sources": [
                    {
                        "model": "b",
                        "layer_range": [2, 6],
                        "parameters": {
                            "scale": [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]
                        },
                    }
                ]
            },
        ],
    },
    "linear": {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": [0.3, 0.7]}} for m in "ab"],
    },
    "modules": {
        "merge_method": "della",
        "base_model": "base",
        "modules": {
            "default": {
                "models": [
                    {"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}
                ],
                "parameters": {"weight": 0.25},
            }
        },
    },
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_values_are_those_of_mergekits_plan(
    kind: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    found = as_json(OTHERS[kind], tmp_path)
    config = MergeConfiguration.model_validate(OTHERS[kind])
    options = MergeOptions()
    LoaderCache().setup(options)
    donor = config.base_model or config.referenced_models()[0]
    architecture = get_architecture_info(config, options)
    tasks = MergePlanner(config, architecture, options, donor.config()).plan_to_disk("unused")
    saves = [task for task in tasks if isinstance(task, SaveTensor)]
    assert [save.tensor_name for save in saves] == list(found["tensors"])
    for save in saves:
        merge, tensor = save.tensor_task, found["tensors"][save.tensor_name]
        assert isinstance(merge, ExecuteMergeMethodTask)
        assert tensor["shared"] == dict(merge.parameters.items())
        assert tensor["models"] == {
            str(model): dict(values.items()) for model, values in merge.input_parameters.items()
        }
    check_groups(found)


def test_no_weight_is_read(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("mergekit.io.lazy_tensor_loader.LazyTensorLoader.get_tensor", refuse)
    for method in ("dare_ties", "della"):
        as_json(dare(models, method, seed=1) | {"dtype": "float32"}, tmp_path)


def test_text(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    config = dare(Path("."), names="ab", seed=42)
    config["models"][1]["parameters"] |= {
        "weight": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.5}]
    }
    lines = as_text(config | {"base_model": "./base", "dtype": "bfloat16"}, tmp_path).splitlines()
    assert lines[0].startswith("dare_ties into ./base (bfloat16), normalize false, rescale true")
    assert [line.split()[0] for line in lines[4:6]] == ["model.layers.{0-5}.mlp.*", "everything"]
    assert lines[4].endswith("weight 0.5, density 0.5  weight 0.2 to 0.8, density 0.5")
    assert lines[6].split() == ["in", "all,", "57", "tensors", "54,688"]
    assert "From ./base: config.json, tokenizer, chat template" in lines
    assert any(line.startswith("The weights add up to 0.7 to 1.3: below 1") for line in lines)
    assert all(len(line) <= 100 for line in lines)


# Weights, further parameters, and what is said of their sum.
SUMS: list[tuple[list[Any], Config, str]] = [
    ([0.3, 0.2], {}, "The weights add up to 0.5: below 1, each change enters in part."),
    ([0.1, 0.9], {}, "The weights add up to 1: at 1, that is an average of the changes."),
    ([0.49, 0.5], {}, "add up to 0.99: at about 1, that is an average of the changes."),
    ([1, 1], {}, "The weights add up to 2: above 1, that is the whole of each change."),
    ([1, 0.5], {}, "The weights add up to 1.5: above 1, that is more than an average"),
    ([1, 1], {"normalize": True}, "add up to 2, and normalize divides by their sum"),
    ([1], {}, "At weight 1, the whole of the change enters."),
    ([0.4], {}, "Of the one model's change, 0.4 times the whole enters."),
    ([0.4], {"normalize": True}, "normalize makes any weight but 0 a 1"),
    ([1, -0.5], {}, "A negative weight takes a change away."),
    ([1, 1], {"lambda": 0.5}, "In the end, lambda multiplies the merged change."),
    (
        [1, 1],
        {"rescale": False},
        "rescale is false: what is dropped of a change is not made up for.",
    ),
    ([0, 0], {}, "Everything is as in the base model: nothing is added to it."),
]


@pytest.mark.parametrize(("weights", "parameters", "sentence"), SUMS)
def test_what_sums_of_weights_mean(
    weights: list[float], parameters: Config, sentence: str, models: Path, tmp_path: Path
) -> None:
    config = dare(models, names="abc"[: len(weights)], seed=1, **parameters)
    for entry, weight in zip(config["models"], weights, strict=True):
        entry["parameters"]["weight"] = weight
    assert sentence in " ".join(as_text(config, tmp_path).split())
    other = as_text(config | {"merge_method": "ties"}, tmp_path)
    assert "add up" not in other
    assert "of the change" not in other


def test_where_layers_and_files_come_from(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    text = as_text(OTHERS["franken"], tmp_path)
    assert "Layers 0-3: from layers 0-3 of a\nLayers 4-7: from layers 2-5 of b\n" in text
    assert "From the model that mergekit meets first" in text
    text = as_text(OTHERS["slerp"], tmp_path)
    assert "Layers" not in text
    assert text.startswith("slerp of b and a, base model a (bfloat16, as stored)")
    union = OTHERS["modules"] | {"tokenizer_source": "union", "chat_template": "chatml"}
    text = as_text(union, tmp_path)
    assert "Tokenizer: the tokens of all models" in text
    assert "Chat template: mergekit's chatml" in text


def test_long_names_are_shortened(models: Path, tmp_path: Path) -> None:
    text = as_text(dare(models, seed=1), tmp_path)
    assert f"a is {models}/a\nb is {models}/b\nbase is {models}/base" in text
    assert text.count(str(models)) == 3


def test_single_tensors(models: Path, tmp_path: Path) -> None:
    config = dare(models, seed=1)
    config["models"][0]["parameters"]["weight"] = [0, 1]
    text = as_text(config, tmp_path, "--tensors", "*.{0-2}.mlp.{up,down}_proj.weight")
    rows = [line for line in text.splitlines() if line.startswith("model.layers")]
    assert len(rows) == 6
    assert rows[-1].split()[0].startswith("model.layers.2.mlp.")
    assert "weight 0.4, density 0.5" in rows[-1]
    found = as_json(config, tmp_path, "--tensors", "lm_head*")
    assert list(found["tensors"]) == ["lm_head.weight"]


def test_single_files(models: Path, tmp_path: Path) -> None:
    for pickled in (False, True):
        names = [f"{name}/model.safetensors" for name in ("a", "b")]
        if pickled:
            names[1] = "b.bin"
            torch.save(zoo.load(models / "b"), models / "b.bin")
        config = dare(models, names=names, seed=1)
        config["base_model"] = str(models / "base" / "model.safetensors")
        config["models"][0]["parameters"]["weight"] = [{"filter": "norm", "value": 1}, {"value": 0}]
        found = as_json(config, tmp_path)
        model, other = (entry["model"] for entry in config["models"])
        for name, tensor in found["tensors"].items():
            assert tensor["models"][model]["weight"] == ("norm" in name)
            assert tensor["models"][other] == {"weight": 0.5, "density": 0.5}
        check_groups(found)
        assert "mergekit-pytorch writes the tensors alone" in as_text(config, tmp_path)


def test_a_tensor_that_a_model_lacks(tmp_path: Path) -> None:
    zoo.make_family(zoo.ARCHITECTURES["bert-classification"], tmp_path, names="ab")
    name = "bert.embeddings.position_ids"  # older files have it
    for model in ("base", "a"):
        tensors = zoo.load(tmp_path / model) | {name: torch.arange(64)[None]}
        save_file(tensors, tmp_path / model / "model.safetensors")
    config = dare(tmp_path, seed=1)
    tensors = as_json(config, tmp_path)["tensors"]
    lacking = {name: tensor["without"] for name, tensor in tensors.items() if tensor["without"]}
    assert lacking == {name: [str(tmp_path / "b")]}
    assert f"and merged without it: {name}" in " ".join(as_text(config, tmp_path).split())
    assert name in merge_yaml(config, tmp_path)


def test_refusals(models: Path, tmp_path: Path) -> None:
    several = [
        dare(models, seed=1) | {"name": "one"},
        dare(models, seed=1, names=["c"]) | {"name": "two"},
    ]
    several[1]["models"][0]["model"] = "one"
    path = write(several, tmp_path / "several.yml")
    refused = {
        "choose one of these with --name": explain(path),
        "one is a merge of the same file, whose tensors are not there yet": explain(
            path, "--name", "two"
        ),
        "there is no folder": explain(write(dare(tmp_path, seed=1), tmp_path / "c.yml")),
        "density is 30, but must be from 0 to 1": explain(
            write(dare(models, density=30), tmp_path / "d.yml")
        ),
        "Missing required parameter weight for": explain(
            write(dare(models, "linear"), tmp_path / "g.yml")
        ),
        "dare_tis": explain(write(dare(models, "dare_tis"), tmp_path / "e.yml")),
        "no tensor's name matches atn": explain(
            write(dare(models), tmp_path / "f.yml"), "--tensors", "atn"
        ),
    }
    for message, result in refused.items():
        assert result.exit_code == 2, message
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stdout == ""
    assert explain(path, "--name", "one").exit_code == 0


FILTERS: dict[str, tuple[list[str], str | None]] = {
    "as they are": (["mlp", "self_attn"], None),
    "nothing": (["self_atn"], "no tensor has self_atn in its name; did you mean self_attn?"),
    "capitals": (["MLP"], "no tensor has MLP in its name; did you mean mlp?"),
    "wildcards": (["*.mlp.*"], "a filter is a part of a name, without wildcards: mlp is one"),
    "no such layer": (["layers.9."], "no tensor has layers.9. in its name; the layers are 0-5"),
    "taken": (["mlp", "up_proj"], "every tensor with up_proj in its name is taken by an entry"),
    "partly taken": (["up_proj", "mlp"], None),
    "all taken": (["mlp", "*", "up_proj"], None),  # that is unreachable-filter's
    "nothing near": (["xyz"], "no tensor has xyz in its name; mergekit-dare explain --tensors '*'"),
}


@pytest.mark.parametrize("case", FILTERS)
@pytest.mark.parametrize("place", ["model", "config", "slice", "shared", "file"])
def test_filters_that_take_nothing(case: str, place: str, models: Path, tmp_path: Path) -> None:
    words, message = FILTERS[case]
    setting = [*({"filter": word, "value": 0.5} for word in words), {"value": 1.0}]
    config = dare(models, names="a", seed=1)
    if place == "model":
        config["models"][0]["parameters"]["weight"] = setting
    elif place == "file":
        config["models"] = [
            {"model": f"{models}/a/model.safetensors", "parameters": {"weight": setting}}
        ]
        config["base_model"] += "/model.safetensors"
    elif place == "slice":
        entries = [{"model": config["base_model"]}, config.pop("models")[0]]
        sources = [entry | {"layer_range": [0, LAYERS]} for entry in entries]
        config["slices"] = [{"sources": sources, "parameters": {"density": setting}}]
    else:
        config["parameters"]["lambda" if place == "shared" else "density"] = setting
    path = write(config, tmp_path / "c.yml")
    result = CliRunner().invoke(main, ["check", "--files", path])
    found = [line for line in result.stdout.splitlines() if "[unmatched-filter]" in line]
    assert len(found) == (message is not None), result.stdout
    assert message is None or message in found[0]
    assert message is None or message in " ".join(explain(path).stdout.split())


@pytest.mark.parametrize("seed", range(20))
def test_patterns_name_just_what_they_fold(seed: int) -> None:
    draw = random.Random(seed)
    words = ["q_proj", "k_proj", "up_proj", "norm", "post_attention_layernorm", "a.b", "1", "01"]
    names = {
        ".".join(draw.choice([*words, *map(str, range(12))]) for _ in range(draw.randint(1, 5)))
        for _ in range(60)
    }
    for _ in range(10):
        chosen = set(draw.sample(sorted(names), draw.randint(1, len(names))))
        found = [patterns.compiled(p) for p in patterns.fold(sorted(chosen), sorted(names))]
        assert {n for n in names if any(p.fullmatch(n) for p in found)} == chosen


def test_patterns_are_short() -> None:
    parts = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "norm"]
    names = [f"model.layers.{n}.{part}.weight" for n in range(12) for part in parts]
    names += ["model.norm.weight", "lm_head.weight"]
    for word, expected in {
        "mlp": "model.layers.{0-11}.mlp.*",
        "proj": "model.layers.{0-11}.{self_attn,mlp}.*",
        "q_proj": "model.layers.{0-11}.self_attn.q_proj.weight",
        "layers.1": "model.layers.{1,10-11}.*",
        "layers": "model.layers.{0-11}.*",
        "": "*",
    }.items():
        assert patterns.fold([name for name in names if word in name], names) == [expected]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.5], [0.5]),
        ([0.0, 0.1, 0.2], [0.0, 0.2]),
        ([0.0, 1.0, 1.0, 0.5], [0.0, 1.0, 0.5]),
        ([1, 2, 1], [1, 2, 1]),
        ([True, False, True], [True, False]),
        (["a", "b"], ["a", "b"]),
        ([None], [None]),
    ],
)
def test_turning_points(values: list[Any], expected: list[Any]) -> None:
    assert grouping.turning_points(values) == expected

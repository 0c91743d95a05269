"""Every shape of config that mergekit documents and DARE takes.

Each merge is compared with what Python makes of the same tensors, so that a setting that does
not reach the method is noticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import zoo
from tests.running import Config, merge_multi, merge_yaml

BOTH = pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
LAYERS = zoo.LAYERS


def config(folder: Path, method: str, **settings: Any) -> Config:
    return {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / "a"), "parameters": {"weight": 0.6, "density": 0.4}},
            {"model": str(folder / "b"), "parameters": {"weight": 0.3, "density": 0.7}},
        ],
    } | settings


def expected_tensor(folder: Path, method: str, name: str, **settings: Any) -> Tensor:
    """What the Python API makes of one tensor of base, a and b."""
    tensors = [zoo.load(folder / model)[name] for model in ("base", "a", "b")]
    return merged_in_python(tensors, method, name, **settings)


def merged_in_python(tensors: list[Tensor], method: str, name: str, **settings: Any) -> Tensor:
    """Merge a base and two fine-tuned tensors with the settings of :func:`config`."""
    parameters = {"weight": [0.6, 0.3], "density": [0.4, 0.7]} | settings
    return merge_tensors(tensors, method, parameters=parameters, base_index=0, name=name)


def assert_expected(
    merged: dict[str, Tensor], folder: Path, method: str, name: str, **settings: Any
) -> None:
    expected = expected_tensor(folder, method, name, **settings)
    zoo.assert_same_tensors({name: merged[name]}, {name: expected})


def layer(index: int, part: str = "mlp.up_proj") -> str:
    return f"model.layers.{index}.{part}.weight"


@BOTH
def test_gradients_of_weight_and_density(method: str, llamas: Path, tmp_path: Path) -> None:
    settings = config(llamas, method)
    settings["models"][0]["parameters"] = {"weight": [0.2, 0.8], "density": [1, 0.5, 0.1]}
    merged = merge_yaml(settings, tmp_path)
    for index in range(LAYERS):
        t = index / (LAYERS - 1)
        weights = [(1 - t) * 0.2 + t * 0.8, 0.3]
        densities = [[1.0, 0.5, 0.1][index], 0.7]
        assert_expected(merged, llamas, method, layer(index), weight=weights, density=densities)


@BOTH
def test_filters(method: str, llamas: Path, tmp_path: Path) -> None:
    settings = config(llamas, method)
    settings["models"][0]["parameters"]["density"] = [
        {"filter": "self_attn", "value": [0.0, 1.0]},
        {"filter": "mlp", "value": 0.2},
        {"value": 0.9},
    ]
    merged = merge_yaml(settings, tmp_path)
    for name, density in [
        (layer(0, "self_attn.q_proj"), 0.0),
        (layer(1, "self_attn.q_proj"), 0.5),
        (layer(2, "self_attn.q_proj"), 1.0),
        (layer(1), 0.2),
        ("model.norm.weight", 0.9),
    ]:
        assert_expected(merged, llamas, method, name, density=[density, 0.7])


@BOTH
def test_global_parameters_and_their_precedence(method: str, llamas: Path, tmp_path: Path) -> None:
    settings = config(llamas, method)
    settings["models"][0]["parameters"] = {"weight": 0.6}
    settings["models"][1]["parameters"] = None
    settings["parameters"] = {
        "weight": 0.25,
        "density": 0.5,
        "normalize": True,
        "rescale": False,
        "lambda": 0.9,
        "int8_mask": True,
        "seed": 3,
    }
    merged = merge_yaml(settings, tmp_path)
    same: dict[str, Any] = {"normalize": True, "rescale": False, "lambda": 0.9, "seed": 3}
    assert_expected(
        merged, llamas, method, layer(1), weight=[0.6, 0.25], density=[0.5, 0.5], **same
    )


@BOTH
def test_slices(method: str, llamas: Path, tmp_path: Path) -> None:
    def sources(first: int, last: int, weight: float) -> list[dict[str, Any]]:
        return [
            {
                "model": str(llamas / name),
                "layer_range": [first, last],
                "parameters": {"weight": weight, "density": 0.5},
            }
            for name in "ab"
        ] + [{"model": str(llamas / "base"), "layer_range": [first, last]}]

    settings = config(
        llamas,
        method,
        slices=[
            {"sources": sources(0, 2, 0.5), "parameters": {"lambda": 0.5}},
            {"sources": sources(1, 3, 0.25), "parameters": {"seed": 9}},
        ],
    )
    del settings["models"]
    merged = merge_yaml(settings, tmp_path)
    assert layer(3) in merged
    assert layer(4) not in merged
    same: dict[str, Any] = {"density": 0.5}
    assert_expected(merged, llamas, method, layer(0), weight=0.5, **same, **{"lambda": 0.5})
    # Output layers 2 and 3 come from layers 1 and 2; the output's name seeds their masks.
    tensors = [zoo.load(llamas / model)[layer(1)] for model in ("base", "a", "b")]
    expected = merged_in_python(tensors, method, layer(2), weight=0.25, density=0.5, seed=9)
    assert torch.equal(merged[layer(2)], expected)


@BOTH
def test_modules(method: str, llamas: Path, tmp_path: Path) -> None:
    settings = config(llamas, method)
    models = settings.pop("models")
    settings["modules"] = {"default": {"models": models, "parameters": {"normalize": True}}}
    merged = merge_yaml(settings, tmp_path)
    assert_expected(merged, llamas, method, layer(1), normalize=True)


@BOTH
def test_base_among_the_models_and_null_parameters(
    method: str, llamas: Path, tmp_path: Path
) -> None:
    settings = config(llamas, method)
    expected = merge_yaml(settings, tmp_path / "without")
    settings["models"].insert(0, {"model": str(llamas / "base"), "parameters": None})
    zoo.assert_same_tensors(merge_yaml(settings, tmp_path / "with"), expected)
    settings["models"][0] = {
        "model": str(llamas / "base"),
        "parameters": {"weight": 5, "density": 0.1},
    }
    zoo.assert_same_tensors(merge_yaml(settings, tmp_path / "ignored"), expected)


@BOTH
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "written"),
    [
        ("float32", None, torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("float16", None, torch.float16),
        (None, "float16", torch.float16),
    ],
)
def test_dtype_and_out_dtype(
    method: str,
    dtype: str | None,
    out_dtype: str | None,
    written: torch.dtype,
    llamas: Path,
    tmp_path: Path,
) -> None:
    merged = merge_yaml(config(llamas, method, dtype=dtype, out_dtype=out_dtype), tmp_path)
    inner = getattr(torch, dtype or "bfloat16")
    tensors = [zoo.load(llamas / m)[layer(1)].to(inner) for m in ("base", "a", "b")]
    expected = merged_in_python(tensors, method, layer(1))
    zoo.assert_same_tensors({"": merged[layer(1)]}, {"": expected.to(written)})


@BOTH
@pytest.mark.parametrize("how", ["tokenizer_source", "tokenizer"])
def test_union_tokenizer(method: str, how: str, llamas: Path, tmp_path: Path) -> None:
    """Models with a word of their own: the vocabulary is aligned, then merged."""
    folder = tmp_path / "models"
    for name, added in (("base", ()), ("a", ("<a>",)), ("b", ("<b>",))):
        model = AutoModelForCausalLM.from_pretrained(llamas / name, dtype=torch.bfloat16)
        tokenizer = zoo.tokenizer(added=added)
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    settings = config(folder, method)
    if how == "tokenizer":
        settings["tokenizer"] = {
            "source": "union",
            "tokens": {"<a>": {"source": str(folder / "a")}},
        }
    else:
        settings["tokenizer_source"] = "union"
    merged = merge_yaml(settings, tmp_path)
    assert merged["model.embed_tokens.weight"].shape == (zoo.VOCABULARY + 2, 32)
    assert_expected(merged, folder, method, layer(1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {"<a>", "<b>"} < set(tokenizer.get_vocab())
    zoo.assert_same_tensors(merge_yaml(settings, tmp_path / "again"), merged)


def test_chat_template(llamas: Path, tmp_path: Path) -> None:
    settings = config(llamas, "dare_ties", chat_template="chatml", tokenizer_source="base")
    merge_yaml(settings, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<|im_start|>" in str(tokenizer.chat_template)


def test_multi_document_file(llamas: Path, tmp_path: Path) -> None:
    """DARE for each model, then another method on the results."""
    documents = [
        config(llamas, "dare_linear", name=name)
        | {"models": [{"model": str(llamas / name), "parameters": {"weight": 1, "density": 0.5}}]}
        for name in "ab"
    ]
    last = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"],
    }
    merged = merge_multi([*documents, last], tmp_path)
    halves = []
    for name in "ab":
        tensors = [zoo.load(llamas / model)[layer(1)] for model in ("base", name)]
        parameters = {"weight": 1.0, "density": 0.5}
        halves.append(
            merge_tensors(
                tensors, "dare_linear", parameters=parameters, base_index=0, name=layer(1)
            )
        )
    mean = merge_tensors(halves, "linear", parameters={"weight": 0.5})
    assert torch.equal(merged[layer(1)], mean)


@BOTH
def test_model_with_a_lora_adapter(method: str, llamas: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llamas / "base", dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    settings = config(llamas, method)
    settings["models"][0]["model"] = f"{llamas / 'base'}+{tmp_path / 'adapter'}"
    settings["parameters"] = {"density": 0.5}
    merged = merge_yaml(settings, tmp_path, "--lora-merge-cache", str(tmp_path / "cache"))
    (cached,) = [path.parent for path in (tmp_path / "cache").rglob("model.safetensors")]
    tensors = [zoo.load(path)[layer(1)] for path in (llamas / "base", cached, llamas / "b")]
    assert not torch.equal(tensors[1], tensors[0])
    expected = merged_in_python(tensors, method, layer(1))
    assert torch.equal(merged[layer(1)], expected.to(merged[layer(1)].dtype))


def test_model_card_tells_who_merged(llamas: Path, tmp_path: Path) -> None:
    merge_yaml(config(llamas, "dare_ties"), tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "[DARE-TIES (mergekit-dare " in card

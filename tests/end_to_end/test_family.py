"""DARE with every command of the mergekit family, and every option that changes how it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit import multigpu_executor
from mergekit.scripts import extract_lora, moe
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests import zoo
from tests.end_to_end.test_configs import merged_in_python
from tests.running import Config, dare, merge_multi, merge_pytorch, merge_yaml, write

LAYER = "model.layers.1.mlp.up_proj.weight"


def one(folder: Path, name: str, **settings: Any) -> Config:
    """DARE of a single model."""
    return {
        "merge_method": "dare_linear",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name), "parameters": {"weight": 1.0, "density": 0.4}}],
        "parameters": {"seed": 3},
    } | settings


def two(folder: Path, method: str = "dare_ties") -> Config:
    return dare(folder, method, density=0.4, seed=3)


# A method that follows DARE: whether it takes a base model, and its parameters.
FOLLOWING: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "linear": (False, {"weight": 0.5}, {}),
    "slerp": (False, {}, {"t": 0.5}),
    "nuslerp": (False, {"weight": 0.5}, {}),
    "multislerp": (False, {"weight": 0.5}, {}),
    "task_arithmetic": (True, {"weight": 0.5}, {}),
    "ties": (True, {"weight": 0.5, "density": 0.5}, {}),
    "breadcrumbs": (True, {"weight": 0.5, "density": 0.9, "gamma": 0.01}, {}),
    "model_stock": (True, {}, {}),
    "sce": (True, {}, {}),
    "karcher": (False, {}, {}),
    "arcee_fusion": (False, {}, {}),
    "passthrough": (False, {}, {}),
}


@pytest.mark.parametrize("method", FOLLOWING)
def test_multi_dare_each_model_then_another_method(
    method: str, llamas: Path, tmp_path: Path
) -> None:
    """The same as by hand: the other method, on models that DARE has written before."""
    takes_base, per_model, shared = FOLLOWING[method]
    names = "a" if method == "passthrough" else "ab"
    last: Config = {"merge_method": method}
    if takes_base:
        last["base_model"] = str(llamas / "base")
    if shared:
        last["parameters"] = shared

    def following(paths: list[str]) -> Config:
        extra = {"base_model": paths[0]} if method in ("slerp", "arcee_fusion") else {}
        return last | extra | {"models": [{"model": p, "parameters": per_model} for p in paths]}

    sparse = [one(llamas, name) | {"name": f"sparse-{name}"} for name in names]
    merged = merge_multi([*sparse, following([f"sparse-{n}" for n in names])], tmp_path / "multi")
    for name in names:
        merge_yaml(one(llamas, name), tmp_path / name)
    by_hand = following([str(tmp_path / name / "out") for name in names])
    zoo.assert_same_tensors(merged, merge_yaml(by_hand, tmp_path / "by-hand"))
    assert not torch.equal(merged[LAYER], zoo.load(llamas / "base")[LAYER])


OPTIONS: dict[str, list[str]] = {
    "lazy-unpickle": ["--lazy-unpickle"],
    "async-write": ["--async-write", "--write-threads", "2", "--out-shard-size", "5000"],
    "low-cpu-memory": ["--low-cpu-memory"],
    "out-shard-size": ["--out-shard-size", "5000"],
    "clone-tensors": ["--clone-tensors"],
    "device": ["--device", "cpu"],
}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_and_pickled_inputs(
    option: str, pickled: bool, llamas: Path, tmp_path: Path
) -> None:
    expected = merge_yaml(two(llamas), tmp_path / "plain")
    folder = llamas
    if pickled:
        folder = tmp_path / "pickled"
        for name in ("base", "a", "b"):
            (folder / name).mkdir(parents=True)
            torch.save(zoo.load(llamas / name), folder / name / "pytorch_model.bin")
            for file in (llamas / name).glob("*.json"):
                (folder / name / file.name).write_bytes(file.read_bytes())
    merged = merge_yaml(two(folder), tmp_path / "merge", *OPTIONS[option])
    zoo.assert_same_tensors(merged, expected)


def test_pickled_output(llamas: Path, tmp_path: Path) -> None:
    expected = merge_yaml(two(llamas), tmp_path / "plain")
    with pytest.raises(AssertionError, match="no safetensors"):
        merge_yaml(two(llamas), tmp_path / "pickled", "--no-safe-serialization")
    written = torch.load(tmp_path / "pickled" / "out" / "pytorch_model.bin")
    zoo.assert_same_tensors(written, expected)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_pytorch_with_pickled_and_other_files(method: str, llamas: Path, tmp_path: Path) -> None:
    expected = merge_yaml(two(llamas, method), tmp_path / "yaml")
    config = two(llamas, method)
    for entry, key in ((config, "base_model"), *((m, "model") for m in config["models"])):
        path = tmp_path / f"{Path(entry[key]).name}.bin"
        torch.save(zoo.load(Path(entry[key])), path)
        entry[key] = str(path)
    merged = merge_pytorch(config, tmp_path / "pytorch", "--lazy-unpickle")
    zoo.assert_same_tensors(merged, expected)


def test_moe_of_dare_outputs(llamas: Path, tmp_path: Path) -> None:
    """A mixture of experts takes merges as its experts: each expert's MLP is the merge's."""
    sparse = {name: merge_yaml(one(llamas, name), tmp_path / name) for name in "ab"}
    config = {
        "base_model": str(llamas / "base"),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts": [{"source_model": str(tmp_path / name / "out")} for name in "ab"],
    }
    path = write(config, tmp_path / "moe.yml")
    out = tmp_path / "moe"
    moe.main.main(args=[path, str(out), "--quiet"], standalone_mode=False)
    made = zoo.load(out)
    (experts,) = (made[n] for n in made if ".layers.1." in n and n.endswith("experts.down_proj"))
    for expert, name in zip(experts, "ab", strict=True):
        assert torch.equal(expert, sparse[name]["model.layers.1.mlp.down_proj.weight"])


def test_extract_lora_from_a_dare_output(llamas: Path, tmp_path: Path) -> None:
    """At full rank, base plus LoRA is the merge again, up to the rounding of bfloat16."""
    merged = merge_yaml(one(llamas, "a", dtype="float32"), tmp_path)
    out = tmp_path / "lora"
    extract_lora.main.main(
        args=[
            f"--model={tmp_path / 'out'}",
            f"--base-model={llamas / 'base'}",
            f"--out-path={out}",
            "--max-rank=32",
        ],
        standalone_mode=False,
    )
    base = AutoModelForCausalLM.from_pretrained(llamas / "base", dtype=torch.float32)
    before = base.state_dict()[LAYER].clone()
    whole = PeftModel.from_pretrained(base, str(out)).merge_and_unload().state_dict()[LAYER]
    delta = merged[LAYER] - before
    assert float(delta.norm()) > 0
    assert float((whole - merged[LAYER]).norm() / delta.norm()) < 0.02


TEXT: dict[str, Any] = {
    "vocab_size": zoo.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def gemma3() -> Gemma3ForConditionalGeneration:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = TEXT | {"head_dim": 8}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def qwen3_vl() -> Qwen3VLForConditionalGeneration:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 14,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    text = TEXT | {"head_dim": 8}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))


def as_on_the_hub(folder: Path) -> None:
    """Name the tensors as published checkpoints do; newer transformers save others for Gemma 3."""
    for path in folder.rglob("*.safetensors"):
        named = {
            name.replace("vision_tower.vision_model.", "vision_tower.").replace(
                "vision_tower.", "vision_tower.vision_model."
            ): tensor
            for name, tensor in load_file(path).items()
        }
        save_file(named, path, metadata={"format": "pt"})


@pytest.mark.parametrize("maker", [gemma3, qwen3_vl])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_vision_language_models(maker: zoo.Maker, method: str, tmp_path: Path) -> None:
    zoo.make_family(maker, tmp_path / "models", names="ab")
    as_on_the_hub(tmp_path / "models")
    config = two(tmp_path / "models", method)
    merged = merge_yaml(config, tmp_path)
    loaded = [zoo.load(tmp_path / "models" / name) for name in ("base", "a", "b")]
    assert merged.keys() == loaded[0].keys()
    settings = {"weight": [0.5, 0.5], "density": [0.4, 0.4], "seed": 3}
    for name in merged:
        expected = merged_in_python([model[name] for model in loaded], method, name, **settings)
        zoo.assert_same_tensors({name: merged[name]}, {name: expected})
    assert any("vision" in name or "visual" in name for name in merged)


def test_threads_of_the_multi_gpu_executor(
    llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driven on three CPU devices: the bytes of the single thread."""
    expected = merge_yaml(two(llamas), tmp_path / "single")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_type", lambda: "cpu")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: torch.cpu.Stream())
    monkeypatch.setattr(torch.cuda, "stream", torch.cpu.stream)
    devices = []
    worker = multigpu_executor.MultiGPUExecutor._device_worker

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        devices.append(kwargs["device"])
        return worker(self, *args, **kwargs)

    monkeypatch.setattr(multigpu_executor.MultiGPUExecutor, "_device_worker", spy)
    merged = merge_yaml(two(llamas), tmp_path / "multi", "--multi-gpu")
    assert len(set(devices)) == 3
    zoo.assert_same_tensors(merged, expected)


def test_config_that_is_saved_beside_the_model(llamas: Path, tmp_path: Path) -> None:
    """It alone determines the merge: merged again, it gives the same bytes."""
    merged = merge_yaml(two(llamas), tmp_path / "first")
    saved = yaml.safe_load((tmp_path / "first" / "out" / "mergekit_config.yml").read_text())
    again: dict[str, Tensor] = merge_yaml(saved, tmp_path / "second")
    zoo.assert_same_tensors(again, merged)

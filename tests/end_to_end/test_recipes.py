"""The recipes, each run with tiny models of the same architectures in their models' places."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertForPreTraining,
    BertForSequenceClassification,
    PreTrainedModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from mergekit_dare.cli import main
from mergekit_dare.diagnostics.checking import check_file
from tests import zoo
from tests.running import PROJECT, merge_pytorch, merge_yaml

RECIPES = PROJECT / "examples" / "recipes"
LLAMA_BASE = "meta-llama/Llama-2-13b-hf"
LM, MATH, CODE = (
    "WizardLMTeam/WizardLM-13B-V1.2",
    "vanillaOVO/WizardMath-13B-V1.0",
    "layoric/llama-2-13b-code-alpaca",
)
# The models, the share that each has, and the drop rate, as the authors name them.
LLAMAS: dict[str, tuple[list[str], float, float]] = {
    "lm_math_average": ([LM, MATH], 1 / 2, 0.6),
    "lm_math_sum": ([LM, MATH], 1, 0.2),
    "lm_code_average": ([LM, CODE], 1 / 2, 0.4),
    "lm_code_sum": ([LM, CODE], 1, 0.3),
    "math_code_average": ([MATH, CODE], 1 / 2, 0.9),
    "math_code_sum": ([MATH, CODE], 1, 0.5),
    "lm_math_code_average": ([LM, MATH, CODE], 1 / 3, 0.5),
    "lm_math_code_sum": ([LM, MATH, CODE], 1, 0.1),
}
# On the example models, with tests of their own.
OURS = ["host", "layers_alone", "constant_rescale", "adapters"]
ENCODERS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]] = {
    "glue_bert": (BertForPreTraining, BertForSequenceClassification),
    "glue_roberta": (RobertaForMaskedLM, RobertaForSequenceClassification),
}


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yml").read_text())
    return loaded


def test_all_recipes_are_tested_and_clean() -> None:
    assert {path.stem for path in RECIPES.glob("*.yml")} == {*LLAMAS, *ENCODERS, *OURS}
    for path in RECIPES.glob("*.yml"):
        assert check_file(str(path)) == []


@pytest.mark.parametrize("recipe", LLAMAS)
def test_decoders(recipe: str, llamas: Path, tmp_path: Path) -> None:
    """One of the models has a token more than the base, as some of the real ones have."""
    larger = AutoModelForCausalLM.from_pretrained(llamas / "c", dtype=torch.bfloat16)
    larger.resize_token_embeddings(zoo.VOCABULARY + 1, mean_resizing=False)
    larger.save_pretrained(tmp_path / "larger")
    zoo.tokenizer(added=("[PAD]",)).save_pretrained(tmp_path / "larger")
    config = load(recipe)
    assert config["base_model"] == LLAMA_BASE
    names, share, drop_rate = LLAMAS[recipe]
    assert [entry["model"] for entry in config["models"]] == names
    divisor = len(names) if config["parameters"].get("normalize") else 1
    for entry in config["models"]:
        assert entry["parameters"]["weight"] / divisor == share
        assert 1 - entry["parameters"]["density"] == pytest.approx(drop_rate)
    stand_ins = [tmp_path / "larger", llamas / "a", llamas / "b"]
    config["base_model"] = str(llamas / "base")
    for entry, stand_in in zip(config["models"], stand_ins, strict=False):
        entry["model"] = str(stand_in)
    merged = merge_yaml(config, tmp_path)
    base = zoo.load(llamas / "base")
    assert {name: tensor.shape for name, tensor in merged.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    name = "model.layers.1.mlp.up_proj.weight"
    assert merged[name].dtype == torch.float16
    changed = float((merged[name] != base[name]).double().mean())
    assert changed == pytest.approx(1 - drop_rate ** len(names), abs=0.05)


def with_stand_ins(recipe: str, folder: Path) -> dict[str, Any]:
    """Return one of our recipes with tiny models in the places of the example models."""
    config = load(recipe)
    assert config["base_model"] == "./examples/models/base"
    config["base_model"] = str(folder / "base")
    for entry, name in zip(config["models"], "abc", strict=True):
        entry["model"] = str(folder / name)
    return config


def test_host(llamas: Path, tmp_path: Path) -> None:
    """Where both guests drop, the host's own bytes remain."""
    config = with_stand_ins("host", llamas)
    merged = merge_yaml(config, tmp_path / "whole")
    host, *guests = config["models"]
    alone = merge_yaml(config | {"models": [host]}, tmp_path / "host")
    zoo.assert_same_tensors(alone, zoo.load(llamas / "a"))
    base = zoo.load(llamas / "base")
    kept = []
    for guest in guests:
        one = merge_yaml(config | {"models": [guest]}, tmp_path / Path(guest["model"]).name)
        kept.append({name: tensor != base[name] for name, tensor in one.items()})
    of_both = 0
    for name, tensor in merged.items():
        dropped = ~(kept[0][name] | kept[1][name])
        # Rounding may hide a guest's element that is kept when it is merged alone.
        changed = tensor != alone[name]
        of_both += int((dropped & changed).sum())
    assert of_both == 0
    assert 0.1 < zoo.moved(merged, alone) < 0.2  # 1 - 0.9**2 = 0.19


def test_constant_rescale(llamas: Path, tmp_path: Path) -> None:
    """A rescale of one's own is a matter of the weight: DARE's own at density * weight."""
    config = with_stand_ins("constant_rescale", llamas)
    merged = merge_yaml(config, tmp_path / "constant")
    for entry in config["models"]:
        entry["parameters"]["weight"] *= entry["parameters"]["density"]
    config["parameters"]["rescale"] = True
    zoo.assert_same_tensors(merge_yaml(config, tmp_path / "own"), merged)
    assert zoo.moved(merged, zoo.load(llamas / "base")) > 0.3


def test_layers_alone(llamas: Path, tmp_path: Path) -> None:
    """What ``explain`` calls as in the base is so, and all else is not."""
    config = with_stand_ins("layers_alone", llamas)
    merged, base = merge_yaml(config, tmp_path), zoo.load(llamas / "base")
    staying = {name for name, tensor in merged.items() if torch.equal(tensor, base[name])}
    assert staying == {n for n in base if "norm" in n or "embed_tokens" in n or "lm_head" in n}
    said = CliRunner().invoke(main, ["explain", str(tmp_path / "in.yml")]).stdout
    (line,) = re.findall(r"As in the base model: ([\d,]+) parameters \((.*?)\)", said, re.DOTALL)
    assert int(line[0].replace(",", "")) == sum(base[name].numel() for name in staying)
    assert "".join(line[1].split()) == (
        "model.{embed_tokens,norm}.weight,model.layers.{0-2}.*_layernorm.weight,lm_head.weight"
    )


def test_adapters(llamas: Path, tmp_path: Path) -> None:
    """Adapters merge as the full models that PEFT makes of them do."""
    config = load("adapters")
    assert config["base_model"] == "./examples/models/base"
    config["base_model"] = str(llamas / "base")
    by_hand = copy.deepcopy(config)
    for seed, entry in enumerate(config["models"]):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(llamas / "base", dtype=torch.float32)
        adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter += torch.randn_like(parameter) * 0.002
        adapter = tmp_path / Path(entry["model"]).name
        adapted.save_pretrained(adapter)
        assert entry["model"] == f"./examples/models/base+./examples/models/adapters/{adapter.name}"
        entry["model"] = f"{llamas / 'base'}+{adapter}"
        adapted.merge_and_unload().save_pretrained(tmp_path / f"whole-{seed}")
        by_hand["models"][seed]["model"] = str(tmp_path / f"whole-{seed}")
    options = ["--lora-merge-cache", str(tmp_path / "cache"), "--lora-merge-dtype", "float32"]
    merged = merge_yaml(config, tmp_path / "adapters", *options)
    zoo.assert_same_tensors(merge_yaml(by_hand, tmp_path / "whole"), merged)
    base_tensors = zoo.load(llamas / "base")
    moved = zoo.moved(*({n: t[n] for n in t if "_proj" in n} for t in (merged, base_tensors)))
    assert moved == pytest.approx(1 - 0.5**3, abs=0.03)


@pytest.mark.parametrize("recipe", ENCODERS)
def test_encoders(recipe: str, tmp_path: Path) -> None:
    of_base, of_tuned = ENCODERS[recipe]
    config = load(recipe)
    shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_labels": 2}
    settings = of_base.config_class(
        **shape, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40
    )
    base_path = tmp_path / config["base_model"]
    torch.manual_seed(0)
    base = of_base(settings)
    base.save_pretrained(base_path.parent)
    config["base_model"] = str(base_path)
    for seed, entry in enumerate(config["models"], start=1):
        torch.manual_seed(seed)
        tuned = of_tuned(settings)
        tuned.load_state_dict(base.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += torch.randn_like(parameter) * 0.002
        path = tmp_path / entry["model"]
        path.parent.mkdir()
        torch.save(tuned.state_dict(), path)
        entry["model"] = str(path)
    merged = merge_pytorch(config, tmp_path / "merge", "--tensor-intersection")

    shared = base.state_dict().keys() & tuned.state_dict().keys()
    assert merged.keys() == shared
    assert not any("classifier" in name or "lm_head" in name or "cls." in name for name in merged)
    whole = tuned.load_state_dict(merged, strict=False)
    assert all("classifier" in name or "position_ids" in name for name in whole.missing_keys)
    state: dict[str, Tensor] = base.state_dict()
    moved = [float((merged[n] != state[n]).double().mean()) for n in merged if "query.weight" in n]
    assert all(0.15 < share < 0.25 for share in moved)  # 1 - 0.9**2

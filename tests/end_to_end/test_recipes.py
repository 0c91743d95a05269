"""The paper's own merges, each run with tiny models of the same architectures in their places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertForPreTraining,
    BertForSequenceClassification,
    PreTrainedModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from mergekit_dare.diagnostics.checking import check_file
from tests import zoo
from tests.running import PROJECT, merge_pytorch, merge_yaml

RECIPES = PROJECT / "examples" / "recipes"
LLAMA_BASE = "meta-llama/Llama-2-13b-hf"
LLAMAS = {
    "lm_math": ["WizardLMTeam/WizardLM-13B-V1.2", "vanillaOVO/WizardMath-13B-V1.0"],
    "lm_code": ["WizardLMTeam/WizardLM-13B-V1.2", "layoric/llama-2-13b-code-alpaca"],
    "math_code": ["vanillaOVO/WizardMath-13B-V1.0", "layoric/llama-2-13b-code-alpaca"],
    "lm_math_code": [
        "WizardLMTeam/WizardLM-13B-V1.2",
        "vanillaOVO/WizardMath-13B-V1.0",
        "layoric/llama-2-13b-code-alpaca",
    ],
}
ENCODERS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]] = {
    "glue_bert": (BertForPreTraining, BertForSequenceClassification),
    "glue_roberta": (RobertaForMaskedLM, RobertaForSequenceClassification),
}


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yml").read_text())
    return loaded


def test_all_recipes_are_tested_and_clean() -> None:
    assert {path.stem for path in RECIPES.glob("*.yml")} == {*LLAMAS, *ENCODERS}
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
    assert [entry["model"] for entry in config["models"]] == LLAMAS[recipe]
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
    assert float((merged[name] != base[name]).double().mean()) > 0.8


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

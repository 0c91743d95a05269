"""Real architectures, made tiny, through mergekit and back into transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests import zoo
from tests.running import Config, merge_pytorch, merge_yaml

LOADERS = {
    "bert-classification": AutoModelForSequenceClassification,
    "roberta-classification": AutoModelForSequenceClassification,
    "bert": AutoModel,
}


def config(folder: Path, method: str, density: float, suffix: str = "") -> Config:
    return {
        "merge_method": method,
        "base_model": f"{folder}/base{suffix}",
        "models": [
            {
                "model": f"{folder}/{name}{suffix}",
                "parameters": {"weight": 0.5, "density": density},
            }
            for name in "ab"
        ],
    }


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_merge_and_load(architecture: str, method: str, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    zoo.make_family(zoo.ARCHITECTURES[architecture], folder, names="ab")
    base = zoo.load(folder / "base")
    for density in (0.0, 0.4):
        out = tmp_path / str(density)
        if architecture == "bert":  # mergekit 0.1.5 cannot plan a bare encoder
            merged = merge_pytorch(config(folder, method, density, "/model.safetensors"), out)
            shutil.copy(folder / "base" / "config.json", out / "out")
        else:
            merged = merge_yaml(config(folder, method, density), out)
        shared = {name: tensor for name, tensor in merged.items() if name in base}
        assert base.keys() <= merged.keys()
        if density == 0:
            zoo.assert_same_tensors(shared, base)
            continue
        assert 0.4 < zoo.moved(shared, base) < 0.64  # 1 - 0.6**2, less what rounds to the base
    loader = LOADERS.get(architecture, AutoModelForCausalLM)
    model, report = loader.from_pretrained(
        out / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    tokens = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        result = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert bool(result[0].isfinite().all())
    state = model.state_dict()
    name = next(name for name in shared if name in state and "weight" in name)
    assert torch.equal(state[name], shared[name].float())

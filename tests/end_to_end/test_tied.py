"""Tied embeddings stay tied: equal tensors in, equal tensors out, under whatever names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import zoo
from tests.running import dare, merge_pytorch, merge_yaml

pytestmark = pytest.mark.slow

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
METHODS = pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied Llamas, and versions of them whose files have lm_head as well, as trainers save it."""
    folder = tmp_path_factory.mktemp("tied")
    zoo.make_family(zoo.ARCHITECTURES["llama-tied"], folder, names="ab")
    for name in ("base", "a"):
        shutil.copytree(folder / name, folder / f"{name}_head")
        file = folder / f"{name}_head" / "model.safetensors"
        tensors = load_file(file)
        assert HEAD not in tensors
        tensors[HEAD] = tensors[EMBEDDINGS].clone()
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@METHODS
@pytest.mark.parametrize(("sampling", "tokens"), [("uniform", None), ("magnitude", "base")])
@pytest.mark.parametrize(("base", "first"), [("base", "a"), ("base_head", "a"), ("base", "a_head")])
def test_tied_stays_tied(
    method: str,
    sampling: str,
    base: str,
    first: str,
    tokens: str | None,
    tied: Path,
    tmp_path: Path,
) -> None:
    config = dare(tied, method, [first, "b"], seed=3, sampling=sampling, rounding="stochastic")
    config["base_model"] = str(tied / base)
    if tokens is not None:
        config["tokenizer_source"] = tokens
    merged = merge_yaml(config, tmp_path)
    assert (HEAD in merged) == (base != "base" or first != "a")
    if HEAD in merged:
        zoo.assert_same_tensors({"": merged[HEAD]}, {"": merged[EMBEDDINGS]})
    expected = AutoModelForCausalLM.from_pretrained(tied / "base").num_parameters()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == expected


@METHODS
def test_names_that_differ_by_a_prefix(method: str, tied: Path, tmp_path: Path) -> None:
    """mergekit-pytorch of renamed checkpoints and mergekit-yaml agree."""
    config = dare(tied, method, "ab", seed=3)
    expected = merge_yaml(config, tmp_path / "yaml")

    def renamed(name: str) -> str:
        tensors: dict[str, Tensor] = load_file(tied / name / "model.safetensors")
        path = tmp_path / f"{name}.safetensors"
        save_file({f"wrapped.{key}": tensor for key, tensor in tensors.items()}, path)
        return str(path)

    config["base_model"] = renamed("base")
    for entry, name in zip(config["models"], "ab", strict=True):
        entry["model"] = renamed(name)
    merged = merge_pytorch(config, tmp_path / "pytorch")
    zoo.assert_same_tensors({k.removeprefix("wrapped."): t for k, t in merged.items()}, expected)
    assert torch.isfinite(merged[f"wrapped.{EMBEDDINGS}"]).all()

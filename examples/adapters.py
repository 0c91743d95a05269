"""Merge LoRA adapters into a full model, extract a LoRA again, and see what that loses.

Trains a LoRA adapter on each text of the example models, merges the adapters with
``examples/recipes/adapters.yml`` at several densities, and extracts a LoRA of each merge by
``mergekit-extract-lora`` at several ranks; also of ``examples/dare.yml``, which merges models that
were fine-tuned as a whole. Takes about a minute on two cores, after ``examples/make_models.py``.

Usage: python examples/adapters.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.scripts import extract_lora, run_yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_models import FOLDER, SEED, encode, loss, save, split, texts, train

EXAMPLE = Path(__file__).parent / "dare.yml"
RECIPE = Path(__file__).parent / "recipes" / "adapters.yml"
DENSITIES = (1.0, 0.5, 0.1)
RANKS = (16, 32, 64, 128, 256)
RANK, RATE, STEPS = 16, 2e-3, 60  # of the adapters that are trained


def load(name: str) -> Any:
    """Return a model in float32, with its adapter if it is named MODEL+ADAPTER."""
    folder, _, adapter = name.partition("+")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not adapter:
        return model
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def train_adapters(texts: dict[str, Tensor]) -> None:
    """Train an adapter of the base on each text, unless it is there."""
    for index, (name, tokens) in enumerate(texts.items()):
        folder = FOLDER / "adapters" / name
        if not folder.exists():
            torch.manual_seed(SEED + index)
            settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
            model = get_peft_model(load(str(FOLDER / "base")), settings)
            train(model, [tokens], STEPS, RATE, f"adapter {name}", SEED + index)
            save(model, folder)


def merge(config: dict[str, Any], folder: Path) -> Path:
    """Merge as ``mergekit-yaml`` does, and return where the merge is."""
    (folder / "config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    arguments = [str(folder / "config.yml"), str(folder / "merged"), "--quiet"]
    arguments += ["--lora-merge-cache", str(folder / "cache"), "--lora-merge-dtype", "float32"]
    run_yaml.main.main(args=arguments, standalone_mode=False)
    return folder / "merged"


def extract(base: str, merged: Path, rank: int) -> Path:
    """Extract as ``mergekit-extract-lora`` does, and return where the adapter is."""
    out = merged.with_name(f"rank-{rank}")
    arguments = ["--model", str(merged), "--base-model", base, "--out-path", str(out)]
    arguments += ["--max-rank", str(rank)]
    extract_lora.main.main(args=arguments, standalone_mode=False)
    return out


def matrices(model: Any) -> Tensor:
    """Return the matrices of the layers, which a LoRA can change, one after another."""
    state = model.state_dict()
    return torch.cat([state[name].flatten() for name in state if "_proj" in name])


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is merged: the recipe at several densities, and the first example."""
    for density in DENSITIES:
        config = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        for model in config["models"]:
            model["parameters"]["density"] = density
        yield f"adapters, density {density}", config
    config = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    yield "dare.yml", config | {"dtype": "float32"}


def report(title: str, config: dict[str, Any], held_out: list[Tensor], folder: Path) -> None:
    """Print one row for the merge and one for each rank."""
    base = load(config["base_model"])
    before = torch.tensor([loss(base, text) for text in held_out])
    own = [
        loss(load(entry["model"]), text)
        for entry, text in zip(config["models"], held_out, strict=True)
    ]
    possible = before - torch.tensor(own)
    merged = merge(config, folder)
    delta = matrices(load(str(merged))) - matrices(base)
    for rank in (None, *RANKS):
        name = str(merged)
        if rank is not None:
            name = f"{config['base_model']}+{extract(config['base_model'], merged, rank)}"
        model = load(name)
        lost = (matrices(model) - matrices(base) - delta).norm() / delta.norm()
        after = torch.tensor([loss(model, text) for text in held_out])
        kept = ((before - after) / possible).mean()
        print(f"{title:24}{rank or 'all':>6}{lost:>12.0%}{kept:>12.2f}", flush=True)


def main() -> None:
    """Train the adapters; print, of each merge and rank, what the extraction loses."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    parts = {name: split(encode(tokenizer, text)) for name, text in texts().items()}
    train_adapters({name: part[0] for name, part in parts.items()})
    print(f"{'merge':24}{'rank':>6}{'delta lost':>12}{'gain kept':>12}")
    for title, config in configs():
        with tempfile.TemporaryDirectory() as folder:
            report(title, config, [part[1] for part in parts.values()], Path(folder))


if __name__ == "__main__":
    main()

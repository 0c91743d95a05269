"""Adapters are models, too: those that do not fit theirs are found before a merge ignores them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergekit_dare.diagnostics.checking import check_file
from tests import zoo
from tests.running import dare, write

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and sound adapters of several kinds."""
    folder = tmp_path_factory.mktemp("adapters")
    zoo.make_family(zoo.ARCHITECTURES["llama"], folder, names="")
    for name, options in SOUND.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
        get_peft_model(model, config).save_pretrained(folder / name)
    return folder


SOUND: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"layers.1.self_attn.q_proj": 4}, "alpha_pattern": {"v_proj": 7}},
    "saved": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "lora_only"},
}


def found(models: Path, adapter: Path, folder: Path) -> list[str]:
    config = dare(models, names=[f"base+{adapter}"], seed=1)
    findings = check_file(write(config, folder / "c.yml"), files=True)
    assert {finding.rule for finding in findings} <= {"unusable-adapter"}
    return [finding.message for finding in findings]


@pytest.mark.parametrize("name", SOUND)
def test_sound_ones_are_clean(name: str, models: Path, tmp_path: Path) -> None:
    assert found(models, models / name, tmp_path) == []


def change(
    edit: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]],
) -> Callable[[Path], object]:
    def changed(adapter: Path) -> None:
        tensors = load_file(adapter / FILE)
        save_file(dict(edit(*item) for item in tensors.items()), adapter / FILE)

    return changed


def settings(**changes: object) -> Callable[[Path], object]:
    def changed(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return changed


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda a: (a / FILE).unlink(), "has no weights: neither adapter_model.safeten"),
    "no settings": (lambda a: (a / "adapter_config.json").unlink(), "is not an adapter"),
    "truncated": (
        lambda a: (a / FILE).write_bytes((a / FILE).read_bytes()[:900]),
        f"{FILE} is",
    ),
    "settings that are not JSON": (
        lambda a: (a / "adapter_config.json").write_text("{"),
        "cannot be read as JSON",
    ),
    "wider": (
        change(lambda k, t: (k, t.repeat(1, 2) if "lora_A" in k else t)),
        "is (2, 64), but its place in",
    ),
    "another rank": (settings(r=4), "is (2, 32), but its place in"),
    "other names": (
        change(lambda k, t: (k.replace("model.layers", "model.language_model.layers"), t)),
        "no tensor of adapter",
    ),
    "a layer that is not there": (
        change(lambda k, t: (k.replace("layers.1.", "layers.9."), t)),
        "for which",
    ),
    "modules that are not there": (settings(target_modules=["c_attn"]), "does not fit"),
    "half of it": (
        change(lambda k, t: (k if "v_proj" not in k else "x", t.clone())),
        "lacks tensor",
    ),
    "more rows than the base model": (
        lambda a: save_file(
            load_file(a / FILE)
            | {"base_model.model.lm_head.weight": torch.ones(140, 32, dtype=torch.bfloat16)},
            a / FILE,
        ),
        "is (140, 32), but its place in",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_an_error(name: str, models: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(models / "plain", adapter)
    edit, message = BROKEN[name]
    edit(adapter)
    messages = found(models, adapter, tmp_path)
    assert any(message in text for text in messages), messages
    assert all("\n" not in text for text in messages)


def test_pickled_ones_are_left_to_torch(models: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(models / "plain", adapter)
    torch.save(load_file(adapter / FILE), adapter / "adapter_model.bin")
    (adapter / FILE).unlink()
    assert found(models, adapter, tmp_path) == []

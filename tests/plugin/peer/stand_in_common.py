"""Stands in for ``tests/common.py`` of mergekit, which its source distribution leaves out.

Written from how mergekit's tests use it: makers of small random models, and a merge followed by
a check of what it wrote. ``test_peer_suite.py`` puts it beside mergekit's tests.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)


def _save(model: PreTrainedModel, path: Any) -> str:
    model.save_pretrained(path)
    return str(path)


def _tiny(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
    }


def make_picollama(path: Any, vocab_size: int = 64) -> str:
    return _save(LlamaForCausalLM(LlamaConfig(**_tiny(vocab_size))), path)


def make_picogranite(path: Any, vocab_size: int = 64) -> str:
    return _save(GraniteForCausalLM(GraniteConfig(**_tiny(vocab_size))), path)


def make_gpt2size(path: Any, vocab_size: int = 64) -> str:
    config = GPT2Config(vocab_size=vocab_size, n_embd=48, n_head=4, n_layer=12, n_positions=64)
    return _save(GPT2LMHeadModel(config), path)


def make_picoLlaVa(path: Any) -> str:  # noqa: N802
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=30,
        patch_size=15,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_tiny(64)), image_token_index=10
    )
    return _save(LlavaForConditionalGeneration(config), path)


def run_and_check_merge(
    config: MergeConfiguration,
    check_nan: bool = True,
    check_tensors: bool = True,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,  # the way the architecture is found; nothing to check here
) -> None:
    with tempfile.TemporaryDirectory() as out:
        run_merge(config, out_path=out, options=MergeOptions())
        assert (Path(out) / "config.json").exists()
        loader = LazyTensorLoader.from_disk(out)
        assert loader.index.tensor_paths
        if check_nan and check_tensors:
            for name in loader.index.tensor_paths:
                tensor = loader.get_tensor(name)
                assert tensor is not None
                assert tensor.isfinite().all(), name
        if validate is not None:
            validate(out)

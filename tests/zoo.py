"""Tiny, seeded models of real architectures, and fine-tuned versions of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCABULARY = 128
LAYERS = 3

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

Maker = Callable[[], PreTrainedModel]

ARCHITECTURES: dict[str, Maker] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_DECODER, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_DECODER, head_dim=8)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_DECODER)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_head=4,
            n_layer=LAYERS,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "bert-classification": lambda: BertForSequenceClassification(
        BertConfig(**_ENCODER, num_labels=3)
    ),
    "roberta-classification": lambda: RobertaForSequenceClassification(
        RobertaConfig(**_ENCODER, num_labels=3, bos_token_id=1, eos_token_id=2)
    ),
    "bert": lambda: BertModel(BertConfig(**_ENCODER)),
}


def llama_of(**settings: Any) -> Maker:
    """A maker of tiny Llamas with other settings."""
    return lambda: LlamaForCausalLM(LlamaConfig(**_DECODER | settings))


def make_family(
    maker: Maker,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "1GB",
    names: str = "abc",
    scale: float = 0.002,
) -> None:
    """Save ``base`` and, for each of ``names``, a fine-tuned model with deltas of ``scale``."""
    torch.manual_seed(0)
    model = maker().to(dtype)
    tokenizer().save_pretrained(folder / "base")
    model.save_pretrained(folder / "base", max_shard_size=max_shard_size)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed, name in enumerate(names, start=1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                delta = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(start[key].float() + delta)
        tokenizer().save_pretrained(folder / name)
        model.save_pretrained(folder / name, max_shard_size=max_shard_size)


def tokenizer(
    size: int = VOCABULARY, added: tuple[str, ...] = (), order: Sequence[int] | None = None
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose words are numbers, in another order if one is given."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(str(n) for n in range(size - 4))]
    words = [words[index] for index in order or range(size)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    if added:
        made.add_tokens(list(added))
    return made


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved model, from one file or several."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no safetensors in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that names, dtypes, shapes and bytes are equal."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        same = torch.equal(
            actual[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
        assert same, name


def moved(merged: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """The fraction of elements that are not the base's."""
    changed = sum(int((merged[name] != base[name]).sum()) for name in merged)
    return changed / sum(math.prod(tensor.shape) for tensor in merged.values())

"""Train the base model and the three fine-tuned models that the example configs merge.

The texts are ones that every Python has: the documentation topics behind ``help()``, the
standard library's source, and generated sums. The base is trained on a mixture of all three,
each fine-tuned model goes on from the base with one of them: so the deltas are real. The models
are Llama-architecture checkpoints of a million parameters. All is seeded and offline, and takes
about a minute on two cores.

Usage: python examples/make_models.py [--force]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from tqdm import trange
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

FOLDER = Path(__file__).parent / "models"
SEED = 20231106
SEQUENCE = 128  # tokens
BATCH = 16  # sequences
BASE_STEPS, BASE_RATE = 200, 3e-3
TUNED_STEPS, TUNED_RATE = 60, 5e-4
HELD_OUT = 0.1  # the share of each text that is never trained on


def texts() -> dict[str, str]:
    """Return about 400,000 characters of each of the three kinds of text."""
    length = 400_000
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = (path.read_text(encoding="utf-8") for path in sorted(library.glob("[a-f]*.py")))
    draw = random.Random(SEED)
    sums = []
    for _ in range(length // 14):
        a, b = draw.randrange(100), draw.randrange(100)
        sums.append(f"{a} + {b} = {a + b}\n" if draw.random() < 0.5 else f"{a} * {b} = {a * b}\n")
    return {
        "docs": "\n".join(topics[name] for name in sorted(topics))[:length],
        "code": "\n".join(sources)[:length],
        "arithmetic": "".join(sums)[:length],
    }


def train_tokenizer(corpus: dict[str, str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 1,024 tokens for the three texts."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus.values(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def split(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part of a text to train on and the part that is held out."""
    border = int(len(tokens) * (1 - HELD_OUT))
    return tokens[:border], tokens[border:]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Return a text's tokens, shape (tokens,)."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def batches(tokens: list[torch.Tensor], steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield random batches, shape (BATCH, SEQUENCE), drawn from all texts alike."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = []
        for row in range(BATCH):
            text = tokens[row % len(tokens)]
            start = int(torch.randint(len(text) - SEQUENCE, (1,), generator=generator))
            rows.append(text[start : start + SEQUENCE])
        yield torch.stack(rows)


def train(
    model: LlamaForCausalLM,
    tokens: list[torch.Tensor],
    steps: int,
    rate: float,
    name: str,
    seed: int,
) -> None:
    """Train ``model`` in place with AdamW and a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    model.train()
    for _, batch in zip(trange(steps, desc=f"train {name}"), batches(tokens, steps, seed)):  # noqa: B905
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def loss(model: LlamaForCausalLM, held_out: torch.Tensor) -> float:
    """Return the mean cross-entropy per token on 32 sequences that were never trained on."""
    rows = held_out[: 32 * SEQUENCE].view(32, SEQUENCE)
    model.eval()
    return float(model(input_ids=rows, labels=rows).loss)


def main() -> None:
    """Train what is not there yet, and print each model's loss on each text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--force", action="store_true", help="train again even if the models already exist"
    )
    if parser.parse_args().force:
        shutil.rmtree(FOLDER, ignore_errors=True)
    if (FOLDER / "arithmetic").exists():
        print(f"The models already exist: {FOLDER}")
        return

    torch.manual_seed(SEED)
    corpus = texts()
    tokenizer = train_tokenizer(corpus)
    parts = {name: split(encode(tokenizer, text)) for name, text in corpus.items()}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    base = LlamaForCausalLM(config)
    train(base, [part[0] for part in parts.values()], BASE_STEPS, BASE_RATE, "base", SEED)
    base.to(torch.bfloat16)  # the fine-tuned models start from what is saved
    start = {name: tensor.float() for name, tensor in base.state_dict().items()}

    print(f"{'loss':12}" + "".join(f"{name:>12}" for name in parts))
    for index, name in enumerate(["base", *parts]):
        model = LlamaForCausalLM(config)
        model.load_state_dict(start)
        if name != "base":
            train(model, [parts[name][0]], TUNED_STEPS, TUNED_RATE, name, SEED + index)
        losses = "".join(f"{loss(model, part[1]):12.3f}" for part in parts.values())
        print(f"{name:12}{losses}", flush=True)
        save(model.to(torch.bfloat16), FOLDER / name, tokenizer)


def save(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None
) -> None:
    """Save so that a folder that is there is complete, whenever the program is stopped."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(unfinished)
    if tokenizer is not None:
        tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, folder)


if __name__ == "__main__":
    main()

"""The base models, what is trained from them, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from make_models import save
from paper import tasks
from paper.settings import Settings, Training
from paper.tasks import Batch

GENTLE = "gentle"  # what models of the study of rounding are named with
DrawBatch = Callable[..., Batch]
Scores = dict[str, float]


@dataclass(frozen=True)
class Family:
    """A base model and all that is trained from it.

    Attributes:
        name: Of its folder.
        width: Hidden size.
        tasks: What it is pre-trained on, and each fine-tuned model on one of.
        draw: Draws a batch of items of tasks.
        is_decoder: Whether it is a Llama, not a BERT.

    """

    name: str
    width: int
    tasks: tuple[str, ...]
    draw: DrawBatch
    is_decoder: bool

    def make(self, settings: Settings) -> PreTrainedModel:
        """Return an untrained model."""
        shape = {
            "vocab_size": tasks.VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": 3 * self.width,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "pad_token_id": tasks.PAD,
        }
        if self.is_decoder:
            ends = {"bos_token_id": tasks.BEGIN, "eos_token_id": tasks.END}
            return LlamaForCausalLM(LlamaConfig(**shape, **ends))
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(**shape, **no_dropout, num_labels=tasks.LABELS)
        return BertForSequenceClassification(config)

    def load(self, folder: Path) -> PreTrainedModel:
        """Load one that was trained or merged."""
        kind = AutoModelForCausalLM if self.is_decoder else AutoModelForSequenceClassification
        loaded: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
        return loaded


def decoders(settings: Settings) -> list[Family]:
    """Return the decoders, the narrowest first."""
    names = tuple(tasks.DECODER_TASKS)
    return [
        Family(f"decoder-{width}", width, names, tasks.decoder_batch, is_decoder=True)
        for width in settings.widths
    ]


def encoder(settings: Settings) -> Family:
    """Return the encoder."""
    width = settings.encoder_width
    return Family("encoder", width, tasks.ENCODER_TASKS, tasks.encoder_batch, is_decoder=False)


def middle_decoder(families: Sequence[Family]) -> Family:
    """Return the one that stands for all decoders; ``families`` are they, then the encoder."""
    return families[len(families[:-1]) // 2]


def train_family(family: Family, settings: Settings, folder: Path) -> None:
    """Train the base model, and a fine-tuned model for each task; keep what is there."""
    models = folder / family.name
    base = models / "base"
    if not base.exists():
        torch.manual_seed(settings.seed)
        model = family.make(settings)
        training = settings.decoder_base if family.is_decoder else settings.encoder_base
        _train(model, family, family.tasks, training, settings, base, right=tasks.RIGHT)
    for task in family.tasks:
        tuned = models / task
        if not tuned.exists():
            model = family.load(base)
            _train(model, family, [task], settings.tuned, settings, tuned, right=1.0)


def train_with_large_deltas(family: Family, settings: Settings, folder: Path) -> None:
    """Train the base on, with a high rate and other data, until its deltas leave the range."""
    models = folder / family.name
    tuned = models / tasks.OTHER_TASK
    if not tuned.exists():
        model = family.load(models / "base")
        training = settings.pretrained_on
        _train(model, family, [tasks.OTHER_TASK], training, settings, tuned, right=1.0)


def train_gently(family: Family, settings: Settings, folder: Path) -> None:
    """Fine-tune so little that bfloat16 hardly shows it; save all in bfloat16, the base, too."""
    models = folder / family.name
    if not (models / f"{GENTLE}-base").exists():
        save(family.load(models / "base").to(torch.bfloat16), models / f"{GENTLE}-base")
    for task in family.tasks:
        tuned = models / f"{GENTLE}-{task}"
        if not tuned.exists():
            model = family.load(models / f"{GENTLE}-base")
            _train(model, family, [task], settings.gently, settings, tuned, right=1.0)
            save(family.load(tuned).to(torch.bfloat16), tuned)


def make_zeros(family: Family, folder: Path) -> None:
    """Save a model of zeros: with it as the base, the deltas are the weights themselves."""
    models = folder / family.name
    zeros = models / "zeros"
    if not zeros.exists():
        model = family.load(models / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        save(model, zeros)


def _train(
    model: PreTrainedModel,
    family: Family,
    names: Sequence[str],
    training: Training,
    settings: Settings,
    folder: Path,
    *,
    right: float,
) -> None:
    """Train with AdamW and a learning rate that rises and falls to zero, then save."""
    parts = (settings.seed, family.name, folder.name)
    generator = torch.Generator().manual_seed(_seed_of(*parts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.rate, total_steps=training.steps + 1
    )
    model.train()
    for _ in trange(training.steps, desc=f"train {family.name}/{folder.name}"):
        batch = family.draw(names, settings.batch, generator, right=right, held_out=False)
        model(input_ids=batch.tokens, labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    save(model, folder)


def _seed_of(*parts: object) -> int:
    """Return a seed that depends on all of ``parts``, the same in every process."""
    return int.from_bytes(repr(parts).encode(), "little") % (2**31 - 1)


@torch.inference_mode()
def scores(
    model: PreTrainedModel, family: Family, names: Sequence[str], settings: Settings
) -> Scores:
    """Return the percentage of held-out items of each task that are answered without a mistake.

    For a decoder, every digit of the answer must be the most likely one.
    """
    model.eval()
    found = {}
    for name in names:
        generator = torch.Generator().manual_seed(_seed_of(settings.seed, "test", name))
        batch = family.draw([name], settings.test_items, generator, right=1.0, held_out=True)
        logits = model(input_ids=batch.tokens).logits
        found[name] = 100 * float(_is_correct(logits, batch.labels).double().mean())
    return found


def _is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.dim() == 2:
        return logits.argmax(1) == labels
    scored = labels[:, 1:] != tasks.IGNORED
    return ((logits[:, :-1].argmax(2) == labels[:, 1:]) | ~scored).all(1)

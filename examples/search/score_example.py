"""Score a merge of the example models: its mean loss on the three kinds of text, held out.

Usage: python examples/search/score_example.py MODEL
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from make_models import encode, loss, split, texts


def main(folder: Path) -> None:
    """Print the loss on each text, and their mean last."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = {
        name: loss(model, split(encode(tokenizer, text))[1]) for name, text in texts().items()
    }
    words = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
    print(f"{words}, mean {sum(losses.values()) / len(losses):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

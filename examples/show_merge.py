"""Load a merge of the example models in transformers and say whose method made it.

Usage: python examples/show_merge.py OUT
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_models import encode, loss, split, texts


def main(folder: Path) -> None:
    """Print the merged model's loss on each text and the method of its model card."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = [
        f"{name} {loss(model, split(encode(tokenizer, text))[1]):.3f}"
        for name, text in texts().items()
    ]
    prompt = tokenizer("12 + 7 =", return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    print("The merged model continues:", repr(tokenizer.decode(answer[0])))
    print("Its loss:", ", ".join(losses))

    card = (folder / "README.md").read_text(encoding="utf-8")
    found = re.search(r"merged using the \[(.*?)\]", card)
    method = found[1] if found else "unknown"
    if "mergekit-dare" not in method:
        sys.exit(f"{folder} was NOT merged by mergekit-dare, but by: {method}")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    kind = type(model).__name__
    print(f"{folder} was merged by {method} and loads as {kind}, {size:.1f} M parameters.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

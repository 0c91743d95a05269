"""Load a merge of the example models and its base, compare them, and say whose method merged.

Usage: python examples/show_merge.py OUT
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_models import encode, loss, split, texts


def main(folder: Path) -> None:
    """Print the losses of the base and of the merge on each text, and the model card's method."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = yaml.safe_load((folder / "mergekit_config.yml").read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(config["base_model"], dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer("12 + 7 =", return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    print("The merged model continues:", repr(tokenizer.decode(answer[0])))

    held_out = {name: split(encode(tokenizer, text))[1] for name, text in texts().items()}
    print(f"{'loss':12}" + "".join(f"{name:>12}" for name in held_out))
    for name, shown in {"base": base, "merge": model}.items():
        print(f"{name:12}" + "".join(f"{loss(shown, part):12.3f}" for part in held_out.values()))

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

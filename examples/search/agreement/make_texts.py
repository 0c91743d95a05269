"""Write texts without labels for the example models, from the part that they were not trained on.

What the example models' loss is measured on is left out, so that a search can be judged by it.

Usage: python examples/search/agreement/make_texts.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from make_models import FOLDER, SEQUENCE, encode, split, texts

JUDGED = 32  # sequences that make_models.loss takes
MOST = 24  # texts of each kind


def rows(held_out: Tensor) -> list[list[int]]:
    """Return texts as token ids, from the tokens of a held-out part, shape (tokens,)."""
    rest = held_out[JUDGED * SEQUENCE :]
    found = rest[: len(rest) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)[:MOST]
    return [row.tolist() for row in found]


def main(folder: Path) -> dict[str, Path]:
    """Write a file of token ids for each kind of text; return the files by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "base")
    files = {}
    for name, text in texts().items():
        held_out = split(encode(tokenizer, text))[1]
        lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows(held_out))
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text(lines, encoding="utf-8")
    return files


if __name__ == "__main__":
    main(Path(sys.argv[1]))

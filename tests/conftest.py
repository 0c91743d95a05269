"""Fixtures of all tests: small models, made once, and a torch seed that each test finds anew."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

from tests import zoo

# A shell starts what a script runs in the background so that Ctrl-C is ignored, which all that a
# test starts would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _torch_seed() -> Iterator[None]:
    """Undo what ``--random-seed`` does to this process: the seed decides the masks."""
    seed = torch.initial_seed()
    yield
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama ``base`` and fine-tuned models ``a``, ``b`` and ``c``."""
    folder = tmp_path_factory.mktemp("llamas")
    zoo.make_family(zoo.ARCHITECTURES["llama"], folder)
    return folder

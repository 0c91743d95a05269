"""What one process keeps and its threads share, and a forked child begins anew."""

from __future__ import annotations

import os
import threading
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class PerProcess(dict[K, V]):
    """A dictionary with a lock; in a forked child it is empty, and free.

    Another thread may have been at work in it when the process forked, which is not in the child.

    Attributes:
        lock: Held by the thread that changes something.

    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self.lock = threading.Lock()
        self.clear()

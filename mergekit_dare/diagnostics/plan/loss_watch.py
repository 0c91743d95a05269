"""A warning, when a merge begins, that the merged model will lack weights which its class needs.

``check --files`` says so before; this watch is for whoever did not ask. mergekit tells a merge
method the name of each tensor that it plans, so once the first tensor is merged, all are known.
They are compared with the names of the base model's tensors: only if some are not among them, the
model's class is made, without data, to see whether it needs them.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Hashable, Sequence

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from mergekit_dare.kernel.merging import FineTuned

LOG = logging.getLogger("mergekit_dare")
# What mergekit calls the slices that it asks a method about before it plans the tensors.
_SLICE = re.compile(r".*\.slices\[(\d+)\]")


class LossWatch:
    """Collects the names that are planned; may be used by several threads."""

    def __init__(self) -> None:
        self._planned: dict[ModelReference, set[str]] = {}
        self._lock = threading.Lock()

    def note(self, base: Hashable, group_name: str | None) -> None:
        """Note that mergekit plans a tensor, or begins with another merge.

        Args:
            base: The base model.
            group_name: The tensor's name, that of a slice, or ``None`` for a whole merge.

        """
        if not isinstance(base, ModelReference):  # mergekit's functions for Python
            return
        part = None if group_name is None else _SLICE.fullmatch(group_name)
        with self._lock:
            if group_name is None or (part is not None and part[1] == "0"):
                self._planned[base] = set()
            elif part is not None:  # several slices: what is left out is meant
                self._planned.pop(base, None)
            elif base in self._planned:
                self._planned[base].add(group_name)

    def look(self, base: Tensor, models: Sequence[FineTuned], tensor_name: str) -> None:
        """Judge what was planned, as a tensor has been merged now."""
        if not self._planned:
            return
        with self._lock:
            planned, self._planned = self._planned, {}
        for model, names in planned.items():
            if (warning := _warning(model, names)) is not None:
                LOG.warning("%s", warning)


def _warning(base: ModelReference, planned: set[str]) -> str | None:
    try:
        index = LoaderCache().get(base).index
        if planned >= index.tensor_paths.keys():
            return None
        from mergekit_dare.diagnostics.plan import completeness

        return completeness.warning_of(base, index.base_path, planned)
    except Exception:  # a merge goes on, whatever comes of this
        return None


WATCH = LossWatch()

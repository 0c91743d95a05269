"""Numbers in the form in which torch takes them fastest.

Of a Python number, torch makes a tensor at each call, which takes as long as the call itself on a
few thousand elements. Compiled code has them as the numbers they are: a tensor of one it would read
again for every vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MADE: dict[tuple[float, torch.dtype], Tensor] = {}
_MOST_KEPT = 1024


def scalar(number: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return a number for use with tensors of a dtype; a tensor is returned as it is.

    The sign of -0.0 is lost.
    """
    if isinstance(number, Tensor) or torch.compiler.is_compiling():
        return number
    number = number or 0.0  # -0.0 has the same key, and would be found in place of 0.0
    made = _MADE.get((number, dtype))
    if made is None:
        made = torch.tensor(number, dtype=dtype, device="cpu")
        if type(made) is Tensor:  # else it is none of real numbers, as in a FakeTensorMode
            if len(_MADE) >= _MOST_KEPT:
                _MADE.clear()
            _MADE[number, dtype] = made
    return made

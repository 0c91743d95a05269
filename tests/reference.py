"""DARE written a second time, in plain Python and float64, to compare the product with.

Nothing here imports the product's merging or masks: the mask is computed word by word with
Python integers from the definition in the documentation, the merge with float64 tensors that
hold every model's terms.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

U64 = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """The first outputs of the sequential generator, as its authors wrote it."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & U64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & U64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & U64
        outputs.append(z ^ (z >> 31))
    return outputs


def mask_key(seed: int, tensor: Tensor) -> int:
    """The key of a tensor's mask from its bytes."""
    whole = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
    data = bytes(whole.view(torch.uint8).tolist())
    header = repr((seed, str(tensor.dtype), tuple(tensor.shape))).encode() + b"\0"
    border = len(data) // 32768 * 32768
    sums = b""
    for start in range(0, border, 32768):
        words = struct.unpack("<4096q", data[start : start + 32768])
        sums += struct.pack("<Q", sum(words) & U64)
    digest = hashlib.blake2b(header, digest_size=8, person=b"mergekit-dare/1")
    digest.update(sums + data[border:])
    return int.from_bytes(digest.digest(), "little")


def keep_mask(key: int, density: float, count: int) -> list[bool]:
    """Which of ``count`` elements are kept."""
    threshold = round(density * 65536)
    if density > 0:
        threshold = max(1, threshold)
    lanes = []
    for word in splitmix64(key, -(-count // 4)):
        for lane in range(4):
            unsigned = (word >> (16 * lane)) & 0xFFFF
            lanes.append(unsigned - 65536 if unsigned >= 32768 else unsigned)
    return [lane < threshold - 32768 for lane in lanes[:count]]


def lanes_of(key: int, count: int) -> list[int]:
    """The first ``count`` 16-bit lanes of a key's stream, from 0 to 65535.

    A lane is a signed number, so 2**15 is added: that flips the top bit of its 16.
    """
    words = splitmix64(key, -(-count // 4))
    lanes = [(word >> (16 * lane)) & 0xFFFF for word in words for lane in range(4)]
    return [lane ^ 0x8000 for lane in lanes[:count]]


def thresholds_by_magnitude(delta: Tensor, wide: torch.dtype, scale: float | None) -> Tensor:
    """T = min(65536, ceil(c |delta|)), at least 1, from a product that is rounded to ``wide``."""
    if scale is None:
        return torch.full_like(delta, 65536)
    factor = torch.tensor(scale, dtype=torch.float64).to(wide)
    product = (delta.abs().to(wide) * factor).double()
    return torch.ceil(product).clamp(1, 65536)


def round_stochastically(
    value: Fraction, lane: int, dtype: torch.dtype, *, as_carry: bool
) -> Fraction:
    """The neighbor of ``value`` that the lane chooses, in exact arithmetic.

    ``as_carry``: away from 0, where the lane added to the lost bits carries.
    """
    info = torch.finfo(dtype)
    largest = Fraction(info.max)
    value = max(-largest, min(largest, value))
    unit = Fraction(info.smallest_normal) * Fraction(info.eps)
    while abs(value) >= unit * (2 / Fraction(info.eps)):
        unit *= 2
    if as_carry:
        size = abs(value) / unit
        steps = math.floor(size) + ((size - math.floor(size)) * 65536 + lane >= 65536)
        return (steps if value > 0 else -steps) * unit
    below = math.floor(value / unit)
    return (below + (lane < round((value / unit - below) * 65536))) * unit


@dataclass
class Merged:
    """The merged values and how far a correct implementation may be from them.

    Attributes:
        values: float64.
        error: float64: the rounding that arithmetic with a relative error of ``unit`` and
            one rounding to the output's dtype can make, per element.
        doubtful: Where the sum that elects the sign is too close to 0 to call.

    """

    values: Tensor
    error: Tensor
    doubtful: Tensor


def merge(
    base: Tensor,
    models: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    combine: str,
    normalize: bool,
    rescale: bool,
    lambda_: float,
    seed: int,
    scales: Sequence[float | None] | None = None,
) -> Merged:
    """Merge; with ``scales``, c_k in units of 1 / 65536, by magnitude (``None`` keeps all)."""
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    unit = torch.finfo(wide).eps
    theta_0 = base.double()
    hats, votes = [], []
    used = [k for k, weight in enumerate(weights) if weight and densities[k]]
    of_t = wide
    if scales is not None and any(
        models[k].dtype == torch.float64 or (scales[k] or 0) > 2.0**100 for k in used
    ):
        of_t = torch.float64
    for k, (theta, weight, density) in enumerate(zip(models, weights, densities, strict=True)):
        delta = torch.where(theta == base, 0.0, theta.double() - theta_0)
        sign_of_weight = (weight > 0) - (weight < 0)
        if scales is not None:
            t = thresholds_by_magnitude(delta, of_t, scales[k])
            lanes = lanes_of(mask_key(seed, theta), delta.numel())
            drawn = torch.tensor(lanes).reshape(delta.shape) < t
            factors = weight * 65536 / t if rescale else torch.full_like(t, weight)
            kept = drawn & (density > 0)
            hats.append(torch.where(kept, delta * factors, 0.0))
            votes.append(torch.where(kept, torch.sign(delta) * sign_of_weight, 0.0))
            continue
        if density == 1:
            mask = torch.ones(delta.shape, dtype=torch.bool)
        else:
            kept_ones = keep_mask(mask_key(seed, theta), density, delta.numel())
            mask = torch.tensor(kept_ones, dtype=torch.bool).reshape(delta.shape)
        met = max(1, round(density * 65536)) / 65536
        factor = weight / met if rescale and density > 0 else weight
        kept = mask & (density > 0)
        hats.append(torch.where(kept, delta * factor, 0.0))
        votes.append(torch.where(kept, torch.sign(delta) * sign_of_weight, 0.0))
    stacked = torch.stack(hats)
    total = stacked.sum(0)
    magnitude = stacked.abs().sum(0)
    column = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * base.dim())
    if combine == "linear":
        merged = total
        divisor = torch.full_like(theta_0, math.fsum(weights))
        divisor[divisor.abs() < 1e-8] = 1
        doubtful = torch.zeros_like(total, dtype=torch.bool)
    else:
        sign = torch.where(total >= 0, 1.0, -1.0)
        agrees = torch.stack(votes) == sign  # taken before anything is scaled, and underflows
        merged = (stacked * agrees).sum(0)
        divisor = (column * agrees).sum(0)
        divisor[divisor == 0] = 1
        info = torch.finfo(wide)
        nothing = 64 * info.smallest_normal * info.eps
        doubtful = (torch.stack(votes) != 0).any(0) & (
            total.abs() < torch.clamp(8 * unit * magnitude, min=nothing)
        )
    scale = torch.as_tensor(lambda_, dtype=torch.float64)
    if normalize:
        scale = scale / divisor
    values = theta_0 + scale * merged
    inner = 4 * unit * (len(models) + 2) * (theta_0.abs() + scale.abs() * magnitude)
    info = torch.finfo(base.dtype)
    rounding = torch.clamp(values.abs() * info.eps / 2, min=info.smallest_normal * info.eps)
    return Merged(values, inner + rounding, doubtful)

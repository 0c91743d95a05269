"""Numbers as tensors: their values, that they are kept, and what must not be."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mergekit_dare.kernel import merging, scalars
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.scalars import scalar
from tests.kernel.test_merging import BOTH, assert_same_bits, family, models, recipe


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "_MADE", {})


def test_value_and_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        made = scalar(1 / 3, dtype)
        assert isinstance(made, torch.Tensor)
        assert (made.dtype, made.shape) == (dtype, ())
        assert scalar(1 / 3, dtype) is made
    tensor = torch.tensor(2.0)
    assert scalar(tensor, torch.float32) is tensor


def test_zero_has_no_sign_whatever_came_before() -> None:
    for number in (-0.0, 0, 0.0):
        assert math.copysign(1, float(scalar(number, torch.float32))) == 1


@BOTH
def test_a_merge_of_nothing_spoils_none_after_it(combine: Combine) -> None:
    """A lambda of 0 and a negative weight give a factor of -0.0."""
    base, tuned = family(2, 40)
    base[::2] = -0.0
    entries = models(tuned, [-0.5, -0.5], 0.5)
    for _ in range(2):
        merged = merging.merge(base, entries, recipe(combine, lambda_=0.0))
        assert_same_bits(merged, base)


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "_MOST_KEPT", 3)
    for number in range(10):
        assert float(scalar(number, torch.float32)) == number
        assert len(scalars._MADE) <= 3


def test_numbers_of_a_fake_mode_do_not_outlive_it() -> None:
    with FakeTensorMode():
        scalar(0.7, torch.float32)
    assert float(scalar(0.7, torch.float32)) == pytest.approx(0.7)

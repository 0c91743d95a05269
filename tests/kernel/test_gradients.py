"""Gradients through the very mask and signs of the forward pass."""

import pytest
import torch

from mergekit_dare.kernel import buffers, gradients, merging
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.masks import mask_key
from tests.kernel.test_merging import BOTH, assert_same_bits, family, models, randn, recipe

WEIGHTS = [0.7, -0.2, 0.5]
NORMALIZE = pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "sum"])


@BOTH
@NORMALIZE
@pytest.mark.parametrize("rescale", [True, False], ids=["rescale", "no-rescale"])
def test_equal_finite_differences(combine: Combine, normalize: bool, rescale: bool) -> None:
    """With float64 inputs, and the mask held: it depends on the weights, so it would jump."""
    base = randn(0, 4, 8, dtype=torch.float64)
    tuned = [randn(seed, 4, 8, dtype=torch.float64) for seed in (1, 2, 3)]
    settings = recipe(combine, normalize=normalize, rescale=rescale, lambda_=0.8)
    inputs = [tensor.requires_grad_() for tensor in (base, *tuned)]
    loss = gradients.merge(base, models(tuned, WEIGHTS, 0.6), settings).square().sum()
    actual = torch.autograd.grad(loss, inputs)

    keys = [mask_key(42, "w", theta) for theta in tuned]
    step = 1e-6
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for index, (tensor, gradient) in enumerate(zip(inputs, actual, strict=True)):
            for element in range(tensor.numel()):
                losses = []
                for sign in (1, -1):
                    moved = [other.clone() for other in inputs]
                    moved[index].view(-1)[element] += sign * step
                    queue = iter(keys)
                    patch.setattr(merging, "mask_key", lambda *_, queue=queue: next(queue))
                    merged = merging.merge(moved[0], models(moved[1:], WEIGHTS, 0.6), settings)
                    losses.append(float(merged.square().sum()))
                slope = (losses[0] - losses[1]) / (2 * step)
                assert slope == pytest.approx(float(gradient.view(-1)[element]), abs=2e-6)


@BOTH
@NORMALIZE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_are_those_without_gradients(
    combine: Combine, normalize: bool, dtype: torch.dtype
) -> None:
    base, tuned = family(3, 300, dtype=dtype)
    settings = recipe(combine, normalize=normalize)
    expected = merging.merge(base, models(tuned, WEIGHTS, 0.5), settings)
    for tensor in (base, *tuned):
        tensor.requires_grad_()
    merged = gradients.merge(base, models(tuned, WEIGHTS, 0.5), settings)
    assert merged.requires_grad
    assert_same_bits(merged.detach(), expected)
    merged.float().sum().backward()
    for tensor in (base, *tuned):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
    with torch.no_grad():
        assert not gradients.merge(base, models(tuned, WEIGHTS, 0.5), settings).requires_grad


def test_linear_gradient_is_the_mask() -> None:
    base, (tuned,) = family(1, 1000)
    tuned.requires_grad_()
    merged = gradients.merge(base, models([tuned], 2.0, 0.25), recipe(Combine.LINEAR))
    merged.sum().backward()
    changed = merged.detach() != base
    assert tuned.grad is not None
    assert set(tuned.grad.unique().tolist()) == {0.0, 8.0}
    assert bool((tuned.grad[changed] == 8).all())
    assert base.grad is None


@BOTH
def test_a_model_of_weight_zero_gets_zeros(combine: Combine) -> None:
    base, tuned = family(2, 50)
    for tensor in (base, *tuned):
        tensor.requires_grad_()
    merged = gradients.merge(base, models(tuned, [1.0, 0.0], 0.5), recipe(combine))
    _, second = torch.autograd.grad(merged.sum(), tuned)
    assert_same_bits(second, torch.zeros(50))


@BOTH
def test_several_chunks(combine: Combine, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients_of_all() -> list[torch.Tensor]:
        base, tuned = family(3, 1000)
        inputs = [tensor.requires_grad_() for tensor in (base, *tuned)]
        settings = recipe(combine, normalize=True)
        merged = gradients.merge(base, models(tuned, WEIGHTS, 0.5), settings)
        return list(torch.autograd.grad(merged.square().sum(), inputs))

    expected = gradients_of_all()
    monkeypatch.setattr(buffers, "LARGEST_CPU_CHUNK", 64)
    for actual, whole in zip(gradients_of_all(), expected, strict=True):
        assert_same_bits(actual, whole)


def test_an_input_changed_before_backward_is_noticed() -> None:
    base, (tuned,) = family(1, 50)
    tuned.requires_grad_()
    merged = gradients.merge(base, models([tuned], 1.0, 0.5), recipe(Combine.LINEAR))
    with torch.no_grad():
        tuned.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        merged.sum().backward()

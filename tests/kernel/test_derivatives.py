"""Gradients through the very mask and signs of the forward pass."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from mergekit_dare.kernel import derivatives, merging
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.masks import mask_key
from mergekit_dare.kernel.rounding import Rounding
from mergekit_dare.kernel.sampling import Sampling
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
    loss = derivatives.merge(base, models(tuned, WEIGHTS, 0.6), settings).square().sum()
    actual = torch.autograd.grad(loss, inputs)

    keys = [mask_key(42, theta) for theta in tuned]
    step = 1e-6
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for index, (tensor, gradient) in enumerate(zip(inputs, actual, strict=True)):
            for element in range(tensor.numel()):
                losses = []
                for sign in (1, -1):
                    moved = [other.clone() for other in inputs]
                    moved[index].view(-1)[element] += sign * step
                    queue = iter(keys)
                    patch.setattr(merging, "mask_key", lambda *_, queue=queue, **__: next(queue))
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
    merged = derivatives.merge(base, models(tuned, WEIGHTS, 0.5), settings)
    assert merged.requires_grad
    assert_same_bits(merged.detach(), expected)
    merged.float().sum().backward()
    for tensor in (base, *tuned):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
    with torch.no_grad():
        assert not derivatives.merge(base, models(tuned, WEIGHTS, 0.5), settings).requires_grad


def test_linear_gradient_is_the_mask() -> None:
    base, (tuned,) = family(1, 1000)
    tuned.requires_grad_()
    merged = derivatives.merge(base, models([tuned], 2.0, 0.25), recipe(Combine.LINEAR))
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
    merged = derivatives.merge(base, models(tuned, [1.0, 0.0], 0.5), recipe(combine))
    _, second = torch.autograd.grad(merged.sum(), tuned)
    assert_same_bits(second, torch.zeros(50))


def test_a_model_of_weight_zero_in_another_dtype() -> None:
    base, tuned = family(2, 50, dtype=torch.bfloat16)
    entries = models([tuned[0], tuned[1].float()], [1.0, 0.0], 0.5)
    expected = merging.merge(base, entries, recipe(Combine.TIES))
    merged = derivatives.merge(base.requires_grad_(), entries, recipe(Combine.TIES))
    assert_same_bits(merged.detach(), expected)


def test_a_delta_of_zero_has_no_sign_to_be_elected() -> None:
    base = torch.tensor([1.0, 2.0, 3.0])
    tuned = torch.tensor([1.0, 2.5, 3.0], requires_grad=True)
    for combine, expected in ((Combine.TIES, [0.0, 1.0, 0.0]), (Combine.LINEAR, [1.0, 1.0, 1.0])):
        merged = derivatives.merge(base, models([tuned]), recipe(combine))
        (gradient,) = torch.autograd.grad(merged.sum(), tuned)
        assert gradient.tolist() == expected


@BOTH
def test_an_input_changed_before_backward(combine: Combine) -> None:
    """The gradient is that of the merge as it was: nothing of it depends on the input's values."""
    base, tuned = family(2, 50)
    expected = gradient_of(base, tuned, combine, change=0)
    assert bool((expected != 0).any())
    assert_same_bits(gradient_of(base, tuned, combine, change=1), expected)


def gradient_of(
    base: torch.Tensor, tuned: list[torch.Tensor], combine: Combine, change: int
) -> torch.Tensor:
    first = tuned[0].clone().requires_grad_()
    merged = derivatives.merge(base, models([first, tuned[1]], 1.0, 0.5), recipe(combine))
    with torch.no_grad():
        first.add_(change)
    merged.sum().backward()
    assert first.grad is not None
    return first.grad


@BOTH
@NORMALIZE
@pytest.mark.parametrize("rescale", [True, False], ids=["rescale", "no-rescale"])
def test_by_magnitude_masks_and_probabilities_are_constants(
    combine: Combine, normalize: bool, rescale: bool
) -> None:
    """The merge is linear in the deltas, with the gradients as factors: it is their sum."""
    base, tuned = family(3, 500, dtype=torch.float64)
    settings = recipe(
        combine, normalize=normalize, rescale=rescale, sampling=Sampling.MAGNITUDE, lambda_=-0.5
    )
    inputs = [tensor.requires_grad_() for tensor in (base, *tuned)]
    merged = derivatives.merge(base, models(tuned, WEIGHTS, 0.3), settings)
    _, *factors = torch.autograd.grad(merged.sum(), inputs)
    deltas = [theta.detach() - base.detach() for theta in tuned]
    rebuilt = base.detach() + sum(a * d for a, d in zip(factors, deltas, strict=True))
    torch.testing.assert_close(rebuilt, merged.detach())
    assert any(bool((a != 0).any()) for a in factors)


@BOTH
@NORMALIZE
def test_tangents_and_second_derivatives(combine: Combine, normalize: bool) -> None:
    """Forward mode agrees with reverse mode; of a square, the second derivative is 2 a a'."""
    base, tuned = family(3, 40, dtype=torch.float64)
    settings = recipe(combine, normalize=normalize)

    def merge(*inputs: torch.Tensor) -> torch.Tensor:
        return derivatives.merge(inputs[0], models(list(inputs[1:]), WEIGHTS, 0.5), settings)

    inputs = (base, *tuned)
    tangents = tuple(randn(seed, 40, dtype=torch.float64) for seed in range(4))
    ones = torch.ones(40, dtype=torch.float64)
    _, pulled = torch.autograd.functional.vjp(merge, inputs, ones)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(i, t) for i, t in zip(inputs, tangents, strict=True)]
        pushed = forward_ad.unpack_dual(merge(*dual)).tangent
    assert pushed is not None
    dots = sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True))
    torch.testing.assert_close(pushed.sum(), dots)

    def square(theta: torch.Tensor) -> torch.Tensor:
        return merge(base, theta, *tuned[1:]).square().sum()

    hessian = torch.autograd.functional.hessian(square, tuned[0])
    torch.testing.assert_close(hessian, torch.diag(2 * pulled[1].square()))
    assert bool((hessian != 0).any())


def test_functional_transforms() -> None:
    base, (tuned,) = family(1, 40)

    def merge(theta: torch.Tensor) -> torch.Tensor:
        return derivatives.merge(base, models([theta], 0.5, 0.5), recipe(Combine.LINEAR))

    expected = torch.autograd.functional.jacobian(merge, tuned).diagonal()
    by_func = torch.func.grad(lambda theta: merge(theta).sum())(tuned)
    pushed = torch.func.jvp(merge, (tuned,), (torch.ones_like(tuned),))[1]
    assert torch.equal(by_func, expected)
    assert torch.equal(pushed, expected)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(merge)(torch.stack([tuned, tuned]))


def test_what_cannot_go_around_a_merge() -> None:
    base, (tuned,) = family(1, 40)

    def merge(theta: torch.Tensor) -> torch.Tensor:
        return derivatives.merge(base, models([theta], 0.5, 0.5), recipe(Combine.LINEAR))

    with pytest.raises(RuntimeError, match="functionalize does not support a merge with DARE"):
        torch.func.functionalize(merge)(tuned)
    with pytest.raises(RuntimeError, match="cannot be recorded by"):
        make_fx(merge)(tuned)
    with pytest.raises(RuntimeError, match="cannot be recorded by"):
        torch.jit.trace(merge, tuned)


TRANSFORMS: dict[str, Callable[..., Callable[..., torch.Tensor]]] = {
    "grad": torch.func.grad,
    "hessian": torch.func.hessian,
    "vmap": lambda function: torch.func.vmap(function, in_dims=0),
    "functionalize": torch.func.functionalize,
}


@BOTH
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_merge_inside_a_transform_of_something_else(transform: str, combine: Combine) -> None:
    """What is merged there is constant, and leaves nothing of the transform behind."""
    base, tuned = family(3, 40)

    def merge(weight: float) -> torch.Tensor:
        return derivatives.merge(base, models(tuned, weight, 0.5), recipe(combine))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x.square() * merge(0.71)).sum()

    transformed = TRANSFORMS[transform](loss)(torch.ones(40))
    expected = {
        "grad": 2 * merge(0.71),
        "hessian": torch.diag(2 * merge(0.71)),
        "vmap": torch.ones(40) * merge(0.71).sum(),
        "functionalize": merge(0.71).sum(),
    }[transform]
    torch.testing.assert_close(transformed, expected)


def test_negative_views() -> None:
    base, (tuned,) = family(1, 40)
    expected = merging.merge(base, models([tuned], 0.5, 0.5), recipe(Combine.LINEAR))
    negative = [torch._neg_view(-tensor) for tensor in (base, tuned)]
    assert negative[0].is_neg()
    merged = merging.merge(negative[0], models(negative[1:], 0.5, 0.5), recipe(Combine.LINEAR))
    assert_same_bits(merged, expected)
    settings = recipe(Combine.LINEAR, rounding=Rounding.STOCHASTIC)
    base, tuned = base.bfloat16(), tuned.bfloat16()
    expected = merging.merge(base, models([tuned], 0.5, 0.5), settings)
    negative = [torch._neg_view(-tensor) for tensor in (base, tuned)]
    merged = merging.merge(negative[0], models(negative[1:], 0.5, 0.5), settings)
    assert_same_bits(merged, expected)

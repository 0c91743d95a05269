"""The methods as mergekit sees them: parameters, seeds, errors, and mergekit's own contract."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import mergekit.merge_methods
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.merge_methods.base import MISSING
from mergekit.merge_methods.generalized_task_arithmetic import (
    ConsensusMethod,
    GeneralizedTaskArithmeticMerge,
)
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_dare import __version__
from mergekit_dare.diagnostics.deltas.range_watch import LARGE_TENSOR
from mergekit_dare.kernel import merging
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.plugin.methods import DareMethod, dare_linear, dare_ties
from tests.kernel.test_merging import assert_same_bits, family, models, randn, recipe
from tests.running import Config, merge_yaml, needs_compiler, run_command

METHODS = pytest.mark.parametrize("method", [dare_linear, dare_ties], ids=["linear", "ties"])


def built_in(method: DareMethod) -> GeneralizedTaskArithmeticMerge:
    """mergekit's own method, built as its registry builds it."""
    ties = method is dare_ties
    return GeneralizedTaskArithmeticMerge(
        consensus_method=ConsensusMethod.sum if ties else None,
        sparsification_method=SparsificationMethod.random,
        default_normalize=False,
        default_rescale=True,
        method_name=method.spec.name,
        method_pretty_name="DARE TIES" if ties else "Linear DARE",
        method_reference_url="https://arxiv.org/abs/2311.03099",
    )


def merge(method: DareMethod | str, base: Tensor, tuned: list[Tensor], **parameters: Any) -> Tensor:
    return merge_tensors(
        [base, *tuned], method, parameters={"weight": 1.0} | parameters, base_index=0, name="w"
    )


@METHODS
def test_parameters_of_the_built_in_and_seed(method: DareMethod) -> None:
    def described(spec: Any) -> dict[str, Any]:
        return {p.name: (p.value_type, p.scope, p.default) for p in spec.parameters}

    ours, theirs = described(method.spec), described(built_in(method).spec)
    seed, sampling, rounding = (ours.pop(name) for name in ("seed", "sampling", "rounding"))
    assert ours == theirs
    assert seed[1:] == ("shared", None)
    assert (sampling, rounding) == ((str, "shared", "uniform"), (str, "shared", "nearest"))
    assert theirs["weight"][2] is MISSING
    assert method.spec.contract == built_in(method).spec.contract
    assert method.spec.reference_url == built_in(method).spec.reference_url


@METHODS
def test_registered_in_place_of_the_built_in(method: DareMethod) -> None:
    assert mergekit.merge_methods.get(method.spec.name) is method
    names = [m.spec.name for m in mergekit.merge_methods.registered_methods()]
    assert names.count(method.spec.name) == 1
    assert f"(mergekit-dare {__version__})" in str(method.spec.pretty_name)


@METHODS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_built_in_where_nothing_is_dropped(
    method: DareMethod, normalize: bool, dtype: torch.dtype
) -> None:
    base, tuned = family(3, 40, 30, dtype=dtype)
    parameters = {
        "weight": [0.5, -0.2, 0.4],
        "density": 1.0,
        "normalize": normalize,
        "lambda": 0.7,
        "int8_mask": True,
    }
    ours = merge(method, base, tuned, **parameters)
    theirs = merge(built_in(method), base, tuned, **parameters)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@METHODS
def test_group_to_plain_tensors(method: DareMethod) -> None:
    base, tuned = family(2, 500, dtype=torch.bfloat16)
    merged = merge(
        method,
        base,
        tuned,
        weight=[0.5, 0.3],
        density=[0.2, 0.7],
        normalize=True,
        rescale=False,
        seed=5,
        **{"lambda": 0.9},
    )
    combine = Combine.TIES if method is dare_ties else Combine.LINEAR
    settings = recipe(combine, seed=5, normalize=True, rescale=False, lambda_=0.9)
    assert_same_bits(merged, merging.merge(base, models(tuned, [0.5, 0.3], [0.2, 0.7]), settings))


def test_rescale_is_one_over_density() -> None:
    """mergekit's own matches the L1 norm instead."""
    base, (tuned,) = family(1, 10_000, dtype=torch.float64)
    ours = merge("dare_linear", base, [tuned], density=0.25)
    kept = ours != base
    torch.testing.assert_close((ours - base)[kept], (tuned - base)[kept] * 4)


@METHODS
def test_seed_parameter_then_torchs_seed(method: DareMethod) -> None:
    base, tuned = family(2, 2000)
    torch.manual_seed(2**40 + 1)  # as a process that was given no seed, which has 64 random bits
    default = merge(method, base, tuned, density=0.5)
    assert_same_bits(merge(method, base, tuned, density=0.5, seed=0), default)
    torch.manual_seed(2**50 + 1)
    assert_same_bits(merge(method, base, tuned, density=0.5), default)
    torch.manual_seed(2**32 - 1)
    largest = merge(method, base, tuned, density=0.5)
    assert_same_bits(merge(method, base, tuned, density=0.5, seed=2**32 - 1), largest)
    torch.rand(10)  # draws do not move the seed
    assert_same_bits(merge(method, base, tuned, density=0.5), largest)
    torch.manual_seed(7)
    seven = merge(method, base, tuned, density=0.5)
    assert_same_bits(merge(method, base, tuned, density=0.5, seed=7), seven)
    torch.manual_seed(8)
    assert_same_bits(merge(method, base, tuned, density=0.5, seed=7), seven)
    assert not torch.equal(merge(method, base, tuned, density=0.5), seven)


@METHODS
def test_modules_with_gradients(method: DareMethod) -> None:
    torch.manual_seed(0)
    modules = [torch.nn.Linear(8, 4) for _ in range(3)]
    parameters = {"weight": 0.5, "density": 0.5, "seed": 1}
    merged = merge_state_dicts(modules, method, base=0, parameters=parameters)
    with torch.no_grad():
        plain = merge_state_dicts(modules, method, base=0, parameters=parameters)
    for name, tensor in merged.items():
        assert_same_bits(tensor.detach(), plain[name])
    sum(tensor.square().sum() for tensor in merged.values()).backward()  # type: ignore[union-attr]
    for module in modules:
        assert module.weight.grad is not None
        assert float(module.weight.grad.abs().sum()) > 0


@METHODS
def test_no_fine_tuned_model_gives_the_base(method: DareMethod) -> None:
    base = randn(0, 10)
    assert_same_bits(merge(method, base, []), base)


BAD = [
    ("density", 1.5, "must be from 0 to 1: it is the fraction of the deltas to keep"),
    ("density", 53, "did you mean 0.53?"),
    ("density", 100, "did you mean 1.0?"),
    ("density", -0.1, "must be from 0 to 1: it is the fraction of the deltas to keep"),
    ("density", "half", "must be a number"),
    ("density", float("nan"), "must be from 0 to 1"),
    ("weight", float("inf"), "must be a finite number"),
    ("weight", float("nan"), "must be a finite number"),
    ("weight", "heavy", "must be a number"),
    ("lambda", float("nan"), "must be a finite number"),
    ("normalize", "perhaps", "must be true or false"),
    ("seed", 1.5, "must be an integer; leave it out to use --random-seed"),
    ("seed", "lucky", "must be an integer"),
    ("seed", True, "must be an integer"),
    ("sampling", "magnitud", "must be uniform or magnitude; did you mean magnitude?"),
    ("sampling", True, "must be uniform or magnitude"),
    ("rounding", "up", "must be nearest or stochastic"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_bad_value_in_python(name: str, value: object, message: str) -> None:
    base, tuned = family(1, 10)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        merge(dare_ties, base, tuned, **{name: value})
    sentence = str(caught.value)
    assert sentence.startswith(
        f"{name} of model 1 for tensor w is"
        if name in ("density", "weight")
        else f"{name} for tensor w is"
    )
    assert "\n" not in sentence


def config(llamas: Path, **settings: Any) -> Config:
    entries = [
        {"model": str(llamas / name), "parameters": {"weight": 0.5, "density": 0.5}}
        for name in "ab"
    ]
    return {"merge_method": "dare_ties", "base_model": str(llamas / "base"), "models": entries} | (
        settings
    )


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_bad_value_in_a_config(
    name: str, value: object, message: str, llamas: Path, tmp_path: Path
) -> None:
    """Found while mergekit plans: nothing is written."""
    bad = config(llamas)
    if name in ("density", "weight"):
        bad["models"][1]["parameters"][name] = [0.5, value]  # a gradient's last layer
        where = rf"{name} of model {re.escape(str(llamas / 'b'))} for tensor model\.\S+ is"
    else:
        bad["parameters"] = {name: value}
        where = rf"{name} for tensor model\.\S+ is"
    with pytest.raises(ValueError, match=where + ".*" + re.escape(message)):
        merge_yaml(bad, tmp_path)
    assert not list((tmp_path / "out").rglob("*"))


def test_a_missing_base_model(llamas: Path, tmp_path: Path) -> None:
    bad = config(llamas)
    del bad["base_model"]
    with pytest.raises(ValueError, match=r"dare_ties needs base_model .*: the model that all"):
        merge_yaml(bad, tmp_path)
    with pytest.raises(ValueError, match="dare_linear needs base_model"):
        merge_tensors([torch.zeros(2)], "dare_linear", parameters={"weight": 1.0})


def test_a_missing_weight(llamas: Path, tmp_path: Path) -> None:
    bad = config(llamas)
    del bad["models"][0]["parameters"]["weight"]
    with pytest.raises(RuntimeError, match=r"Missing required parameter weight for .*a\."):
        merge_yaml(bad, tmp_path)


def test_non_finite_deltas_name_the_model(tmp_path: Path) -> None:
    base, tuned = family(2, 10)
    tuned[0][3] = float("nan")
    with pytest.raises(ValueError, match="tensor w of model 1 makes 1 of 10 deltas"):
        merge(dare_linear, base, tuned, density=0.5)


def test_old_configs_are_valid(llamas: Path) -> None:
    settings = {"normalize": 1.0, "rescale": True, "int8_mask": True, "lambda": "1e0"}
    MergeConfiguration.model_validate(config(llamas, parameters=settings))
    base, tuned = family(1, 10)
    assert_same_bits(
        merge(dare_ties, base, tuned, **settings), merge(dare_ties, base, tuned, normalize=True)
    )


def test_nothing_is_logged_when_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = family(1, 10)
    with caplog.at_level(logging.WARNING):
        merge(dare_ties, base, tuned, density=0.5)
    assert not caplog.records


def test_errors_of_tensors_without_a_name() -> None:
    base, (tuned,) = family(1, 40)
    parameters = {"weight": [0.5], "density": 0.25}
    for inputs, start in (
        ([base.int(), tuned.int()], "tensor of the base model has dtype int32"),
        ([base, tuned / 0], "tensor of model 1 makes 40 of 40 deltas"),
        ([base.half(), base.half() + 6e4], "merged tensor overflows float16"),
    ):
        with pytest.raises(ValueError, match=f"^{start}"):
            merge_tensors(inputs, "dare_linear", parameters=parameters, base_index=0)


def test_a_merge_inside_a_transform() -> None:
    """With tensors so large that they are looked at: there, that is left out."""
    base = randn(0, LARGE_TENSOR)
    tuned = base + 0.001 * randn(1, LARGE_TENSOR)

    def loss(theta: Tensor) -> Tensor:
        parameters = {"weight": [0.5], "density": 0.5, "seed": 1}
        merged = merge_tensors([base, theta], "dare_ties", parameters=parameters, base_index=0)
        return merged.square().sum()

    leaf = tuned.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(tuned), expected)
    assert torch.equal(torch.func.vjp(loss, tuned)[1](torch.tensor(1.0))[0], expected)


@needs_compiler
@pytest.mark.slow
def test_a_merge_inside_compiled_code(tmp_path: Path) -> None:
    """torch.compile around a merge leaves the merge as it is, and torch still works afterwards."""
    program = """
import torch
from mergekit.merge_methods import merge_tensors
base = torch.randn(20)
def merged(theta):
    parameters = dict(weight=[0.5], density=0.5, seed=1)
    return 3 * merge_tensors([base, 2 * theta], 'dare_ties', parameters=parameters, base_index=0)
theta = torch.randn(20, requires_grad=True)
around = torch.compile(merged)
assert torch.equal(around(theta), merged(theta))
(a,), (b,) = (torch.autograd.grad(f(theta).sum(), theta) for f in (around, merged))
assert torch.equal(a, b) and bool((a != 0).any())
print('equal')
"""
    assert run_command(sys.executable, "-c", program, cwd=tmp_path).stdout == "equal\n"

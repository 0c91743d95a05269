"""Random inputs: the formula against the float64 reference, configs against mergekit's planning.

The cases are the same in every run. ``MERGEKIT_DARE_FUZZ=20`` draws twenty times as many, and
other ones each time.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from torch import Tensor

import mergekit_dare
from mergekit_dare.diagnostics.checking import check_file
from mergekit_dare.diagnostics.findings import Severity, UnusableFileError
from mergekit_dare.kernel import cpu, merging
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.masks import threshold
from mergekit_dare.kernel.rounding import Rounding
from mergekit_dare.kernel.sampling import Sampling
from tests import reference
from tests.kernel.test_merging import DTYPES, assert_same_bits, models, recipe, scales_of

pytestmark = pytest.mark.slow

FACTOR = int(os.environ.get("MERGEKIT_DARE_FUZZ", "0"))


def cases(count: int) -> Callable[..., Any]:
    return settings(
        max_examples=count * max(1, FACTOR),
        derandomize=not FACTOR,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return the result, or the exception that is raised; failed assertions go through."""
    try:
        return function(), None
    except AssertionError:
        raise
    except Exception as error:
        return None, error


@dataclass
class Case:
    base: Tensor
    tuned: list[Tensor]
    weights: list[float]
    densities: list[float]
    combine: Combine
    normalize: bool
    rescale: bool
    lambda_: float
    seed: int
    sampling: Sampling
    rounding: Rounding = Rounding.NEAREST

    def merge(self) -> Tensor:
        recipe_ = recipe(
            self.combine,
            normalize=self.normalize,
            rescale=self.rescale,
            lambda_=self.lambda_,
            seed=self.seed,
            sampling=self.sampling,
            rounding=self.rounding,
        )
        return merging.merge(self.base, models(self.tuned, self.weights, self.densities), recipe_)

    def reference(self) -> reference.Merged:
        return reference.merge(
            self.base,
            self.tuned,
            self.weights,
            self.densities,
            combine=self.combine.value,
            normalize=self.normalize,
            rescale=self.rescale,
            lambda_=self.lambda_,
            seed=self.seed,
            scales=self.scales(),
        )

    def scales(self) -> list[float | None] | None:
        if self.sampling is Sampling.UNIFORM:
            return None
        settings = recipe(self.combine, sampling=self.sampling)
        return scales_of(self.base, self.tuned, self.densities, settings)

    @property
    def wide(self) -> torch.dtype:
        dtypes = {tensor.dtype for tensor in (self.base, *self.used)}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    @property
    def used(self) -> list[Tensor]:
        entries = zip(self.tuned, self.weights, self.densities, strict=True)
        return [theta for theta, weight, density in entries if weight and threshold(density)]


SPECIAL: list[float | str] = [
    0.0,
    -0.0,
    1.0,
    math.inf,
    -math.inf,
    math.nan,
    "tiny",
    "-tiny",
    "largest",
    "-largest",
]


def special(value: float | str, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    named = {"tiny": info.smallest_normal * info.eps, "largest": info.max}
    if isinstance(value, float):
        return value
    sign = -1.0 if value.startswith("-") else 1.0
    return sign * named[value.removeprefix("-")]


@st.composite
def merges(draw: st.DrawFn, values: list[float | str] = SPECIAL) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    shape: list[int] = draw(st.lists(st.integers(0, 6), max_size=3))
    count = draw(st.integers(1, 5))
    scale = 10.0 ** draw(st.integers(-6, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def tensor() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    start = tensor()
    base = start.to(dtype)
    other = draw(st.sampled_from([dtype, dtype, torch.float32, torch.float64]))
    size = 10.0 ** draw(st.integers(-5, 1))
    tuned = [(start + size * tensor()).to(other) for _ in range(count)]
    for _ in range(draw(st.integers(0, 3)) if base.numel() and values else 0):
        where = draw(st.integers(0, base.numel() - 1))
        what = draw(st.sampled_from(values))
        for target in draw(st.sampled_from([[base], tuned[:1], [base, *tuned]])):
            target.view(-1)[where] = special(what, target.dtype)
    flip, stretch = draw(st.tuples(st.booleans(), st.booleans()))
    if len(shape) >= 2 and flip:
        base = base.transpose(0, 1).contiguous().transpose(0, 1)
    if shape and stretch:
        tuned = [torch.stack([theta, theta], -1)[..., 1] for theta in tuned]

    normalize = draw(st.booleans())
    # The divisor of a normalized TIES merge must not cancel, or the bound of its error is void.
    weight = st.floats(0.05, 3) if normalize else st.sampled_from([0.0, 1.0, -1.0, 0.3, -1.7, 40.0])
    density = st.sampled_from([0.0, 1e-9, 0.01, 0.3, 0.5, 0.97, 1.0]) | st.floats(0, 1)
    return Case(
        base,
        tuned,
        draw(st.lists(weight, min_size=count, max_size=count)),
        draw(st.lists(density, min_size=count, max_size=count)),
        draw(st.sampled_from(list(Combine))),
        normalize,
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 0.5, -1.0, 0.0, 2.5])),
        draw(st.integers(-(2**70), 2**70)),
        draw(st.sampled_from(Sampling)),
    )


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> Any:
    """So that most tensors span several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "PIECE", 16)
        patch.setattr(merging, "CPU_PIECE", 16)
        yield


@cases(2500)
@given(merges())
def test_any_merge(case: Case) -> None:
    """Right to within the error bound, or an error that gives the actual reason."""
    bad = 0
    for theta in case.used:
        delta = theta.to(case.wide) - case.base.to(case.wide)
        bad += int(((theta != case.base) & ~torch.isfinite(delta)).sum())
    if bad:
        with pytest.raises(ValueError, match="NaN or infinite") as caught:
            case.merge()
        assert "\n" not in str(caught.value)
        return
    expected = case.reference()
    base = case.base.double()
    reach = (expected.values - base).abs() + 2 * expected.error  # of the election's losers, too
    for theta, weight, density in zip(case.tuned, case.weights, case.densities, strict=True):
        least = 1 if case.sampling is Sampling.MAGNITUDE else max(1, threshold(density))
        rescale = 65536 / least if case.rescale else 1.0
        delta = torch.where(theta == case.base, 0.0, theta.double() - base)
        if weight and threshold(density):
            factor = abs(weight) * rescale * max(1.0, abs(case.lambda_))
            if case.normalize:  # TIES may divide by the least of the weights
                factor /= min(1.0, *case.weights)
            reach = reach + delta.abs() * factor
    limit = min(torch.finfo(case.base.dtype).max, torch.finfo(case.wide).max)
    within = bool((base.abs() + reach)[torch.isfinite(base)].lt(0.49 * limit).all())
    merged, error = attempt(case.merge)
    if error is not None:
        assert "overflows" in str(error)
        assert not within
        return
    assert merged.shape == case.base.shape
    assert merged.dtype == case.base.dtype
    infinite = ~torch.isfinite(base)
    assert torch.equal(merged[infinite].nan_to_num(7), case.base[infinite].nan_to_num(7))
    info = torch.finfo(case.wide)
    underflow = 64 * info.smallest_normal * info.eps * max(1.0, abs(case.lambda_))
    off = (merged.double() - expected.values).abs() > expected.error + underflow
    assert not bool((off & ~expected.doubtful & ~infinite).any())


@cases(600)
@given(merges(values=[]), st.randoms(use_true_random=False))
def test_any_order_layout_piece_and_engine(case: Case, random: Any) -> None:
    case.rounding = random.choice(list(Rounding))
    whole, overflow = attempt(case.merge)
    entries = list(zip(case.tuned, case.weights, case.densities, strict=True))
    random.shuffle(entries)
    case.tuned = [theta.clone(memory_format=torch.contiguous_format) for theta, _, _ in entries]
    case.weights = [weight for _, weight, _ in entries]
    case.densities = [density for _, _, density in entries]
    case.base = case.base.clone(memory_format=torch.contiguous_format)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((cpu, "PIECE"), (merging, "CPU_PIECE")):
            patch.setattr(module, name, random.choice([4, 8, 64, 256]))
        patch.setattr(merging, "compiled_cpu", lambda dtype: None)
        other, other_overflow = attempt(case.merge)
    assert str(other_overflow) == str(overflow)
    if overflow is None:
        assert_same_bits(other, whole)
    else:
        assert "overflows" in str(overflow)


ELEMENT: st.SearchStrategy[Any] = st.one_of(st.integers(0, 2), st.text(max_size=3))
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.floats(),
    st.text(max_size=6),
    st.lists(ELEMENT, max_size=3),
    st.dictionaries(st.sampled_from(["filter", "value", "x"]), st.integers(0, 2), max_size=2),
)
NUMBER = st.floats(0, 1) | st.sampled_from([0, 1, 0.5])
SETTING = (
    NUMBER
    | st.lists(NUMBER, min_size=1, max_size=4)
    | st.builds(
        lambda filtered, rest: [*filtered, {"value": rest}],
        st.lists(
            st.fixed_dictionaries(
                {"value": NUMBER, "filter": st.sampled_from(["mlp", "self_attn", "norm"])}
            ),
            max_size=2,
        ),
        NUMBER,
    )
)


@st.composite
def configs(draw: st.DrawFn, folder: Path) -> dict[str, Any]:
    """A valid config."""
    names = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
    parameters = st.fixed_dictionaries({"weight": SETTING}, optional={"density": SETTING})
    shared = st.fixed_dictionaries(
        {},
        optional={
            "normalize": st.booleans(),
            "rescale": st.booleans(),
            "lambda": NUMBER,
            "seed": st.integers(0, 99),
            "int8_mask": st.booleans(),
        },
    )
    entries: list[dict[str, Any]] = [
        {"model": str(folder / name), "parameters": draw(parameters)} for name in names
    ]
    config: dict[str, Any] = {
        "merge_method": draw(st.sampled_from(["dare_linear", "dare_ties"])),
        "base_model": str(folder / "base"),
    }
    if draw(st.booleans()):
        base: dict[str, Any] = {"model": str(folder / "base"), "layer_range": [0, 2]}
        for entry in entries:
            entry["layer_range"] = [0, 2]
        config["slices"] = [{"sources": [base, *entries]}]
    else:
        config["models"] = entries
    if draw(st.booleans()):
        config["parameters"] = draw(shared)
    return config


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every container and key (or index) of nested dictionaries and lists."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    found = [(node, key) for key in keys]
    for key in keys:
        if isinstance(node[key], dict | list):
            found += places(node[key])
    return found


@st.composite
def mutated(draw: st.DrawFn, folder: Path) -> dict[str, Any]:
    """A config that may be wrong in a few places."""
    config = draw(configs(folder))
    for _ in range(draw(st.integers(0, 3))):
        container, key = draw(st.sampled_from(places(config)))
        if not (isinstance(container, dict) or 0 <= key < len(container)):
            continue
        kind = draw(st.sampled_from(["replace", "remove", "rename", "double"]))
        if kind == "replace":
            container[key] = draw(JUNK)
        elif kind == "remove":
            del container[key]
        elif isinstance(container, dict):
            new = draw(st.sampled_from([f"{key}s", str(key)[1:], "densty", "weight", "seed", "x"]))
            container[new] = container.pop(key) if kind == "rename" else container[key]
    return config


def errors(path: Path) -> list[str]:
    """What check says, and that each finding points at a line of the file."""
    text = path.read_text(encoding="utf-8")
    found = check_file(str(path), files=True)
    lines = text.splitlines()
    for finding in found:
        assert 1 <= finding.line <= len(lines)
        assert finding.message
        assert "\n" not in finding.message
        assert finding.text == lines[finding.line - 1].strip()
    return [finding.message for finding in found if finding.severity is Severity.ERROR]


@pytest.fixture(scope="module")
def folder(llamas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, under a short name, and a place for the configs."""
    where = tmp_path_factory.mktemp("properties")
    for name in ("base", "a", "b", "c"):
        (where / name).symlink_to(llamas / name)
    return where


def plan(config: Any) -> None:
    """Plan as mergekit-yaml does."""
    merge_config = MergeConfiguration.model_validate(config)
    options = MergeOptions()
    architecture = get_architecture_info(merge_config, options)
    LoaderCache().setup(options=options)
    out_config = merge_config.referenced_models()[0].config()
    MergePlanner(merge_config, architecture, options, out_config).plan_to_disk("unused")


@cases(150)
@given(data=st.data())
def test_valid_configs_are_clean_and_planned(data: st.DataObject, folder: Path) -> None:
    config = data.draw(configs(folder))
    path = folder / "valid.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    assert errors(path) == []
    plan(yaml.safe_load(path.read_text()))


@cases(300)
@given(data=st.data())
def test_mutated_configs(data: st.DataObject, folder: Path) -> None:
    """Where planning fails by a value that we refuse, check has said so; we never crash."""
    config = data.draw(mutated(folder))
    path = folder / "mutated.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    said = errors(path)
    _, error = attempt(lambda: plan(yaml.safe_load(path.read_text())))
    if error is not None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if Path(mergekit_dare.__file__).parent in Path(last.filename).parents:
            assert type(error) is ValueError
            assert "\n" not in str(error)
            assert said, error


@cases(400)
@given(data=st.data())
def test_any_text_is_checked_or_refused(data: st.DataObject, folder: Path) -> None:
    text = yaml.safe_dump(data.draw(configs(folder)), sort_keys=False)
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.integers(0, 12))
        text = (
            text[:start] + data.draw(st.text("abw:-[]{}&*!|>#'\" \n\t0.é", max_size=4)) + text[end:]
        )
    path = folder / "text.yml"
    path.write_text(text, encoding="utf-8")
    _, error = attempt(lambda: errors(path))
    if error is not None:
        assert type(error) is UnusableFileError, error
        assert "\n" not in str(error)
        assert str(path) in str(error)

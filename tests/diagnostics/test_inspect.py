"""The figures of ``inspect`` against numpy in float64, and its verdicts on models made for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mergekit_dare.cli import main
from mergekit_dare.diagnostics import deltas, inspection
from tests import zoo
from tests.kernel.test_merging import randn
from tests.running import Config, write


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tuned models, one with large deltas, and one of another base."""
    folder = tmp_path_factory.mktemp("family")
    make = zoo.ARCHITECTURES["llama"]
    torch.manual_seed(0)
    base = make()
    scales = {"base": 0.0, "math": 0.0015, "code": 0.001, "pretrained": 0.012}
    for number, (name, scale) in enumerate(scales.items()):
        model = make()
        model.load_state_dict(base.state_dict())
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                noise[torch.rand(parameter.shape, generator=generator) < 0.2] = 0
                parameter += noise * scale
        model.to(torch.bfloat16).save_pretrained(folder / name)
    torch.manual_seed(99)
    make().to(torch.bfloat16).save_pretrained(folder / "stranger")
    return folder


def config(folder: Path, *names: str, **settings: Any) -> Config:
    return {
        "merge_method": "dare_ties",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / name), "parameters": {"weight": 0.5, "density": 0.25}}
            for name in names
        ],
    } | settings


def inspect(folder: Path, tmp_path: Path, *names: str, **settings: Any) -> inspection.Report:
    path = write(config(folder, *names, **settings), tmp_path / "config.yml")
    return inspection.inspect_config(path, quiet=True)


def all_deltas(folder: Path, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    base, tuned = zoo.load(folder / "base"), zoo.load(folder / name)
    flat = [torch.cat([m[key].double().reshape(-1) for key in sorted(base)]) for m in (base, tuned)]
    return (flat[1] - flat[0]).numpy(), flat[0].numpy()


@pytest.mark.parametrize("name", ["math", "pretrained", "stranger"])
def test_figures_of_a_model(name: str, family: Path, tmp_path: Path) -> None:
    report = inspect(family, tmp_path, name)
    delta, base = all_deltas(family, name)
    (model,) = report.models.values()
    total = model.total
    assert total.count == delta.size
    assert total.smallest == pytest.approx(delta.min(), rel=1e-6)
    assert total.largest == pytest.approx(delta.max(), rel=1e-6)
    assert total.mean_magnitude == pytest.approx(np.abs(delta).mean(), rel=1e-6)
    norm = np.linalg.norm(delta) / np.linalg.norm(base)
    assert total.relative_norm == pytest.approx(norm, rel=1e-6)
    assert total.zero_share == pytest.approx((delta == 0).mean(), abs=1e-12)
    for q in inspection.QUANTILES:
        expected = np.quantile(np.abs(delta), q, method="inverted_cdf")
        assert total.quantile(q) == pytest.approx(expected, rel=0.01)
    for magnitude in (deltas.SMALL, deltas.LARGE):
        low, high = ((np.abs(delta) > magnitude * f).mean() for f in (1.01, 0.99))
        assert low <= total.share_above(magnitude) <= high
    assert model.relative_noise == pytest.approx(math.sqrt(3) * norm, rel=1e-6)
    largest = {
        key: float((zoo.load(family / name)[key].double() - tensor.double()).abs().max())
        for key, tensor in zoo.load(family / "base").items()
    }
    expected_names = sorted(largest, key=lambda key: -largest[key])[:5]
    found = model.standing_out()
    assert [largest[key] for key in found] == [largest[key] for key in expected_names]


def test_figures_of_a_pair(family: Path, tmp_path: Path) -> None:
    report = inspect(family, tmp_path, "math", "code")
    (pair,) = report.pairs.values()
    first, second = all_deltas(family, "math")[0], all_deltas(family, "code")[0]
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert pair.cosine == pytest.approx(cosine, abs=1e-6)
    both = (first != 0) & (second != 0)
    assert pair.both == both.sum()
    assert pair.conflict_share == pytest.approx((first * second < 0)[both].mean(), abs=1e-12)


def test_noise_is_what_dare_adds() -> None:
    """Mean squared distance of the merged from the fine-tuned tensor; 2 % is over 6 deviations."""
    from mergekit_dare.kernel import merging
    from mergekit_dare.kernel.formula import Combine
    from mergekit_dare.kernel.merging import FineTuned, Recipe

    base = randn(0, 400_000, dtype=torch.float64)
    tuned = base + randn(1, 400_000, dtype=torch.float64) * 0.01
    for density in (0.9, 0.5, 0.1):
        recipe = Recipe(Combine.LINEAR, "w", 0)
        merged = merging.merge(base, [FineTuned("m", tuned, 1.0, density)], recipe)
        noise = float((merged - tuned).norm() / (tuned - base).norm())
        assert noise == pytest.approx(deltas.noise_factor(density), rel=0.02)


def test_verdicts(family: Path, tmp_path: Path) -> None:
    report = inspect(family, tmp_path, "math", "code", "pretrained", "stranger", "base")
    kinds = {Path(name).name: verdict.kind for name, verdict in report.verdicts().items()}
    assert kinds == {
        "math": "small",
        "code": "small",
        "pretrained": "large",
        "stranger": "wrong base",
    }
    for verdict in report.verdicts().values():
        assert 0 < verdict.density <= 1
    small = next(v for v in report.verdicts().values() if v.kind == "small")
    assert small.density == 0.1


def test_verdicts_on_plain_numbers() -> None:
    base = randn(0, 10_000, scale=0.02)

    def verdict(delta: torch.Tensor, *others: torch.Tensor) -> str:
        named = {str(i): base + d for i, d in enumerate((delta, *others))}
        measured = deltas.measure(base, named).models
        rest = [measured[str(i + 1)] for i in range(len(others))]
        return deltas.judge(measured["0"], rest).kind

    tiny = randn(1, 10_000, scale=0.0005)
    assert verdict(tiny) == "small"
    assert verdict(torch.zeros(10_000)) == "no change"
    assert verdict(randn(1, 10_000, scale=0.004)) == "medium"
    # As long as the base, but on top of it; the same length in place of the base.
    assert verdict(randn(1, 10_000, scale=0.02)) == "large"
    assert verdict(randn(1, 10_000, scale=0.02) - base) == "wrong base"
    assert verdict(-0.9 * base) == "large"  # shrunk, not another one
    assert verdict(tiny.index_fill(0, torch.tensor([5]), math.nan)) == "not finite"
    # A relative norm of 0.3 alone is much; beside models of 0.005 it is another base.
    much = randn(1, 10_000, scale=0.006)
    assert verdict(much) == "medium"
    assert verdict(much, tiny / 5, tiny / 6) == "wrong base"


def test_gradients_of_density_are_reported(family: Path, tmp_path: Path) -> None:
    settings = config(family, "math")
    settings["models"][0]["parameters"]["density"] = [0.2, 0.6]
    report = inspection.inspect_config(write(settings, tmp_path / "c.yml"), quiet=True)
    (model,) = report.models.values()
    assert sorted(model.densities) == pytest.approx([0.2, 0.4, 0.6])


def test_chunks_and_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = randn(0, 1000), {"a": randn(1, 1000), "b": randn(2, 1000)}
    for tensor in (base, *tuned.values()):
        tensor[:10] = -math.inf  # equal in all: their delta is 0
    whole = deltas.measure(base, tuned)
    assert whole.models["a"].zeros == 10
    assert whole.models["a"].non_finite == 0
    norm = (tuned["a"] - base)[10:].norm() / base[10:].norm()
    assert whole.models["a"].relative_norm == pytest.approx(float(norm), rel=1e-5)
    assert math.isfinite(whole.models["a"].undoing)
    monkeypatch.setattr(deltas, "_CHUNK", 64)
    parts = deltas.measure(base, tuned)
    for name, statistics in whole.models.items():
        assert parts.models[name].mean_magnitude == pytest.approx(statistics.mean_magnitude)
        assert torch.equal(parts.models[name].histogram, statistics.histogram)
    assert parts.pairs["a", "b"].cosine == pytest.approx(whole.pairs["a", "b"].cosine)


def test_float64_deltas_are_measured_in_float64() -> None:
    """Deltas that float32 would round to 0."""
    base = randn(0, 1000, dtype=torch.float64) + 3
    tuned = {"a": base + 1e-9, "b": base - 1e-9 * (torch.arange(1000) % 2)}
    measured = deltas.measure(base, tuned)
    a, b = measured.models["a"], measured.models["b"]
    assert a.mean_magnitude == pytest.approx(1e-9, rel=1e-6)
    assert (a.zeros, b.zeros) == (0, 500)
    pair = measured.pairs["a", "b"]
    assert (pair.both, pair.conflicts) == (500, 500)
    assert pair.cosine == pytest.approx(-math.sqrt(0.5), rel=1e-6)


def test_pairs_where_deltas_are_not_finite() -> None:
    base = torch.zeros(6)
    first = torch.tensor([1.0, math.nan, 1.0, 2.0, 0.0, -1.0])
    second = torch.tensor([1.0, 1.0, math.inf, -2.0, 3.0, -1.0])
    measured = deltas.measure(base, {"a": first, "b": second})
    assert [measured.models[name].non_finite for name in "ab"] == [1, 1]
    pair = measured.pairs["a", "b"]
    assert (pair.dot, pair.square_sums) == (-2.0, (6.0, 15.0))
    assert (pair.both, pair.conflicts) == (3, 1)


def test_command(family: Path, tmp_path: Path) -> None:
    path = write(config(family, "math", "stranger"), tmp_path / "config.yml")
    result = CliRunner().invoke(main, ["inspect", path, "--quiet"])
    assert result.exit_code == 0, result.output
    assert "verdict        small deltas, as after supervised fine-tuning" in result.output
    assert "verdict        suspected wrong base" in result.output
    assert "at density 0.25" in result.output
    assert "opposite signs in" in result.output
    result = CliRunner().invoke(main, ["inspect", path, "--quiet", "--json"])
    figures = json.loads(result.stdout)
    assert [m["verdict"] for m in figures["models"].values()] == ["small", "wrong base"]
    assert len(figures["pairs"]) == 1


def test_plot(family: Path, tmp_path: Path) -> None:
    path = write(config(family, "math", "pretrained"), tmp_path / "config.yml")
    png = tmp_path / "plot.png"
    result = CliRunner().invoke(main, ["inspect", path, "--quiet", "--plot", str(png)])
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    report = inspection.inspect_config(path, quiet=True)
    first, second = (model.total for model in report.models.values())
    for total in (first, second):
        middles, shares = inspection.histogram(total)
        assert sum(shares) == pytest.approx(1 - total.zero_share, abs=0.001)
        peak = middles[shares.index(max(shares))]
        root_mean_square = math.sqrt(total.square_sum / total.count)
        assert root_mean_square / 3 < peak < root_mean_square * 3
        densities, noise = inspection.noise_curve(total)
        assert noise[0] == pytest.approx(math.sqrt(99) * total.relative_norm)
        assert densities[-1] == pytest.approx(0.95)


def test_what_cannot_be_inspected(family: Path, tmp_path: Path) -> None:
    def said(settings: Config) -> str:
        result = CliRunner().invoke(
            main, ["inspect", write(settings, tmp_path / "bad.yml"), "--quiet"]
        )
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        return result.stderr

    without_base = config(family, "math", merge_method="linear")
    del without_base["base_model"]
    assert "needs base_model" in said(without_base)
    assert "has no fine-tuned model" in said(config(family, "base"))
    assert said(config(family, "nowhere"))

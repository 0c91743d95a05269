"""The figures of ``inspect`` against numpy in float64, and its verdicts on models made for it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergekit_dare.cli import main
from mergekit_dare.commands import inspect_plot, inspect_text
from mergekit_dare.diagnostics.deltas import inspection
from mergekit_dare.diagnostics.deltas import statistics as of_deltas
from mergekit_dare.diagnostics.deltas.verdict import LARGE, SMALL, judge
from mergekit_dare.kernel.sampling import magnitude_scale
from tests import zoo
from tests.kernel.test_merging import randn
from tests.running import Config, dare, merge_yaml, write

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tuned models, one with large deltas, and one with a different base."""
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
    return inspection.inspect_config(path, MergeOptions(quiet=True))


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
    for q in inspect_text.QUANTILES:
        expected = np.quantile(np.abs(delta), q, method="inverted_cdf")
        assert total.quantile(q) == pytest.approx(expected, rel=0.01)
    for magnitude in (SMALL, LARGE):
        low, high = ((np.abs(delta) > magnitude * f).mean() for f in (1.01, 0.99))
        assert low <= total.share_above(magnitude) <= high
    assert model.relative_noise() == pytest.approx(math.sqrt(3) * norm, rel=1e-6)
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
    assert pair.both_share == pytest.approx(both.mean(), abs=1e-12)
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
        assert noise == pytest.approx(of_deltas.noise_factor(density), rel=0.02)


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

    def kind(delta: torch.Tensor, *others: torch.Tensor) -> str:
        named = {str(i): base + d for i, d in enumerate((delta, *others))}
        measured = of_deltas.measure(base, named).models
        rest = [measured[str(i + 1)] for i in range(len(others))]
        return judge(measured["0"], rest).kind

    tiny = randn(1, 10_000, scale=0.0005)
    assert kind(tiny) == "small"
    assert kind(torch.zeros(10_000)) == "no change"
    assert kind(randn(1, 10_000, scale=0.004)) == "medium"
    # As long as the base, but on top of it; the same length in place of the base.
    assert kind(randn(1, 10_000, scale=0.02)) == "large"
    assert kind(randn(1, 10_000, scale=0.02) - base) == "wrong base"
    assert kind(-0.9 * base) == "large"  # shrunk, not another one
    assert kind(tiny.index_fill(0, torch.tensor([5]), math.nan)) == "not finite"
    # A relative norm of 0.3 alone is much; beside models of 0.005 it is another base.
    much = randn(1, 10_000, scale=0.006)
    assert kind(much) == "medium"
    assert kind(much, tiny / 5, tiny / 6) == "wrong base"


def test_gradients_of_density_are_reported(family: Path, tmp_path: Path) -> None:
    settings = config(family, "math")
    settings["models"][0]["parameters"]["density"] = [0.2, 0.6]
    report = inspection.inspect_config(
        write(settings, tmp_path / "c.yml"), MergeOptions(quiet=True)
    )
    (model,) = report.models.values()
    assert sorted(model.densities) == pytest.approx([0.2, 0.4, 0.6])


def test_chunks_and_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = randn(0, 1000), {"a": randn(1, 1000), "b": randn(2, 1000)}
    for tensor in (base, *tuned.values()):
        tensor[:10] = -math.inf  # equal in all: their delta is 0
    whole = of_deltas.measure(base, tuned)
    assert whole.models["a"].zeros == 10
    assert whole.models["a"].non_finite == 0
    norm = (tuned["a"] - base)[10:].norm() / base[10:].norm()
    assert whole.models["a"].relative_norm == pytest.approx(float(norm), rel=1e-5)
    assert math.isfinite(whole.models["a"].undoing)
    monkeypatch.setattr(of_deltas, "_CHUNK", 64)
    parts = of_deltas.measure(base, tuned)
    for name, statistics in whole.models.items():
        assert parts.models[name].mean_magnitude == pytest.approx(statistics.mean_magnitude)
        assert torch.equal(parts.models[name].histogram, statistics.histogram)
    assert parts.pairs["a", "b"].cosine == pytest.approx(whole.pairs["a", "b"].cosine)


def test_float64_deltas_are_measured_in_float64() -> None:
    """Deltas that float32 would round to 0."""
    base = randn(0, 1000, dtype=torch.float64) + 3
    tuned = {"a": base + 1e-9, "b": base - 1e-9 * (torch.arange(1000) % 2)}
    measured = of_deltas.measure(base, tuned)
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
    measured = of_deltas.measure(base, {"a": first, "b": second})
    assert [measured.models[name].non_finite for name in "ab"] == [1, 1]
    pair = measured.pairs["a", "b"]
    assert (pair.dot, pair.square_sums) == (-2.0, (6.0, 15.0))
    assert (pair.both, pair.conflicts) == (3, 1)


def test_command(family: Path, tmp_path: Path) -> None:
    path = write(config(family, "math", "stranger"), tmp_path / "config.yml")
    result = CliRunner().invoke(main, ["inspect", path, "--quiet"])
    assert result.exit_code == 0, result.output
    assert "verdict        small deltas, as after supervised fine-tuning" in result.output
    assert "verdict        suspected wrong base model" in result.output
    assert "at density 0.25" in result.output
    assert "with opposite signs" in result.output
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
    report = inspection.inspect_config(path, MergeOptions(quiet=True))
    first, second = (model.total for model in report.models.values())
    for total in (first, second):
        middles, shares = inspect_plot.histogram(total)
        assert sum(shares) == pytest.approx(1 - total.zero_share, abs=0.001)
        peak = middles[shares.index(max(shares))]
        root_mean_square = math.sqrt(total.square_sum / total.count)
        assert root_mean_square / 3 < peak < root_mean_square * 3
        densities, noise = inspect_plot.noise_curve(total)
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


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["inspect", "--quiet", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def copy(family: Path, tmp_path: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A family with a different ``math``."""
    for name in ("base", "math", "code"):
        shutil.copytree(family / name, tmp_path / name)
    tensors = change(zoo.load(tmp_path / "math"))
    save_file(tensors, tmp_path / "math" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_a_model_that_equals_the_base_beside_another(family: Path, tmp_path: Path) -> None:
    folder = copy(family, tmp_path, lambda _: zoo.load(family / "base"))
    code, out, _ = run(write(config(folder, "math", "code"), tmp_path / "c.yml"))
    assert code == 0
    assert "the model equals the base model" in out


def test_a_model_of_nan_and_json(family: Path, tmp_path: Path) -> None:
    folder = copy(family, tmp_path, lambda t: {k: v * math.nan for k, v in t.items()})
    path = write(config(folder, "math"), tmp_path / "c.yml")
    code, out, _ = run(path, "--json")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    figures = json.loads(out, parse_constant=refuse)
    (model,) = figures["models"].values()
    assert (code, model["verdict"]) == (0, "not finite")
    assert "deltas are NaN or infinite: the merge will stop there" in run(path)[1]


def test_nothing_compared(family: Path, tmp_path: Path) -> None:
    folder = copy(family, tmp_path, lambda t: {k: v[:1] for k, v in t.items()})
    code, out, _ = run(write(config(folder, "math", "code"), tmp_path / "c.yml"))
    assert code == 0
    assert "none of its tensors could be compared with the base model" in out
    assert f"shapes differ: (1, 32) in {folder / 'math'} but (128, 32) in the base" in out
    assert "small deltas" in out  # of the other one


def test_every_reason_is_named(family: Path, tmp_path: Path) -> None:
    folder = copy(family, tmp_path, lambda t: t | {"lm_head.weight": t["lm_head.weight"][:100]})
    shutil.rmtree(folder / "code")
    shutil.copytree(folder / "math", folder / "code")
    report = inspection.inspect_config(
        write(config(folder, "math", "code"), tmp_path / "c.yml"), MergeOptions(quiet=True)
    )
    assert [len(reasons) for reasons in report.left_out.values()] == [2]


def test_several_configs(family: Path, tmp_path: Path) -> None:
    first, second = (config(family, name) | {"name": name} for name in ("math", "code"))
    path = write([first, second], tmp_path / "steps.yml")
    code, _, err = run(path)
    assert code == 2
    assert "has 2 configs; choose one of these with --name: math, code" in err
    code, out, _ = run(path, "--name", "code")
    assert (code, out.split("\n")[0]) == (0, str(family / "code"))


def test_unusable_inputs(family: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yml"
    broken.write_text("models:\n\t- model: ./a\n")
    path = write(config(family, "math"), tmp_path / "c.yml")
    folder = copy(family, tmp_path / "cut", lambda t: t)
    file = folder / "math" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    damaged = write(config(folder, "math"), tmp_path / "damaged.yml")
    for arguments, message in (
        ([str(broken)], "broken.yml:2: cannot be read as YAML"),
        ([path, "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        ([damaged], f"{file} is truncated: it has 5000 bytes"),
        ([path, "--plot", str(tmp_path / "no" / "p.png")], "No such file"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_the_report_is_out_whatever_becomes_of_the_plot(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(inspect_plot, "plot", fail)
    path = write(config(family, "math"), tmp_path / "c.yml")
    code, out, err = run(path, "--plot", str(tmp_path / "p.png"))
    assert code == 2
    assert "small deltas" in out
    assert "p.png could not be drawn: no font" in err


def test_vocabularies_in_another_order(tmp_path: Path) -> None:
    """tokenizer_source: rows of the same tokens are compared."""
    zoo.make_family(zoo.ARCHITECTURES["llama"], tmp_path, names="a")
    words = [*range(4), *range(zoo.VOCABULARY - 1, 3, -1)]
    zoo.tokenizer(order=words).save_pretrained(tmp_path / "a")
    tensors = zoo.load(tmp_path / "a")
    for name, tensor in tensors.items():
        if tensor.shape[0] == zoo.VOCABULARY:
            tensors[name] = tensor[words].clone()
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    settings = dare(tmp_path, names="a", seed=1)
    plain = inspection.inspect_config(write(settings, tmp_path / "p.yml"))
    assert next(iter(plain.models.values())).total.largest > 0.03
    settings["tokenizer_source"] = "base"
    aligned = inspection.inspect_config(write(settings, tmp_path / "c.yml"))
    assert next(iter(aligned.models.values())).total.largest < 0.02


def test_adapters_and_single_files(tmp_path: Path) -> None:
    zoo.make_family(zoo.ARCHITECTURES["llama"], tmp_path, names="a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    adapted = dare(tmp_path, names=[f"base+{tmp_path}/adapter"], seed=1)
    code, out, _ = run(write(adapted, tmp_path / "c.yml"))
    assert code == 0
    assert "q_proj.weight: |delta| up to" in out
    files = dare(tmp_path, names=["a/model.safetensors"], seed=1)
    files["base_model"] += "/model.safetensors"
    code, out, _ = run(write(files, tmp_path / "c.yml"))
    assert code == 0
    assert "relative norm" in out


def test_what_rounding_leaves(tmp_path: Path) -> None:
    """A change of 0.3 units is lost when it is rounded to nearest, and inspect says so."""
    zoo.make_family(zoo.ARCHITECTURES["llama"], tmp_path, names="")
    shutil.copytree(tmp_path / "base", tmp_path / "a")
    tensors = zoo.load(tmp_path / "a")
    for tensor in tensors.values():
        tensor.view(-1)[::5].view(torch.int16).add_(1)
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    settings = dare(tmp_path, "dare_linear", "a", weight=0.3, density=1.0, seed=1)
    report = inspection.inspect_config(write(settings, tmp_path / "c.yml"))
    assert report.change is not None
    assert report.change.survives is not None
    assert report.change.survives < 0.1
    # A unit at 0.3 of the way: noise sqrt(0.3 * 0.7) of a unit, for a change of 0.3 units; half of
    # a unit's size towards 0, where the mantissa overflows, so a little more.
    assert report.change.stochastic_noise == pytest.approx(math.sqrt(0.21) / 0.3, rel=0.2)
    advice, of_density = report.advice()
    assert "rounding: stochastic preserves it on average" in advice
    settings["parameters"]["rounding"] = "stochastic"
    advice_now = inspection.inspect_config(write(settings, tmp_path / "c.yml")).advice()
    assert advice_now == [of_density]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; ``a`` and ``b`` with a fifth of all elements a unit up; ``frozen``, but a tensor."""
    folder = tmp_path_factory.mktemp("sparse")
    zoo.make_family(zoo.ARCHITECTURES["llama"], folder, names="")
    for number, name in enumerate(("a", "b", "frozen")):
        shutil.copytree(folder / "base", folder / name)
        tensors = zoo.load(folder / name)
        generator = torch.Generator().manual_seed(number)
        for key, tensor in tensors.items():
            chosen = torch.rand(tensor.shape, generator=generator) < 0.2
            if name == "frozen":
                chosen = torch.full(tensor.shape, "layers.0.mlp.up_proj" in key)
            tensor.view(torch.int16)[chosen] += 1
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_sparse_changes_are_named(sparse: Path, tmp_path: Path) -> None:
    """Shares are of some 31,000 elements: five standard deviations are 0.0113, and 0.0056."""
    report = inspect(sparse, tmp_path, "a", "b", "frozen")
    a, b, frozen = report.models.values()
    delta = all_deltas(sparse, "a")[0]
    assert a.total.count > 31_000
    assert a.changed_share == pytest.approx((delta != 0).mean(), abs=1e-12)
    assert (a.changed_share, b.changed_share) == pytest.approx((0.2, 0.2), abs=0.0113)
    pair = report.pairs[str(sparse / "a"), str(sparse / "b")]
    assert pair.both_share == pytest.approx(0.04, abs=0.0056)
    # Nothing but one tensor is changed, but that one completely: not what is meant.
    assert frozen.total.zero_share > 0.8
    assert frozen.changed_share == 1
    verdicts = list(report.verdicts().values())
    assert [verdict.sparse for verdict in verdicts] == [True, True, False]
    assert [verdict.density for verdict in verdicts] == [0.5, 0.5, 0.1]
    said = inspect_text.as_text(report)
    assert said.count("most elements equal the base model's") == 2
    assert f"few are changed ({a.changed_share:.1%} in {sparse / 'a'}, " in said
    assert f"; both change {pair.both_share:.1%} of the elements" in said
    figures = inspect_text.as_json(report)
    assert figures["models"][str(sparse / "a")]["changed_share"] == a.changed_share
    assert figures["pairs"][0]["both_change"] == pair.both_share


def test_what_density_means_for_sparse_changes(sparse: Path, tmp_path: Path) -> None:
    """Uniform sampling keeps half of the changes, that by magnitude all, as the advice says.

    Of some 6,300 changes; 0.032 is five standard deviations.
    """
    settings = dare(sparse, "dare_linear", "a", weight=1.0, density=0.5, seed=1)
    base = zoo.load(sparse / "base")
    changes = int((all_deltas(sparse, "a")[0] != 0).sum())
    kept = {}
    for sampling in ("uniform", "magnitude"):
        settings["parameters"]["sampling"] = sampling
        merged = merge_yaml(settings, tmp_path / sampling)
        moved = sum(int((merged[key] != tensor).sum()) for key, tensor in base.items())
        kept[sampling] = moved / changes
    assert kept["uniform"] == pytest.approx(0.5, abs=0.032)
    assert kept["magnitude"] == 1


def test_the_seed_of_mergekits_option(llamas: Path, tmp_path: Path) -> None:
    """What a config without a seed is drawn with, as in a merge."""
    changes = []
    cases: list[tuple[dict[str, int], int | None]] = [
        ({}, 3),
        ({"seed": 3}, None),
        ({"seed": 0}, 3),
    ]
    for given, option in cases:
        settings = write(dare(llamas, density=0.1) | {"parameters": given}, tmp_path / "c.yml")
        report = inspection.inspect_config(settings, MergeOptions(random_seed=option, quiet=True))
        changes.append(report.change)
    assert changes[0] == changes[1] != changes[2]


def test_noise_of_both_samplings(tmp_path: Path) -> None:
    """As theory has it for Gaussian deltas at density 0.1: by magnitude 0.60 of the power."""
    base, tuned = randn(0, 200_000), randn(1, 200_000) * 0.01 + randn(0, 200_000)
    (statistics,) = of_deltas.measure(base, {"a": tuned}).models.values()
    uniform = of_deltas.noise_factor(0.1) ** 2 * statistics.square_sum
    assert of_deltas.magnitude_noise(statistics, 0.1) / uniform == pytest.approx(0.596, rel=0.02)
    scale = magnitude_scale(tuned, base, 0.1, torch.float32)
    assert scale is not None
    delta = (tuned - base).double()
    probability = torch.ceil(delta.abs() * scale).clamp(1, 65536) / 65536
    exact = float((delta**2 * (1 / probability - 1)).sum())
    assert of_deltas.magnitude_noise(statistics, 0.1) == pytest.approx(exact, rel=0.02)
    assert of_deltas.magnitude_noise(statistics, 1.0) == 0

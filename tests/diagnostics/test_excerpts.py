"""Samples: which elements, what is read of the files, and how near the figures are to all of it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.options import MergeOptions
from safetensors.torch import save_file

from mergekit_dare.commands import inspect_text
from mergekit_dare.diagnostics.deltas import excerpts, inspection
from mergekit_dare.diagnostics.deltas.statistics import DeltaStatistics, measure
from tests import zoo
from tests.kernel.test_merging import randn
from tests.running import dare, run_command, write

SIZE = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("count", [1, 65_536, 65_537, 200_000, 1 << 20, 16_777_216, 100_000_007])
@pytest.mark.parametrize("ahead", [0, 1, 1000, 2047])
def test_blocks(count: int, ahead: int) -> None:
    """One in each stretch, none beyond the end, none twice; as many as it takes."""
    places = excerpts.starts(count, ahead)
    if places is None:
        assert count < 2 * excerpts.LEAST + 2 * excerpts.BLOCK
        return
    blocks = len(places)
    assert blocks * excerpts.BLOCK >= max(excerpts.LEAST, count * excerpts.SHARE)
    assert blocks * excerpts.BLOCK < max(excerpts.LEAST, count * excerpts.SHARE) + excerpts.BLOCK
    assert places == excerpts.starts(count, ahead)
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert min(gaps) >= excerpts.BLOCK
    assert max(gaps) <= 2 * (count // blocks) + excerpts.BLOCK
    assert places[0] >= 0
    assert places[-1] + excerpts.BLOCK <= count
    assert all((place + ahead) % excerpts.BLOCK == 0 for place in places[1:])


def test_blocks_do_not_fall_on_the_same_columns() -> None:
    places = excerpts.starts(4096 * 4096)
    assert places is not None
    columns = {place % 4096 for place in places}
    assert columns == {0, 2048}
    assert 0.3 < sum(place % 4096 == 0 for place in places) / len(places) < 0.7


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose layers differ in the size of their deltas."""
    folder = tmp_path_factory.mktemp("large")
    zoo.make_family(zoo.llama_of(**SIZE), folder, names="ab")
    for seed, name in enumerate("ab"):
        base, tuned = zoo.load(folder / "base"), {}
        for index, (key, tensor) in enumerate(base.items()):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed + index))
            tuned[key] = (tensor.float() + noise * 0.0005 * (1 + index % 5)).to(tensor.dtype)
        save_file(tuned, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_near_to_all_of_it(models: Path, tmp_path: Path) -> None:
    """Quantiles and norms within 1 %, shares within a point, the same verdict."""
    path = write(dare(models, density=0.3, seed=1), tmp_path / "c.yml")
    quiet = MergeOptions(quiet=True)
    sampled = inspection.inspect_config(path, quiet)
    whole = inspection.inspect_config(path, quiet, full=True)
    assert sampled.is_partial
    assert sampled.share_read < 0.4
    assert not whole.is_partial
    assert whole.share_read == 1
    for name, model in whole.models.items():
        other = sampled.models[name]
        assert other.total.count == model.total.count
        for q in inspect_text.QUANTILES:
            assert other.total.quantile(q) == pytest.approx(model.total.quantile(q), rel=0.011)
        for figure in ("relative_norm", "mean_magnitude"):
            expected = getattr(model.total, figure)
            assert getattr(other.total, figure) == pytest.approx(expected, rel=0.01)
        for share in ("zero_share", "undoing"):
            assert getattr(other.total, share) == pytest.approx(
                getattr(model.total, share), abs=0.01
            )
        assert other.relative_noise() == pytest.approx(model.relative_noise(), rel=0.01)
        assert 0 < other.error() < 0.05
        assert sampled.verdicts()[name].kind == whole.verdicts()[name].kind
    for pair, found in whole.pairs.items():
        assert sampled.pairs[pair].cosine == pytest.approx(found.cosine, abs=0.01)
        assert sampled.pairs[pair].conflict_share == pytest.approx(found.conflict_share, abs=0.01)
    assert whole.change is not None
    assert sampled.change is not None
    assert sampled.change.survives == pytest.approx(whole.change.survives, abs=0.01)
    again = inspection.inspect_config(path, quiet)
    assert inspect_text.as_json(again) == inspect_text.as_json(sampled)
    text = inspect_text.as_text(sampled)
    assert text.startswith(f"From a sample of {sampled.share_read:.2%} of the bytes")
    assert not inspect_text.as_text(whole).startswith("From a sample")
    assert inspect_text.as_json(sampled)["share_of_bytes_read"] == sampled.share_read


def test_a_sample_that_mergekit_reads_gives_the_same(models: Path, tmp_path: Path) -> None:
    """Pickled models are loaded as a whole, and then sampled."""
    expected = inspection.inspect_config(write(dare(models, seed=1), tmp_path / "c.yml"))
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        for file in (models / name).glob("*.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        torch.save(zoo.load(models / name), tmp_path / name / "pytorch_model.bin")
    found = inspection.inspect_config(write(dare(tmp_path, seed=1), tmp_path / "p.yml"))
    assert found.is_partial
    assert found.share_read == 1
    pairs = zip(found.models.values(), expected.models.values(), strict=True)
    for one, other in pairs:
        assert one.total.relative_norm == pytest.approx(other.total.relative_norm, rel=0.01)


def test_other_layouts_of_the_files(models: Path, tmp_path: Path) -> None:
    """The same elements are compared, also where the files have other headers and dtypes."""
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        for file in (models / name).glob("*.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.float() for name, tensor in zoo.load(models / "base").items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    metadata = {"format": "pt", "note": "x" * 1234}
    same = {name: tensor.clone() for name, tensor in reversed(tensors.items())}
    save_file(same, tmp_path / "a" / "model.safetensors", metadata=metadata)
    found = inspection.inspect_config(write(dare(tmp_path, names="a"), tmp_path / "c.yml"))
    assert found.is_partial
    (verdict,) = found.verdicts().values()
    assert verdict.kind == "no change"


def test_only_the_pages_of_a_sample_are_counted(tmp_path: Path) -> None:
    """Of a large tensor, less than 1 % in the sample's own pages."""
    elements = 40_000_000
    save_file({"w": torch.zeros(elements, dtype=torch.bfloat16)}, tmp_path / "w.safetensors")
    stored = excerpts._MappedFile.open(tmp_path / "w.safetensors")
    assert stored is not None
    found = stored.find("w")
    assert found is not None
    read = excerpts.Bytes()
    values = found.read(found.ahead, read)
    assert values.shape == (math.ceil(elements * excerpts.SHARE / excerpts.BLOCK), excerpts.BLOCK)
    assert read.there == elements * 2
    assert read.read == values.numel() * 2 + (4096 if found.ahead else 0)


def test_scaled_statistics() -> None:
    """Of a sample, as of a tensor of twice its elements: twice every sum, the same quantiles."""
    base, tuned = randn(0, 1000), randn(1, 1000)
    (found,) = measure(base, {"a": tuned}).models.values()
    twice = DeltaStatistics()
    twice.add(found, 2.0)
    assert twice.count == 2000
    assert twice.relative_norm == pytest.approx(found.relative_norm)
    assert twice.square_sum == pytest.approx(2 * found.square_sum)
    for fraction in (0.0, 0.5, 1.0):
        assert twice.quantile(fraction) == found.quantile(fraction)


def test_scalars_and_a_tensor_that_is_not_finite(tmp_path: Path) -> None:
    """A scalar is measured, and NaN in one tensor leaves out that one alone of the change."""
    large = torch.ones(1 << 18)
    for name, change in (("base", 0.0), ("a", 0.5)):
        tensors = {"broken": torch.ones(8), "scalar": torch.tensor(1 + change), "w": large + change}
        if name == "a":
            tensors["broken"][3] = math.nan
        narrow = {key: tensor.bfloat16() for key, tensor in tensors.items()}
        save_file(narrow, tmp_path / f"{name}.safetensors")
    config = dare(tmp_path, names=["a.safetensors"], seed=1)
    config["base_model"] += ".safetensors"
    for full in (False, True):
        found = inspection.inspect_config(write(config, tmp_path / "c.yml"), full=full)
        (model,) = found.models.values()
        assert model.tensors["scalar"] == (0.5, 0.5)
        assert model.total.non_finite == 1
        assert model.total.count == 7 + 1 + (1 << 18)
        assert found.change is not None
        assert found.change.square_sum == pytest.approx(0.25 * 0.25 * ((1 << 18) + 1))


@pytest.mark.slow
def test_the_command(models: Path, tmp_path: Path) -> None:
    path = write(dare(models, seed=1), tmp_path / "c.yml")
    result = run_command("mergekit-dare", "inspect", path, "--json", "--quiet")
    report: dict[str, Any] = json.loads(result.stdout)
    assert 0 < report["share_of_bytes_read"] < 0.4
    result = run_command("mergekit-dare", "inspect", path, "--json", "--quiet", "--full")
    assert json.loads(result.stdout)["share_of_bytes_read"] == 1

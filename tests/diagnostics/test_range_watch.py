"""The warning of deltas beyond DARE's range: when, what it says, and that it stops nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergekit_dare.diagnostics.deltas import range_watch
from mergekit_dare.diagnostics.deltas.range_watch import RangeWatch
from mergekit_dare.kernel.merging import FineTuned
from tests import zoo
from tests.kernel.test_merging import randn
from tests.running import Config, run_command, write

SIDE = 1024
LARGE_SCALE = 0.012  # 1.2 % of such deltas are above 0.03


def base() -> Tensor:
    return randn(0, SIDE, SIDE).mul_(0.05)


def tuned(scale: float, seed: int = 1) -> Tensor:
    return base() + randn(seed, SIDE, SIDE).mul_(scale)


def test_one_sentence_for_each_model_that_leaves_the_range() -> None:
    watch = RangeWatch()
    models = [
        FineTuned("small", tuned(0.002), 1.0, 0.5),
        FineTuned("large", tuned(LARGE_SCALE), 1.0, 0.5),
        FineTuned("other base", randn(9, SIDE, SIDE).mul_(0.05), -1.0, 0.5),
    ]
    watch.look(base(), models, "first")
    larger = FineTuned("large", tuned(2 * LARGE_SCALE), 1.0, 0.5)
    watch.look(base(), [models[0], larger, models[2]], "second")
    watch.look(base(), models, "third")
    large, other = watch.warnings()
    share = re.fullmatch(
        r"model large: about (\d+\.\d)% of its deltas are above 0.03, too large for DARE, or "
        r"its base model is a different one \(arXiv 2311.03099, section 4.5\), most of all in "
        r"tensor second; inspect it with: mergekit-dare inspect CONFIG",
        large,
    )
    assert share is not None
    expected = [
        100 * float(((t - base()).abs() > 0.03).double().mean())
        for t in (tuned(LARGE_SCALE), tuned(2 * LARGE_SCALE))
    ]
    assert float(share[1]) == pytest.approx((2 * expected[0] + expected[1]) / 3, rel=0.1)
    assert other.startswith(
        "model other base: the norm of its deltas is 141% of the base model's, too"
    )
    assert watch.warnings() == []
    watch.look(base(), models[1:2], "")  # as of mergekit's functions for Python
    (sentence,) = watch.warnings()
    assert "section 4.5); inspect it" in sentence


@pytest.mark.parametrize(
    ("scale", "weight", "density"),
    [(0.002, 1.0, 0.5), (LARGE_SCALE, 1.0, 1.0), (LARGE_SCALE, 0.0, 0.5)],
    ids=["small deltas", "nothing dropped", "no part in the merge"],
)
def test_no_warning(scale: float, weight: float, density: float) -> None:
    watch = RangeWatch()
    watch.look(base(), [FineTuned("m", tuned(scale), weight, density)], "w")
    assert watch.warnings() == []


def test_small_tensors_are_looked_at_while_there_is_no_large_one() -> None:
    watch = RangeWatch()
    theta = tuned(LARGE_SCALE)

    def look(elements: int) -> int:
        """Return how many warnings there are after one more tensor."""
        shown = [t.flatten()[:elements] for t in (base(), theta)]
        watch.look(shown[0], [FineTuned("m", shown[1], 1.0, 0.5)], "w")
        seen = watch._seen.get("m")
        return 0 if seen is None else seen.elements

    assert look(range_watch.SMALLEST - 1) == 0
    assert look(range_watch.SMALLEST) == range_watch.SMALLEST
    assert look(20_000) == range_watch.SMALLEST + 20_000
    assert len(watch.warnings()) == 1
    assert look(20_000) == 20_000
    assert look(range_watch.LARGE_TENSOR) == 20_000 + range_watch.LARGE_TENSOR
    assert look(20_000) == 20_000 + range_watch.LARGE_TENSOR
    assert len(watch.warnings()) == 1
    for _ in range(range_watch.FEW + 10 * range_watch.EVERY):
        total = look(2048)
    assert total == (range_watch.FEW + 10) * 2048


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    watch = RangeWatch()
    theta_0, theta = base().to(dtype).t(), tuned(LARGE_SCALE).to(dtype)
    watch.look(theta_0, [FineTuned("m", theta.t(), 1.0, 0.5)], "w")
    before = [theta_0.clone(), theta.clone()]
    (sentence,) = watch.warnings()
    share = re.search(r"about (\d+\.\d)%", sentence)
    assert share is not None
    assert float(share[1]) == pytest.approx(1.2, abs=0.4)
    assert torch.equal(theta_0, before[0])
    assert torch.equal(theta, before[1])


def test_a_vector_of_every_second_element() -> None:
    """The elements in between are NaN: none of them may be looked at."""
    theta_0, theta = (
        torch.stack([t.flatten(), torch.full((SIDE * SIDE,), torch.nan)], dim=1)[:, 0]
        for t in (base(), tuned(LARGE_SCALE))
    )
    assert theta.stride() == (2,)
    watch = RangeWatch()
    watch.look(theta_0, [FineTuned("m", theta, 1.0, 0.5)], "w")
    assert len(watch.warnings()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [5000, zoo.VOCABULARY], ids=["large", "small"])
def test_a_real_merge(vocab_size: int, tmp_path: Path) -> None:
    """One line on stderr for the model whose deltas are large, none for the other; exit code 0."""
    size = {"vocab_size": vocab_size, "hidden_size": 128}
    zoo.make_family(zoo.llama_of(**size), tmp_path, names="a")
    zoo.make_family(zoo.llama_of(**size), tmp_path, names="b", scale=0.0095)
    config: Config = {
        "merge_method": "dare_ties",
        "base_model": str(tmp_path / "base"),
        "models": [
            {"model": str(tmp_path / name), "parameters": {"weight": 0.5, "density": 0.5}}
            for name in "ab"
        ],
        "tokenizer_source": None,
    }
    is_large = vocab_size * size["hidden_size"] >= range_watch.LARGE_TENSOR
    assert is_large == (vocab_size != zoo.VOCABULARY)
    path = write(config, tmp_path / "config.yml")
    said = run_command("mergekit-yaml", path, str(tmp_path / "out"), "--quiet").stderr
    (line,) = [line for line in said.splitlines() if "mergekit-dare inspect" in line]
    assert f"model {tmp_path / 'b'}: about " in line
    if is_large:
        assert re.search("most of all in tensor (lm_head|model.embed_tokens).weight", line)
    assert (tmp_path / "out" / "model.safetensors").exists()

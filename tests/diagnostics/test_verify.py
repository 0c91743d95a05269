"""``mergekit-dare verify``: each exit code, each pattern, and what it may take."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergekit_dare import __version__
from mergekit_dare.cli import main
from mergekit_dare.diagnostics import verification
from mergekit_dare.kernel import merging
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.merging import FineTuned, Recipe
from mergekit_dare.kernel.rounding import Rounding
from mergekit_dare.kernel.sampling import Sampling
from tests import zoo
from tests.running import (
    Config,
    dare,
    merge_multi,
    merge_pytorch,
    merge_yaml,
)

pytestmark = pytest.mark.slow

Tensors = dict[str, Tensor]
PROJ = "model.layers.1.mlp.up_proj.weight"


def verify(out: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["verify", str(out), "--quiet", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def edited(out: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Change the stored tensors of a merge in place."""
    tensors = change(zoo.load(out))
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors")
    return out


def merged(llamas: Path, folder: Path, **parameters: object) -> Path:
    merge_yaml(dare(llamas, seed=3, **parameters) | {"dtype": "bfloat16"}, folder)  # type: ignore[arg-type]
    return folder / "out"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "task_arithmetic", "slerp"])
def test_a_match(method: str, llamas: Path, tmp_path: Path) -> None:
    config = dare(llamas, method, "a", seed=3)
    if not method.startswith("dare"):
        del config["parameters"], config["models"][0]["parameters"]["density"]
    if method == "slerp":
        config["models"] = [{"model": str(llamas / name)} for name in ("base", "a")]
        config["parameters"] = {"t": 0.5}
    count = len(merge_yaml(config, tmp_path))
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, said = verify(tmp_path / "out")
    assert code == 0, said
    assert said.startswith(f"Identical to the byte: {count} tensors (")
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def flip(tensors: Tensors) -> Tensors:
    tensors[PROJ].view(-1).view(torch.int16)[17] ^= 1
    return tensors


def test_one_flipped_bit(llamas: Path, tmp_path: Path) -> None:
    out = edited(merged(llamas, tmp_path), flip)
    code, said = verify(out)
    assert code == 1
    assert "1 tensor differs" in said
    assert f"{PROJ}: 1 of 1,536 elements (0.1%) differ, by" in said
    assert said.count("\n") == 3  # why is not guessed at


def noise(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in tensors.items()}


PATTERNS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "zeros": (lambda t: {k: torch.zeros_like(v) for k, v in t.items()}, "all zeros"),
    "missing": (lambda t: {k: v for k, v in t.items() if k != PROJ}, f"missing: {PROJ}"),
    "additional": (lambda t: t | {"x": torch.ones(1)}, "additional: x"),
    "shape": (
        lambda t: t | {PROJ: t[PROJ][:3]},
        f"{PROJ}: shape [3, 32], but [48, 32] when merged again",
    ),
    "dtype": (
        lambda t: t | {PROJ: t[PROJ].float()},
        "dtype float32, but bfloat16 when merged again",
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str, llamas: Path, tmp_path: Path) -> None:
    change, message = PATTERNS[name]
    code, said = verify(edited(merged(llamas, tmp_path), change))
    assert code == 1
    assert message in said


def test_an_input_or_the_base_itself(llamas: Path, tmp_path: Path) -> None:
    out = merged(llamas, tmp_path)
    for name, message in (("base", "the base model's, not"), ("a", f"that of {llamas / 'a'}")):
        edited(out, lambda _, name=name: zoo.load(llamas / name))  # type: ignore[misc]
        code, said = verify(out)
        assert code == 1
        assert message in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 0}, "is the merge with seed: 0, but the config has 3"),
        ({"sampling": "magnitude"}, "is the merge with sampling: magnitude"),
        ({"rounding": "stochastic"}, "is the merge with rounding: stochastic"),
    ],
)
def test_another_recipe(
    change: dict[str, object], message: str, llamas: Path, tmp_path: Path
) -> None:
    out = merged(llamas, tmp_path)
    path = out / "mergekit_config.yml"
    config = yaml.safe_load(path.read_text())
    other = config | {"parameters": config["parameters"] | change}
    merge_yaml(other, tmp_path / "other")
    shutil.copy(path, tmp_path / "other" / "out")
    code, said = verify(tmp_path / "other" / "out")
    assert code == 1
    assert message in said


def test_what_cannot_be_told_for_certain_is_not_said(llamas: Path, tmp_path: Path) -> None:
    out = merged(llamas, tmp_path)
    config = yaml.safe_load((out / "mergekit_config.yml").read_text())
    other = config | {"parameters": config["parameters"] | {"seed": 987}}  # nobody would try it
    merge_yaml(other, tmp_path / "seed")
    shutil.copy(out / "mergekit_config.yml", tmp_path / "seed" / "out")
    code, said = verify(tmp_path / "seed" / "out")
    assert code == 1
    assert all("elements" in line for line in said.splitlines()[2:])


def test_the_seed_of_the_command_line(llamas: Path, tmp_path: Path) -> None:
    merge_yaml(dare(llamas), tmp_path, "--random-seed", "11")
    torch.manual_seed(5)
    assert verify(tmp_path / "out")[0] == 1
    code, said = verify(tmp_path / "out", "--random-seed", "11")
    assert code == 0, said


def test_rounded_elsewhere(llamas: Path, tmp_path: Path) -> None:
    config = dare(llamas, density=1.0, weight=0.3, seed=3) | {"dtype": "float32"}
    merge_yaml(config | {"out_dtype": "bfloat16"}, tmp_path)
    out = tmp_path / "out"
    assert verify(out)[0] == 0
    plain = config | {"dtype": "float16"}
    (tmp_path / "plain.yml").write_text(yaml.safe_dump(plain | {"out_dtype": "bfloat16"}))
    code, said = verify(out, "--config", str(tmp_path / "plain.yml"))
    assert code == 1
    assert "is the merge of float32 inputs, rounded afterwards" in said


def unverifiable(llamas: Path, tmp_path: Path) -> dict[str, tuple[Path, list[str], str]]:
    out = merged(llamas, tmp_path / "whole")
    without = shutil.copytree(out, tmp_path / "without")
    (without / "mergekit_config.yml").unlink()
    other = shutil.copytree(out, tmp_path / "other")
    card = (other / "README.md").read_text()
    (other / "README.md").write_text(card.replace("(mergekit-dare ", "(mergekit-dare 99."))
    own = shutil.copytree(out, tmp_path / "own")
    (own / "README.md").write_text("merged with [DARE TIES](x)")
    cut = shutil.copytree(out, tmp_path / "cut")
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    gone, elsewhere = tmp_path / "gone.yml", tmp_path / "elsewhere.yml"
    gone.write_text(yaml.safe_dump(dare(tmp_path / "nowhere", seed=1)))
    elsewhere.write_text(yaml.safe_dump(dare(Path("models/of/mine"), seed=1)))
    della = tmp_path / "della.yml"
    della.write_text(yaml.safe_dump(dare(llamas, "della")))
    return {
        "no model": (tmp_path / "none", [], "there is no model"),
        "no config": (without, [], "there is no config"),
        "another version": (other, [], "was merged by mergekit-dare 99."),
        "mergekit's own": (own, [], "mergekit's own dare_ties, which draws anew"),
        "a drawing method": (out, ["--config", str(della)], "mergekit's own della"),
        "a damaged output": (cut, [], f"{file} is truncated"),
        "a model that is gone": (
            out,
            ["--config", str(gone)],
            f"there is no model {tmp_path}/nowhere/a\n",
        ),
        "from another folder": (
            out,
            ["--config", str(elsewhere)],
            "there is no model models/of/mine/a; run verify in the folder where the merge was run",
        ),
    }


def test_what_cannot_be_told(llamas: Path, tmp_path: Path) -> None:
    for name, (out, arguments, message) in unverifiable(llamas, tmp_path).items():
        code, said = verify(out, *arguments)
        assert code == 2, (name, said)
        assert message in said, name
        assert said.count("\n") == 1, name


def test_quick_audits(llamas: Path, tmp_path: Path) -> None:
    out = edited(merged(llamas, tmp_path), flip)
    code, said = verify(out, "--tensors", "*norm*")
    assert code == 0
    assert "7 of 30 tensors" in said
    assert verify(out, "--tensors", "*mlp*")[0] == 1
    first, second = (verify(out, "--sample", "40%")[1] for _ in range(2))
    assert first == second
    assert " of 30 tensors" in first
    result = CliRunner().invoke(main, ["verify", str(out), "--sample", "200%"])
    assert result.exit_code == 2


def test_inputs(llamas: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        shutil.copytree(llamas / name, tmp_path / name)
    out = merged(tmp_path, tmp_path)
    code, record = verify(out, "--inputs")
    assert code == 0
    assert set(yaml.safe_load(record)["inputs"]) == {str(tmp_path / n) for n in ("base", "a", "b")}
    path = tmp_path / "inputs.yml"
    path.write_text(record)
    assert verify(out, "--inputs-from", str(path))[0] == 0
    edited(tmp_path / "a", flip)
    code, said = verify(out, "--inputs-from", str(path))
    assert code == 1
    assert said == f"{tmp_path / 'a'}: model.safetensors is not the file that was merged\n"


def slices(llamas: Path) -> Config:
    base, tuned = str(llamas / "base"), str(llamas / "a")
    source = {"layer_range": [0, 3], "parameters": {"weight": 0.5, "density": 0.5}}
    sources = [{"model": base, "layer_range": [0, 3]}, {"model": tuned} | source]
    return {
        "merge_method": "dare_ties",
        "base_model": base,
        "slices": [{"sources": sources}],
        "parameters": {"seed": 1},
    }


@pytest.mark.parametrize("kind", ["shards", "tokens", "slices", "modules", "pickled", "adapter"])
def test_other_ways_to_merge(kind: str, llamas: Path, tmp_path: Path) -> None:
    config, options = dare(llamas, seed=1), []
    if kind == "shards":
        options = ["--out-shard-size", "20K"]
    elif kind == "tokens":
        config["tokenizer_source"] = "union"
    elif kind == "slices":
        config = slices(llamas)
    elif kind == "modules":
        config["modules"] = {"default": {"models": config.pop("models")}}
    elif kind == "pickled":
        shutil.copytree(llamas / "a", tmp_path / "a")
        (tmp_path / "a" / "model.safetensors").unlink()
        torch.save(zoo.load(llamas / "a"), tmp_path / "a" / "pytorch_model.bin")
        config["models"][0]["model"] = str(tmp_path / "a")
    else:
        model = AutoModelForCausalLM.from_pretrained(llamas / "base", dtype=torch.float32)
        lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
        config = dare(llamas, names=[f"base+{tmp_path / 'adapter'}", "a"], seed=1)
        options = ["--lora-merge-cache", str(tmp_path / "cache")]
    merge_yaml(config, tmp_path, *options)
    code, said = verify(tmp_path / "out", *(options if kind == "adapter" else []))
    assert code == 0, said


def test_interrupting(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is none of the three answers, and leaves nothing behind."""
    out = merged(llamas, tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(verification, "_difference", interrupt)
    code, _ = verify(out)
    assert code == 130
    assert sorted(tmp_path.rglob("*")) == before


def test_single_files_and_several_configs(llamas: Path, tmp_path: Path) -> None:
    files = dare(llamas, names=["a/model.safetensors"], seed=1)
    files["base_model"] += "/model.safetensors"
    merge_pytorch(files, tmp_path / "pytorch")
    config = str(tmp_path / "pytorch" / "in.yml")
    code, said = verify(tmp_path / "pytorch" / "out", "--config", config)
    assert code == 0, said
    code, said = verify(edited(tmp_path / "pytorch" / "out", noise), "--config", config)
    assert (code, "30 tensors differ" in said) == (1, True), said
    steps = [dare(llamas, names="a", seed=1) | {"name": "one"}, dare(llamas, names="b", seed=1)]
    merge_multi(steps, tmp_path / "multi")
    config = str(tmp_path / "multi" / "in.yml")
    one = tmp_path / "multi" / "between" / "one"
    code, said = verify(one, "--config", config)
    assert (code, "choose one of these with --name" in said) == (2, True)
    assert verify(one, "--config", config, "--name", "one")[0] == 0


def test_memory_is_that_of_a_tensor(tmp_path: Path) -> None:
    """Of a model of 100 MB, no tensor is held longer than it is compared."""
    big = zoo.llama_of(
        vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3
    )
    zoo.make_family(big, tmp_path, names="a", max_shard_size="20MB")
    merge_yaml(dare(tmp_path, names="a", seed=1), tmp_path / "m", "--out-shard-size", "10M")
    out = tmp_path / "m" / "out"
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) > 100 << 20
    held: list[int] = []
    plain = verification._difference

    def weigh(name: str, actual: Tensor, expected: Tensor) -> verification.Difference | None:
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, Tensor)]
        held.append(sum(t.untyped_storage().nbytes() for t in tensors if t.numel() > 1 << 12))
        return plain(name, actual, expected)

    before = weigh_nothing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_difference", weigh)
        code, said = verify(out)
    assert code == 0, said
    assert max(held) - before < 100 << 20  # four tensors of 16 MB, and what they are compared in


def weigh_nothing() -> int:
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors if t.numel() > 1 << 12)


def bytes_of_this_version() -> dict[str, str]:
    """The sha256 of merges of every kind; the inputs are made of whole numbers alone."""
    numbers = torch.arange(5 * 40_000, dtype=torch.int64) * 2654435761 % 65536
    base, *tuned = ((numbers - 32768).double() / 2**22).view(5, 200, 200).unbind()
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for combine, sampling, rounding in itertools.product(Combine, Sampling, Rounding):
            recipe = Recipe(combine, "w", 7, normalize=True, sampling=sampling, rounding=rounding)
            models = [
                FineTuned(str(k), (base + theta / 16).to(dtype), 0.5 + k / 8, 0.1 + k / 4)
                for k, theta in enumerate(tuned)
            ]
            merged = merging.merge(base.to(dtype), models, recipe)
            key = f"{dtype} {combine.value} {sampling.value} {rounding.value}"
            data = merged.view(torch.uint8).numpy().tobytes()
            found[key] = hashlib.sha256(data).hexdigest()
    return found


def test_the_record_of_this_versions_bytes() -> None:
    """A release that changes masks or results cannot do so unnoticed."""
    recorded = json.loads((Path(__file__).parent / "recorded.json").read_text())
    assert verification.SAME_BYTES[-1] == __version__
    assert bytes_of_this_version() == recorded

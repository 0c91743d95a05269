"""``check --files`` and mergekit's own verdict over the same configs, on real small models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergekit_dare.diagnostics.checking import check_file
from mergekit_dare.diagnostics.findings import Severity
from tests import zoo
from tests.running import Config, dare, merge_pytorch, merge_yaml, write

pytestmark = pytest.mark.slow

Tensors = dict[str, Tensor]


def edit(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Copy a model, and change its dictionary of tensors."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = change(dict(load_file(source / "model.safetensors")))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_buffers(tensors: Tensors) -> Tensors:
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(3)}
    return tensors | extra


def as_fp8(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if "proj" not in name:
            out[name] = tensor
            continue
        scale = tensor.float().abs().max() / 448
        out[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        out[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1)
    return out


def as_int8(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if "proj" not in name:
            out[name] = tensor
            continue
        largest = tensor.float().abs().amax(1)
        out[name] = (tensor.float() / largest[:, None] * 127).round().to(torch.int8)
        out[name.replace(".weight", ".SCB")] = largest
    return out


def as_gptq(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if "proj" not in name:
            out[name] = tensor
            continue
        out[name.replace(".weight", ".qweight")] = torch.zeros(4, tensor.shape[0]).int()
        out[name.replace(".weight", ".scales")] = torch.ones(1, tensor.shape[0]).half()
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    zoo.make_family(zoo.ARCHITECTURES["llama"], folder, names="abc")
    edit(folder / "base", folder / "buffers", with_buffers)
    for name in ("base", "a"):
        for kind, change in (("fp8", as_fp8), ("int8", as_int8), ("gptq", as_gptq)):
            edit(folder / name, folder / f"{name}_{kind}", change)
            settings(folder / f"{name}_{kind}", quantization_config={"quant_method": kind})
    # Its config has kept the settings of a model that was dequantized.
    edit(folder / "a", folder / "dequantized", lambda tensors: tensors)
    settings(folder / "dequantized", quantization_config={"quant_method": "bitsandbytes"})
    edit(
        folder / "a", folder / "lacking", lambda t: {k: v for k, v in t.items() if "norm" not in k}
    )
    edit(folder / "base", folder / "more", lambda t: t | {"vision.weight": torch.ones(2, 2)})
    zoo.make_family(zoo.llama_of(num_hidden_layers=5), folder / "five", names="a")
    zoo.make_family(zoo.llama_of(num_key_value_heads=4), folder / "heads", names="a")
    zoo.make_family(zoo.llama_of(vocab_size=160), folder / "words", names="a")
    zoo.make_family(zoo.ARCHITECTURES["mistral"], folder / "mistral", names="a")
    zoo.make_family(zoo.ARCHITECTURES["gpt2"], folder / "gpt2", names="ab")
    edit(
        folder / "gpt2" / "base",
        folder / "gpt2" / "hub",
        lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()},
    )
    zoo.make_family(zoo.ARCHITECTURES["bert-classification"], folder / "bert", names="a")
    edit(
        folder / "bert" / "base",
        folder / "bert" / "headless",
        lambda t: {k: v for k, v in t.items() if not k.startswith("classifier")},
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    edit(folder / "a", folder / "a folder with spaces", lambda tensors: tensors)
    return folder


def merge_of(folder: Path, base: str, *names: str, **more: Any) -> Config:
    config = dare(folder, names=names, seed=1)
    config["base_model"] = str(folder / base)
    return config | {"dtype": "bfloat16"} | more


def sliced(folder: Path, *ranges: tuple[str, int, int]) -> Config:
    """One slice for each range: the base and, if it is not the base, the named model."""
    slices: list[dict[str, Any]] = []
    for name, first, last in ranges:
        sources: list[dict[str, Any]] = [
            {"model": str(folder / "base"), "layer_range": [first, last]}
        ]
        if name != "base":
            parameters = {"weight": 0.5, "density": 0.5}
            layers = [first, last]
            model = str(folder / name)
            sources.append({"model": model, "layer_range": layers, "parameters": parameters})
        slices.append({"sources": sources})
    return {
        "merge_method": "dare_ties",
        "base_model": str(folder / "base"),
        "slices": slices,
        "parameters": {"seed": 1},
    }


# Whether mergekit merges it, and what check says; "" for nothing.
Case = tuple[Callable[[Path], Config], bool, str]
CASES: dict[str, Case] = {
    "as it should be": (lambda f: merge_of(f, "base", "a", "b"), True, ""),
    "a folder with spaces": (lambda f: merge_of(f, "base", "a folder with spaces"), True, ""),
    "rotary buffers": (lambda f: merge_of(f, "buffers", "a"), True, ""),
    "names with another prefix": (lambda f: merge_of(f / "gpt2", "hub", "a", "b"), True, ""),
    "a tensor that no output has": (
        lambda f: merge_of(f, "more", "a"),
        True,
        "hint: tensor vision.weight of {f}/more is in no output",
    ),
    "an adapter": (
        lambda f: merge_of(f, "base", f"base+{f}/adapter", "a"),
        True,
        "",
    ),
    "no adapter": (
        lambda f: merge_of(f, "base", f"a+{f}/none"),
        False,
        "there is no adapter folder",
    ),
    "a model as an adapter": (
        lambda f: merge_of(f, "base", f"a+{f}/b"),
        False,
        "it has no adapter_config.json",
    ),
    "dequantized": (lambda f: merge_of(f, "base", "dequantized"), True, ""),
    "fp8": (lambda f: merge_of(f, "base", "a_fp8", "b"), False, "is quantized (fp8)"),
    "fp8 base": (lambda f: merge_of(f, "base_fp8", "a"), False, "is quantized (fp8)"),
    "int8": (lambda f: merge_of(f, "base", "a_int8", "b"), False, "is quantized (int8)"),
    "gptq": (lambda f: merge_of(f, "base", "a_gptq"), False, "is quantized (gptq)"),
    "a tensor is missing": (
        lambda f: merge_of(f, "base", "lacking"),
        False,
        "input_layernorm.weight and 6 more, which are missing from {f}/lacking",
    ),
    "the base lacks its head": (
        lambda f: merge_of(f / "bert", "headless", "a"),
        False,
        "tensor classifier.bias and 1 more, which are missing from {f}/bert/headless",
    ),
    "more layers": (
        lambda f: merge_of(f, "base", "five/a"),
        False,
        "{f}/five/a has 5 layers (not 3), so it was not fine-tuned from {f}/base",
    ),
    "other heads": (
        lambda f: merge_of(f, "base", "heads/a", tokenizer_source="union"),
        False,
        "{f}/heads/a has 4 key-value heads (not 2), so it was not fine-tuned from {f}/base",
    ),
    "another vocabulary": (
        lambda f: merge_of(f, "base", "words/a"),
        False,
        "the vocabularies differ: set tokenizer_source",
    ),
    "another vocabulary, aligned": (
        lambda f: merge_of(f, "base", "words/a", tokenizer_source="base"),
        True,
        "",
    ),
    "another architecture": (
        lambda f: merge_of(f, "base", "mistral/a"),
        False,
        "is MistralForCausalLM (mistral), but that of {f}/base is LlamaForCausalLM (llama)",
    ),
    "a slice of the base alone": (lambda f: sliced(f, ("base", 0, 1), ("a", 1, 3)), True, ""),
    "an empty slice for the head": (lambda f: sliced(f, ("a", 0, 3), ("base", 3, 3)), True, ""),
    "beyond the layers": (
        lambda f: sliced(f, ("a", 0, 2), ("a", 2, 4)),
        False,
        "layer_range ends at 4, but",
    ),
    "the mapping form of a model": (
        lambda f: (
            merge_of(f, "base", "a")
            | {
                "models": [
                    {"model": {"model": {"path": str(f / "base")}}},
                    {"model": str(f / "a"), "parameters": {"weight": 0.5, "density": 0.5}},
                ]
            }
        ),
        True,
        "",
    ),
    "a home folder": (
        lambda f: merge_of(f, "base") | {"models": [entry("~/model")]},
        False,
        "mergekit does not expand ~",
    ),
    "a name that no file can have": (
        lambda f: merge_of(f, "base") | {"models": [entry("/" + "x" * 5000)]},
        False,
        "cannot be read",
    ),
}


def entry(name: str) -> dict[str, Any]:
    return {"model": name, "parameters": {"weight": 0.5, "density": 0.5}}


@pytest.mark.parametrize("name", CASES)
def test_the_same_verdict(name: str, models: Path, tmp_path: Path) -> None:
    make, merges, expected = CASES[name]
    config = make(models)
    findings = check_file(write(config, tmp_path / "config.yml"), files=True)
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    assert bool(errors) != merges, findings
    if expected:
        said = [f"{finding.severity.value}: {finding.message}" for finding in findings]
        assert [line for line in said if expected.format(f=models) in line], said
    else:
        assert findings == []
    cache = ["--lora-merge-cache", str(tmp_path / "cache")]
    if merges:
        merge_yaml(config, tmp_path, *cache)
    else:
        with pytest.raises((Exception, SystemExit)):
            merge_yaml(config, tmp_path, *cache)


def test_single_files(models: Path, tmp_path: Path) -> None:
    """As mergekit-pytorch takes them, with or without --tensor-intersection."""
    tensors = load_file(models / "base" / "model.safetensors")
    save_file(tensors | {"cls.bias": torch.ones(8)}, tmp_path / "base.safetensors")
    shutil.copy(models / "a" / "model.safetensors", tmp_path / "a.safetensors")
    config = dare(tmp_path, names=["a.safetensors"], seed=1)
    config["base_model"] += ".safetensors"
    (finding,) = check_file(write(config, tmp_path / "c.yml"), files=True)
    assert finding.severity is Severity.WARNING
    assert "tensor cls.bias of" in finding.message
    assert "--tensor-intersection" in finding.message
    assert merge_pytorch(config, tmp_path, "--tensor-intersection")


def test_an_index_beside_a_whole_file(models: Path, tmp_path: Path) -> None:
    """mergekit reads the index where there is one, and ignores the file beside it."""
    folder = tmp_path / "a"
    shutil.copytree(models / "a", folder)
    tensors = load_file(folder / "model.safetensors")
    names = dict.fromkeys(tensors, "model-1-of-1.safetensors")
    save_file(tensors, folder / "model-1-of-1.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "model.safetensors").write_bytes(b"stale")
    config = merge_of(models, "base", str(folder))
    path = write(config, tmp_path / "c.yml")
    assert [finding.rule for finding in check_file(path, files=True)] == ["two-sets-of-weights"]
    (folder / "model-1-of-1.safetensors").unlink()
    (finding, _) = check_file(path, files=True)
    assert "model-1-of-1.safetensors is missing, but listed in" in finding.message


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "settings that are a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json contains no settings",
    ),
    "an index that names a folder": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "."}}'),
        "is missing, but listed in",
    ),
    "an empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged"),
    "a header without tensors": (
        lambda f: save_file({}, f / "model.safetensors"),
        "contains no tensors",
    ),
    "an unknown dtype": (lambda f: header(f, '"dtype":"F99"'), "is damaged"),
    "an infinite offset": (lambda f: header(f, '"dtype":"F32"', "Infinity"), "is damaged"),
}


def header(folder: Path, dtype: str, end: str = "4") -> None:
    text = f'{{"a":{{{dtype},"shape":[1],"data_offsets":[0,{end}]}}}}'.encode()
    data = len(text).to_bytes(8, "little") + text + bytes(4)
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files(name: str, models: Path, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    shutil.copytree(models / "a", tmp_path / "a")
    damage(tmp_path / "a")
    config = merge_of(models, "base", str(tmp_path / "a"))
    findings = check_file(write(config, tmp_path / "c.yml"), files=True)
    assert [finding for finding in findings if message in finding.message], findings

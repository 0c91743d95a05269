"""``check --files`` over models of this machine: what it finds, and what it leaves alone.

The models are real ones, saved by transformers and tokenizers, of which one thing was changed.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from mergekit_dare.diagnostics.checking import check_file
from mergekit_dare.diagnostics.findings import Finding, Severity
from tests import zoo
from tests.running import Config, dare, merge_yaml, write

ERROR, WARNING = Severity.ERROR, Severity.WARNING
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    zoo.make_family(zoo.ARCHITECTURES["llama"], folder, names="a")
    return folder


def found(config: Config, folder: Path) -> list[Finding]:
    findings = check_file(write(config, folder / "check.yml"), files=True)
    return [finding for finding in findings if finding.severity is not Severity.HINT]


def edited(models: Path, folder: Path, edit: Edit, name: str = "a") -> Config:
    """Copy the models, change one of them, and return a config that merges them."""
    shutil.copytree(models, folder, dirs_exist_ok=True)
    edit(folder / name)
    return dare(folder, names="a", seed=1)


def settings(file: str = "config.json", **changes: Any) -> Edit:
    """Change keys of a JSON file; ``None`` removes one."""

    def edit(model: Path) -> None:
        path = model / file
        content = json.loads(path.read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        path.write_text(json.dumps(content))

    return edit


def rope(**changes: Any) -> Edit:
    def edit(model: Path) -> None:
        content = json.loads((model / "config.json").read_text())
        content["rope_parameters"] |= changes
        (model / "config.json").write_text(json.dumps(content))

    return edit


def remade(architecture: str, **changes: Any) -> Edit:
    """Put a different model in its place."""

    def edit(model: Path) -> None:
        shutil.rmtree(model)
        maker = zoo.llama_of(**changes) if changes else zoo.ARCHITECTURES[architecture]
        torch.manual_seed(0)
        maker().to(torch.bfloat16).save_pretrained(model)
        zoo.tokenizer().save_pretrained(model)

    return edit


def tokens(**options: Any) -> Edit:
    return lambda model: zoo.tokenizer(**options).save_pretrained(model)


def swapped(count: int) -> list[int]:
    order = list(range(zoo.VOCABULARY))
    order[10 : 10 + count] = order[10 : 10 + count][::-1]
    return order


def adapter(model: Path) -> None:
    made = LlamaForCausalLM.from_pretrained(model)
    shutil.rmtree(model)
    get_peft_model(made, LoraConfig(target_modules=["q_proj"])).save_pretrained(model)


def only_gguf(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.Q4_K_M.gguf").write_bytes(b"GGUF")


def only_pickled(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")


def shard_missing(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    weight_map[next(iter(tensors))] = "model-00002-of-00002.safetensors"
    save_file(tensors, model / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def codes(dtype: torch.dtype) -> Edit:
    def edit(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(dtype)
        save_file(tensors, model / "model.safetensors")

    return edit


def gptq(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj."
    tensors[name + "qweight"] = torch.zeros(4, 48, dtype=torch.int32)
    tensors[name + "scales"] = torch.ones(1, 48)
    del tensors[name + "weight"]
    save_file(tensors, model / "model.safetensors")
    settings(quantization_config={"quant_method": "gptq", "bits": 4})(model)


def no_tokenizer(model: Path) -> None:
    for file in model.glob("token*"):
        file.unlink()


def template(text: str) -> Edit:
    return lambda model: (model / "chat_template.jinja").write_text(text)


# What is done to a model, and what is said of it.
CASES: dict[str, tuple[Edit, Severity, str]] = {
    "architecture": (remade("mistral"), ERROR, "is MistralForCausalLM (mistral), but that of"),
    "model type": (settings(model_type="mistral"), ERROR, "mergekit refuses to mix architectures"),
    "layers": (
        remade("", num_hidden_layers=2),
        ERROR,
        "has 2 layers (not 3), so it was not fine-tuned from",
    ),
    "heads": (
        remade("", num_attention_heads=2, num_key_value_heads=2, head_dim=16),
        ERROR,
        "has 2 attention heads (not 4), head size 16 (not 8)",
    ),
    "key-value heads": (remade("", num_key_value_heads=4), ERROR, "has 4 key-value heads (not 2)"),
    "hidden size": (remade("", hidden_size=64), ERROR, "has hidden size 64 (not 32)"),
    "intermediate size": (
        remade("", intermediate_size=56),
        ERROR,
        "has intermediate size 56 (not 48)",
    ),
    "head size": (remade("", head_dim=16), ERROR, "has head size 16 (not 8)"),
    "GPTQ": (
        gptq,
        ERROR,
        "is quantized (gptq)",
    ),
    "fp8": (codes(torch.float8_e4m3fn), ERROR, "is quantized (tensor model.layers.0.mlp.up_proj"),
    "int8": (codes(torch.int8), ERROR, "is quantized (tensor model.layers.0.mlp.up_proj"),
    "adapter": (adapter, ERROR, "is an adapter, not a model: write BASE+"),
    "GGUF": (only_gguf, ERROR, "has its weights only as GGUF"),
    "pickled": (only_pickled, WARNING, "are available only as pickles"),
    "a shard": (shard_missing, ERROR, "model-00002-of-00002.safetensors is missing, but listed in"),
    "rope_theta": (rope(rope_theta=1e6), WARNING, "rope_theta is 1000000.0 in"),
    "rope_scaling": (
        rope(rope_type="linear", factor=2.0),
        WARNING,
        "rope_scaling is",
    ),
    "rms_norm_eps": (settings(rms_norm_eps=1e-5), WARNING, "rms_norm_eps is"),
    "hidden_act": (
        settings(hidden_act="gelu"),
        WARNING,
        "with an activation function that they were not trained with",
    ),
    "tied": (settings(tie_word_embeddings=True), WARNING, "is a copy of its embeddings"),
    "lengths": (
        settings(max_position_embeddings=512),
        WARNING,
        "max_position_embeddings is 512 in",
    ),
    "other ids": (tokens(order=swapped(40)), ERROR, "40 tokens of"),
    "two other ids": (
        tokens(order=[0, 1, 2, 3, 5, 4, *range(6, zoo.VOCABULARY)]),
        ERROR,
        "have different ids in",
    ),
    "an added token": (tokens(added=("<|im_start|>",)), WARNING, "1 token of"),
    "tokens that it lacks": (tokens(size=100), WARNING, "28 tokens of"),
    "eos": (
        settings("tokenizer_config.json", eos_token="<unk>"),
        WARNING,
        "eos_token is",
    ),
    "eos by id": (
        lambda model: (
            [
                settings("tokenizer_config.json", eos_token=None)(m)
                for m in (model, model.parent / "base")
            ]
            and settings(eos_token_id=5)(model)
        ),
        WARNING,
        "eos_token is id 5 in",
    ),
    "chat template": (template("{{ messages }}"), WARNING, "inherits, has none: the merged model"),
    "damaged tokenizer": (
        lambda model: (model / "tokenizer.json").write_text('{"model": '),
        WARNING,
        "tokenizer.json cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str, models: Path, tmp_path: Path) -> None:
    edit, severity, message = CASES[name]
    findings = found(edited(models, tmp_path, edit), tmp_path)
    matching = [finding for finding in findings if message in finding.message]
    assert len(matching) == 1, findings
    assert matching[0].severity is severity
    assert matching[0].text == f"- model: {tmp_path / 'a'}"
    assert "\n" not in matching[0].message


HARMLESS: dict[str, Edit] = {
    "as it was": lambda model: None,
    "dtype of the settings": settings(dtype="float32"),
    "release": settings(transformers_version="4.31.0"),
    "name": settings(_name_or_path="somebody/else"),
    "use_cache": settings(use_cache=False),
    "generation settings": settings("generation_config.json", temperature=0.1, do_sample=True),
    "old names": settings(torch_dtype="bfloat16", dtype=None),
    "old rope": settings(rope_parameters=None, rope_theta=10000.0, rope_scaling=None),
    "a default left out": settings(rope_parameters=None),
    "no tokenizer": no_tokenizer,
    "a GGUF file beside": lambda model: (model / "a.gguf").write_bytes(b"GGUF"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless(name: str, models: Path, tmp_path: Path) -> None:
    config = edited(models, tmp_path, HARMLESS[name])
    assert found(config, tmp_path) == []


# mergekit 0.1.5 cannot plan a bare encoder.
@pytest.mark.parametrize("name", sorted(zoo.ARCHITECTURES.keys() - {"bert"}))
def test_well_behaved_families(name: str, tmp_path: Path) -> None:
    zoo.make_family(zoo.ARCHITECTURES[name], tmp_path, names="ab")
    assert found(dare(tmp_path, seed=1), tmp_path) == []


def test_what_the_config_takes_care_of(models: Path, tmp_path: Path) -> None:
    """Tokens with tokenizer_source; a chat template with chat_template, or from its model."""

    def several(model: Path) -> None:
        tokens(order=swapped(40), added=())(model)
        settings("tokenizer_config.json", eos_token="<unk>")(model)

    config = edited(models, tmp_path, several)
    assert len(found(config, tmp_path)) == 2
    for source in ("base", "union", str(tmp_path / "a")):
        assert found(config | {"tokenizer_source": source}, tmp_path) == []
        assert found(config | {"tokenizer": {"source": source}}, tmp_path) == []
    template("{{ messages }}")(tmp_path / "a")
    assert len(found(config | {"tokenizer_source": "union"}, tmp_path)) == 1
    assert found(config | {"tokenizer_source": str(tmp_path / "a")}, tmp_path) == []
    assert found(config | {"tokenizer_source": "union", "chat_template": "auto"}, tmp_path) == []
    template("{{ messages }}")(tmp_path / "base")
    assert found(config | {"tokenizer_source": "union"}, tmp_path) == []
    template("{{ other }}")(tmp_path / "base")
    (finding,) = found(config | {"tokenizer_source": "union"}, tmp_path)
    assert "has a different one" in finding.message


def test_a_tokenizer_that_mergekit_cannot_build(models: Path, tmp_path: Path) -> None:
    config = edited(
        models, tmp_path, lambda model: (model / "tokenizer.json").write_text("{}"), "base"
    )
    assert found(config, tmp_path) == []
    (finding,) = found(config | {"tokenizer_source": "union"}, tmp_path)
    assert finding.severity is ERROR
    assert "mergekit cannot build the tokenizer" in finding.message
    assert finding.text == "tokenizer_source: union"


def test_slices_may_have_other_numbers_of_layers(models: Path, tmp_path: Path) -> None:
    config = edited(models, tmp_path, remade("", num_hidden_layers=5))
    sources = [
        {"model": str(tmp_path / "base"), "layer_range": [0, 2]},
        {"model": str(tmp_path / "a"), "layer_range": [0, 2], "parameters": {"weight": 0.5}},
    ]
    config |= {"slices": [{"sources": sources}]}
    del config["models"]
    config["parameters"] = {"seed": 1, "density": 0.5}
    assert [f.message for f in found(config, tmp_path)] == []


def test_room_on_the_disk(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = edited(models, tmp_path, lambda model: None)
    assert found(config, tmp_path) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000))
    (finding,) = found(config, tmp_path)
    assert finding.severity is WARNING
    assert "the merge needs 0.1 MB" in finding.message


def test_names_that_mergekit_asks_the_hub_for(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that could be the hub's makes a merge fail at its end, offline; ./ fixes it."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name, asks in (("a", True), ("./a", False), (str(tmp_path / "a"), False)):
        config = dare(tmp_path, names="a", seed=1)
        config["models"][0]["model"] = name
        messages = [finding.message for finding in found(config, tmp_path)]
        assert len(messages) == asks
        if asks:
            assert "asks the hub whether it has a model a" in messages[0]
            assert messages[0].endswith("because HF_HUB_OFFLINE is set; write ./a")
            with pytest.raises(OfflineModeIsEnabled):
                merge_yaml(config, tmp_path / "merge")
        else:
            merge_yaml(config, tmp_path / "merge")


JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
VALUES: tuple[Any, ...] = (
    None,
    [],
    {},
    "",
    "x",
    0,
    -1,
    1e308,
    True,
    [[]],
    {"a": {}},
    "\ud800",
    "a\nb",
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_mutated_files(seed: int, models: Path, tmp_path: Path) -> None:
    """50 times a value replaced, a byte changed, or the end cut off; never a traceback."""
    generator = random.Random(seed)
    config = edited(models, tmp_path, template("{{ messages }}"))
    for _ in range(50):
        name = generator.choice(JSON_FILES)
        path = tmp_path / "a" / name
        whole = path.read_bytes()
        if name.endswith(".json") and generator.random() < 0.7:
            content = json.loads(whole)
            _mutate(content, generator)
            path.write_text(json.dumps(content))
        elif generator.random() < 0.5:
            path.write_bytes(whole[: generator.randrange(min(len(whole), 4000))])
        else:
            place = generator.randrange(min(len(whole), 4000))
            path.write_bytes(whole[:place] + generator.randbytes(1) + whole[place + 1 :])
        for finding in check_file(write(config, tmp_path / "check.yml"), files=True):
            assert "\n" not in finding.message
        path.write_bytes(whole)


def _mutate(content: Any, generator: random.Random) -> None:
    """Replace a value somewhere in a JSON document, or remove it."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    if not keys:
        return
    key = generator.choice(keys)
    if isinstance(content[key], dict | list) and content[key] and generator.random() < 0.7:
        _mutate(content[key], generator)
    elif generator.random() < 0.2:
        del content[key]
    else:
        content[key] = generator.choice(VALUES)

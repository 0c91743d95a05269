"""``mergekit-dare by-name``: mergekit-yaml's bytes, whole models of any kind, nothing half done."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mergekit.io.tasks import SaveTensor
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from mergekit_dare.cli import main
from tests import zoo
from tests.hub_server import COMMIT, serve
from tests.running import SCRIPTS, Config, dare, merge_pytorch, merge_yaml, run_command, write

PROJ = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


def run(*arguments: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and all that it said."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def by_name(config: Config, folder: Path, *options: str) -> tuple[int, str]:
    """Merge a config into ``folder/out``."""
    path = write(config, folder / "by_name.yml")
    return run("by-name", path, str(folder / "out"), "--quiet", *options)


def merged(config: Config, folder: Path, *options: str) -> Tensors:
    """Merge a config into ``folder/out``; return its tensors."""
    code, said = by_name(config, folder, *options)
    assert code == 0, said
    return zoo.load(folder / "out")


def refused(config: Config, folder: Path, *options: str) -> str:
    """Try to merge a config; return the one line that says why it is not, and nothing is left."""
    write(config, folder / "by_name.yml")
    before = sorted(folder.iterdir())
    code, said = by_name(config, folder, *options)
    assert code == 2, said
    assert said.count("\n") == 1, said
    assert sorted(folder.iterdir()) == before
    return said


def copies(models: Path, folder: Path, names: tuple[str, ...] = ("base", "a", "b")) -> Path:
    """Copy models, to be changed."""
    for name in names:
        shutil.copytree(models / name, folder / name)
    return folder


def edit(model: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = model / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


METHODS: dict[str, Config] = {
    "dare_ties": {"parameters": {"seed": 3}},
    "dare_linear": {"parameters": {"seed": 3, "normalize": True, "rounding": "stochastic"}},
    "task_arithmetic": {},
    "ties": {},
    "linear": {"base_model": None},
    "slerp": {"parameters": {"t": [0, 0.5, 0.3]}},
}


def of_method(method: str, models: Path) -> Config:
    config = dare(models, method) | METHODS[method]
    if method == "slerp":
        config["models"] = [{"model": str(models / name)} for name in ("base", "a")]
    return {key: value for key, value in config.items() if value is not None}


KINDS: dict[str, tuple[Config, list[str]]] = {
    "as stored": ({}, []),
    "dtype": ({"dtype": "float32"}, []),
    "out_dtype": ({"dtype": "float32", "out_dtype": "float16"}, ["--out-shard-size", "9K"]),
}
FAMILIES = ("llama", "llama-tied", "mistral", "qwen3", "gpt2", "bert-classification")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_bytes_of_mergekit_yaml(architecture: str, tmp_path: Path) -> None:
    """Its files' names and config.json, too."""
    models = tmp_path / "models"
    zoo.make_family(zoo.ARCHITECTURES[architecture], models, names="ab")
    for method in METHODS:
        for kind, (settings, options) in KINDS.items():
            folder = tmp_path / method / kind
            config = of_method(method, models) | settings
            expected = merge_yaml(config, folder / "yaml", *options)
            zoo.assert_same_tensors(merged(config, folder, *options), expected)
            out, theirs = folder / "out", folder / "yaml" / "out"
            assert {f.name for f in out.iterdir()} == {f.name for f in theirs.iterdir()}
            ours, other = (json.loads((f / "config.json").read_text()) for f in (out, theirs))
            assert ours == other


SETTINGS: dict[str, Any] = {
    "gradient": [0.2, 0.9, 0.4],
    "filters": [{"filter": "self_attn", "value": 0.9}, {"filter": "mlp", "value": 0.3}, 0.5],
    "gradients in filters": [{"filter": "mlp", "value": [0.1, 1.0]}, {"value": 0.5}],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_parameters_of_layers_and_filters(setting: str, llamas: Path, tmp_path: Path) -> None:
    value = SETTINGS[setting]
    if setting == "filters":
        value[-1] = {"value": value[-1]}
    config = dare(llamas, seed=1)
    config["models"][0]["parameters"]["density"] = value
    config["models"][1]["parameters"] = {"weight": 0.5}
    config["parameters"]["density"] = value[::-1] if setting == "gradient" else value
    zoo.assert_same_tensors(merged(config, tmp_path), merge_yaml(config, tmp_path / "yaml"))


_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_WHISPER: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# Most of them lose weights with mergekit-yaml, or are refused by it.
OTHERS: dict[str, zoo.Maker] = {
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_TEXT)),
    "deepseek-v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**_TEXT | _DEEPSEEK)),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**_TEXT),
            vision_config=CLIPVisionConfig(**_VISION),
            image_token_index=5,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**_WHISPER)),
    "bert": lambda: BertForMaskedLM(BertConfig(**_TEXT)),
    "clip": lambda: CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(**_TEXT).to_dict(),
            vision_config=CLIPVisionConfig(**_VISION).to_dict(),
            projection_dim=16,
        )
    ),
}


def whole(kind: type[PreTrainedModel], folder: Path) -> Tensors:
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    state: Tensors = model.state_dict()
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_any_kind_come_out_whole(name: str, tmp_path: Path) -> None:
    """At density 1 and weight 1, one fine-tuned model comes out as it is, tied weights tied."""
    zoo.make_family(OTHERS[name], tmp_path, names="a")
    config = dare(tmp_path, "dare_linear", "a", weight=1.0, density=1.0, seed=1)
    tensors = merged(config | {"dtype": "bfloat16"}, tmp_path)
    assert tensors.keys() == zoo.load(tmp_path / "base").keys()
    kind = type(OTHERS[name]())
    zoo.assert_same_tensors(whole(kind, tmp_path / "out"), whole(kind, tmp_path / "a"))
    code, said = run("verify", str(tmp_path / "out"), "--quiet")
    assert code == 0, said


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """Stored once, or, as some trainers do it, under both names."""
    zoo.make_family(zoo.ARCHITECTURES["llama-tied"], tmp_path, names="ab")
    config = dare(tmp_path, seed=3)
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    once = merged(config, tmp_path / "once")
    assert head not in once
    for name in ("base", "a", "b"):
        edit(tmp_path / name, lambda tensors: tensors | {head: tensors[embeddings].clone()})
    twice = merged(config, tmp_path / "twice")
    for name in (head, embeddings):
        zoo.assert_same_tensors({"": twice[name]}, {"": once[embeddings]})


def test_buffers_are_the_bases(llamas: Path, tmp_path: Path) -> None:
    """Integers and truth values, which no method can merge: equal, other, or nowhere else."""
    models = copies(llamas, tmp_path / "models")
    buffers = {"x.ids": torch.arange(5), "x.mask": torch.tensor([True, False])}
    edit(models / "base", lambda tensors: tensors | buffers)
    edit(
        models / "a",
        lambda tensors: tensors | {"x.ids": torch.arange(5) + 1, "y": buffers["x.ids"]},
    )
    config = dare(models, seed=3) | {"dtype": "float32", "out_dtype": "bfloat16"}
    tensors = merged(config, tmp_path)
    found = {name: tensors.pop(name) for name in buffers}
    zoo.assert_same_tensors(found, buffers)
    zoo.assert_same_tensors(tensors, merged(config | dare(llamas, seed=3), tmp_path / "without"))
    code, said = run("verify", str(tmp_path / "out"), "--quiet")
    assert code == 0, said


def test_buffers_of_older_releases(llamas: Path, tmp_path: Path) -> None:
    """Those that only some of the models have are the base's, as they are there."""
    models = copies(llamas, tmp_path / "models")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(models / "base", lambda tensors: tensors | {name: torch.ones(4)})
    edit(models / "b", lambda tensors: tensors | {"x.attn.bias": torch.zeros(2)})
    tensors = merged(dare(models, seed=3) | {"dtype": "bfloat16"}, tmp_path)
    zoo.assert_same_tensors({name: tensors.pop(name)}, {name: torch.ones(4)})
    zoo.assert_same_tensors(tensors, merged(dare(llamas, seed=3), tmp_path / "without"))


def test_small_files_come_along(llamas: Path, tmp_path: Path) -> None:
    """Folders with spaces; sentence-transformers' modules; no weights, no old shards, no git."""
    models = copies(llamas, tmp_path / "my models")
    base = models / "base"
    taken = {
        "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "../a"}]',
        "1_Pooling/config.json": "{}",
        "preprocessor_config.json": "{}",
        "vocab.txt": "a\nb\n",
        "modeling_own.py": "",
        "LICENSE": "",
    }
    left = {
        "README.md": "the base's",
        "pytorch_model.bin": "",
        "model.safetensors.index.json.old.onnx": "",
        "tf_model.h5": "",
        "flax_model.msgpack": "",
        "rust_model.ot": "",
        "old.gguf": "",
        ".git/config": "",
        ".gitattributes": "",
        "onnx/config.json": "{}",
        "pytorch_model.bin.index.json": "{}",
    }
    for name, content in (taken | left).items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(content)
    with (base / "large.txt").open("wb") as file:
        file.truncate(65 << 20)
    merged(dare(models, seed=1), tmp_path)
    out = tmp_path / "out"
    for name, content in taken.items():
        assert (out / name).read_text() == content
    written = {"model.safetensors", "README.md", "mergekit_config.yml", "config.json"}
    copied = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == written | copied | taken.keys()
    assert "the base's" not in (out / "README.md").read_text()
    assert run("verify", str(out), "--quiet")[0] == 0


def test_weights_of_other_modules(llamas: Path, tmp_path: Path) -> None:
    """Those of a Dense module are kept if all models have the same, and never lost."""
    models = copies(llamas, tmp_path / "models")
    for name in ("base", "a", "b"):
        (models / name / "2_Dense").mkdir()
        (models / name / "modules.json").write_text('[{"path": "2_Dense"}]')
        save_file({"linear": torch.ones(3)}, models / name / "2_Dense" / "model.safetensors")
    merged(dare(models, seed=1), tmp_path / "same")
    assert (tmp_path / "same" / "out" / "2_Dense" / "model.safetensors").is_file()
    save_file({"linear": torch.zeros(3)}, models / "b" / "2_Dense" / "model.safetensors")
    said = refused(dare(models, seed=1), tmp_path / "other")
    assert f"2_Dense/model.safetensors is not the same in {models / 'b'}" in said


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("wanted", ["auto", "chatml", TEMPLATE])
def test_chat_templates(wanted: str, llamas: Path, tmp_path: Path) -> None:
    models = copies(llamas, tmp_path / "models")
    for name, template in (("base", TEMPLATE + "!"), ("a", TEMPLATE), ("b", TEMPLATE)):
        tokenizer = AutoTokenizer.from_pretrained(models / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(models / name)
    file = models / "base" / "tokenizer_config.json"  # as older releases have it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE + "?"}))
    config = dare(models, seed=1) | {"chat_template": wanted}
    merged(config, tmp_path)
    merge_yaml(config, tmp_path / "yaml")
    ours, theirs = (
        AutoTokenizer.from_pretrained(folder)
        for folder in (tmp_path / "out", tmp_path / "yaml/out")
    )
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    assert "?" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_tokenizers(llamas: Path, tmp_path: Path) -> None:
    """That of the base, or of a model with the same tokens, as the config has it."""
    models = copies(llamas, tmp_path / "models")
    file = models / "a" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<unk>"}))
    plain = dare(models, seed=1)
    cases: list[tuple[Config, str]] = [
        ({}, "base"),
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer_source": str(models / "a")}, "a"),
        ({"tokenizer": {"source": str(models / "a")}}, "a"),
    ]
    for number, (settings, source) in enumerate(cases):
        merged(plain | settings, tmp_path / str(number))
        found = tmp_path / str(number) / "out" / "tokenizer_config.json"
        assert found.read_text() == (models / source / found.name).read_text()
    merged(plain, tmp_path / "none", "--no-copy-tokenizer")
    assert not list((tmp_path / "none" / "out").glob("tokenizer*"))


def test_what_needs_an_architecture(llamas: Path, tmp_path: Path) -> None:
    models = copies(llamas, tmp_path / "models")
    zoo.tokenizer(order=[*range(4), *range(127, 3, -1)]).save_pretrained(models / "b")
    plain = dare(models, seed=1)
    source = {"layer_range": [0, 3], "parameters": {"weight": 0.5}}
    sources = [{"model": str(models / name)} | source for name in ("base", "a")]
    listless = {key: value for key, value in plain.items() if key != "models"}
    with_tokens = {"source": "base", "tokens": {"<x>": {"source": str(models / "a")}}}
    for config, message in (
        (listless | {"slices": [{"sources": sources}]}, "slices and modules need"),
        (
            listless | {"modules": {"default": {"models": plain["models"]}}},
            "slices and modules need",
        ),
        (plain | {"tokenizer_source": "union"}, "a union of tokenizers"),
        (plain | {"tokenizer": {"tokens": {}}}, "a union of tokenizers"),
        (plain | {"tokenizer": with_tokens}, "tokens and pad_to_multiple_of"),
        (
            plain | {"tokenizer_source": "base"},
            f"{models / 'b'} has other tokens than {models / 'base'}",
        ),
        (plain | {"chat_template": "no such"}, "Invalid chat template: no such"),
        (plain | {"merge_method": "dare_tiez"}, "dare_tiez"),
        (plain | {"dtype": "bfloat17"}, "bfloat17"),
    ):
        assert message in refused(config, tmp_path / "refused")


def test_a_file_of_several_configs(llamas: Path, tmp_path: Path) -> None:
    path = write([dare(llamas, seed=1), dare(llamas, seed=2)], tmp_path / "c.yml")
    code, said = run("by-name", path, str(tmp_path / "out"))
    assert (code, said) == (2, f"{path} has 2 configs: by-name takes one\n")


@pytest.mark.slow
def test_gradients_over_several_stacks(tmp_path: Path) -> None:
    zoo.make_family(OTHERS["t5"], tmp_path, names="a")
    config = dare(tmp_path, names="a", seed=1)
    config["models"][0]["parameters"]["density"] = [
        {"filter": "x", "value": [0.1, 0.9]},
        {"value": 1},
    ]
    said = refused(config, tmp_path / "refused")
    assert "density is a list of values" in said
    assert "(decoder.block, encoder.block)" in said
    config["models"][0]["parameters"]["density"] = [{"filter": "x", "value": 0.1}, {"value": 1}]
    merged(config, tmp_path)


def drop(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not any(n in k for n in names)}


UNFIT: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "missing": ("b", drop(PROJ), f"tensor {PROJ} of {{base}} is not in {{b}}"),
    "several": ("b", drop("mlp"), "9 tensors (model.layers.0.mlp.down_proj.weight, "),
    "additional": ("base", drop(PROJ), f"tensor {PROJ} of {{a}} is not in {{base}}"),
    "shape": (
        "b",
        lambda tensors: tensors | {PROJ: tensors[PROJ][:40].clone()},
        f"tensor {PROJ} is (40, 32) in {{b}}, (48, 32) in {{base}}",
    ),
    "no weights": (
        "b",
        lambda tensors: tensors | {PROJ: tensors[PROJ].int()},
        f"tensor {PROJ} is I32 in {{b}}, BF16 in {{base}}",
    ),
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("what", UNFIT)
def test_models_that_do_not_fit(what: str, pickled: bool, llamas: Path, tmp_path: Path) -> None:
    models = copies(llamas, tmp_path / "models")
    name, change, message = UNFIT[what]
    edit(models / name, change)
    if pickled:
        pickle(models / name)
        message = message.replace("I32", "INT32")
    said = refused(dare(models, seed=1), tmp_path)
    assert message.format(**{name: models / name for name in ("base", "a", "b")}) in said


def pickle(model: Path, parts: int = 1) -> None:
    """Store a model's weights as torch does, in one file or several."""
    tensors = zoo.load(model)
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for part in range(parts):
        file = "pytorch_model.bin" if parts == 1 else f"pytorch_model-{part}.bin"
        torch.save({name: tensors[name] for name in names[part::parts]}, model / file)
        weight_map |= dict.fromkeys(names[part::parts], file)
    if parts > 1:
        index = model / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "options",
    [[], ["--lazy-unpickle"], ["--no-safe-serialization"]],
    ids=["plain", "lazy-unpickle", "pickled-output"],
)
def test_pickled_weights(options: list[str], llamas: Path, tmp_path: Path) -> None:
    models = copies(llamas, tmp_path / "models")
    pickle(models / "base", parts=3)
    pickle(models / "a")
    expected = merged(dare(llamas, seed=1), tmp_path / "expected")
    code, said = by_name(dare(models, seed=1), tmp_path, *options)
    assert code == 0, said
    out = tmp_path / "out"
    if "--no-safe-serialization" in options:
        tensors = torch.load(out / "pytorch_model.bin", weights_only=True)
    else:
        tensors = zoo.load(out)
    zoo.assert_same_tensors(tensors, expected)
    assert not list(out.glob("*index.json"))
    assert run("verify", str(out), "--quiet")[0] == 0


def test_single_files(llamas: Path, tmp_path: Path) -> None:
    """As mergekit-pytorch merges them."""
    config = dare(llamas, names=["a/model.safetensors", "b/model.safetensors"], seed=1)
    config["base_model"] += "/model.safetensors"
    zoo.assert_same_tensors(merged(config, tmp_path), merge_pytorch(config, tmp_path / "theirs"))
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"model.safetensors", "README.md", "mergekit_config.yml"}
    assert run("verify", str(tmp_path / "out"), "--quiet")[0] == 0


@pytest.mark.slow
def test_adapters(llamas: Path, tmp_path: Path) -> None:
    """No folder is needed for what they are merged into."""
    model = AutoModelForCausalLM.from_pretrained(llamas / "base", dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    config = dare(llamas, names=[f"base+{tmp_path / 'adapter'}", "a"], seed=1)
    options = ["--lora-merge-cache", str(tmp_path / "cache")]
    expected = merge_yaml(config, tmp_path / "yaml", *options)
    zoo.assert_same_tensors(merged(config, tmp_path), expected)
    assert run("verify", str(tmp_path / "out"), "--quiet", *options)[0] == 0


@pytest.mark.slow
def test_models_of_the_hub(tmp_path: Path) -> None:
    """Fetched by mergekit, with the small files that it does not fetch; offline, one sentence."""
    models = tmp_path / "hub" / "me"
    zoo.make_family(zoo.ARCHITECTURES["llama"], models, names="ab", max_shard_size="40KB")
    (models / "base" / "vocab.txt").write_text("a\n")
    (models / "base" / "model.onnx").write_bytes(b"x")
    config = dare(Path("me"), names=["a", f"b@{COMMIT}"], seed=1)
    path = write(config, tmp_path / "c.yml")
    out = tmp_path / "out"
    with serve(tmp_path / "hub") as server:
        home: dict[str, Any] = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
        command = ["mergekit-dare", "by-name", path, str(out), "--quiet"]
        offline = run_command(*command, check=False, cwd=tmp_path, **home)
        assert offline.returncode == 2
        assert "me/base is not on this machine: HF_HUB_OFFLINE is set" in offline.stderr
        assert not out.exists()
        online = home | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        run_command(*command, cwd=tmp_path, **online)
        run_command("mergekit-dare", "verify", str(out), cwd=tmp_path, **online)
    zoo.assert_same_tensors(zoo.load(out), merged(dare(models, seed=1), tmp_path / "local"))
    assert (out / "vocab.txt").read_text() == "a\n"
    assert not (out / "model.onnx").exists()


def test_verify_finds_what_was_changed(llamas: Path, tmp_path: Path) -> None:
    merged(dare(llamas, seed=1), tmp_path)

    def flip(tensors: Tensors) -> Tensors:
        tensors[PROJ].view(-1).view(torch.int16)[17] ^= 1
        return tensors

    edit(tmp_path / "out", flip)
    code, said = run("verify", str(tmp_path / "out"), "--quiet")
    assert code == 1
    assert f"{PROJ}: 1 of 1,536 elements" in said


def test_the_line_is_written_once(llamas: Path, tmp_path: Path) -> None:
    """An output's config can be merged again, as it was."""
    expected = merged(dare(llamas, seed=1), tmp_path)
    config = tmp_path / "out" / "mergekit_config.yml"
    assert config.read_text().startswith("# merged by name: mergekit-dare by-name\nmerge_method:")
    code, said = run("by-name", str(config), str(tmp_path / "again"))
    assert code == 0
    assert f"Merged 30 tensors by name into {tmp_path / 'again'}.\n" in said
    assert (tmp_path / "again" / "mergekit_config.yml").read_text() == config.read_text()
    zoo.assert_same_tensors(zoo.load(tmp_path / "again"), expected)
    assert run("check", "--files", str(config)) == (0, "No problems found.\n")


def test_the_card_is_made_before_the_merge(
    llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit asks the hub about folders with such names, and fails offline."""
    copies(llamas, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    config = dare(Path("models"), seed=1)
    said = refused(config, tmp_path)
    assert "for the model card, mergekit asks the hub" in said
    assert "write folders as ./NAME, or use --no-write-model-card" in said
    merged(config, tmp_path, "--no-write-model-card")
    assert not (tmp_path / "out" / "README.md").exists()
    for entry in [config, *config["models"]]:
        for key in {"base_model", "model"} & entry.keys():
            entry[key] = f"./{entry[key]}"
    merged(config, tmp_path / "other")


def test_the_seed_of_the_command_line(llamas: Path, tmp_path: Path) -> None:
    config = dare(llamas)
    tensors = merged(config, tmp_path, "--random-seed", "11")
    zoo.assert_same_tensors(
        tensors, merge_yaml(config | {"parameters": {"seed": 11}}, tmp_path / "y")
    )


@pytest.mark.parametrize("pickled", [False, True])
def test_damaged_inputs(pickled: bool, llamas: Path, tmp_path: Path) -> None:
    models = copies(llamas, tmp_path / "models")
    if pickled:
        pickle(models / "b", parts=2)
        (models / "b" / "pytorch_model-1.bin").write_bytes(b"\x80\x02nothing")
        assert "pytorch_model-1.bin cannot be loaded" in refused(dare(models, seed=1), tmp_path)
    else:
        with (models / "b" / "model.safetensors").open("r+b") as file:
            file.truncate(20_000)
        assert "model.safetensors is truncated" in refused(dare(models, seed=1), tmp_path)


def test_an_index_that_is_not_true(llamas: Path, tmp_path: Path) -> None:
    models = copies(llamas, tmp_path / "models")
    names = dict.fromkeys([*zoo.load(models / "b"), "x.weight"], "model.safetensors")
    index = models / "b" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    said = refused(dare(models, seed=1), tmp_path)
    assert f"{models / 'b' / 'model.safetensors'} has no tensor x.weight" in said


def test_what_is_there_is_left_as_it_is(llamas: Path, tmp_path: Path) -> None:
    """But an empty folder may be given."""
    out = tmp_path / "out"
    out.mkdir()
    merged(dare(llamas, seed=1), tmp_path)
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert f"{out} is there already" in refused(dare(llamas, seed=2), tmp_path)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space left on device")])
def test_interrupted(
    error: BaseException, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle, with shards that are written: nothing is left."""
    execute, calls = SaveTensor.execute, iter(range(20))

    def failing(self: SaveTensor, **arguments: Any) -> None:
        if next(calls) == 19:
            raise error
        execute(self, **arguments)

    monkeypatch.setattr(SaveTensor, "execute", failing)
    code, said = by_name(dare(llamas, seed=1), tmp_path, "--out-shard-size", "2K")
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2), said
    assert [path.name for path in tmp_path.iterdir()] == ["by_name.yml"]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_stopped_from_outside(kill: signal.Signals, tmp_path: Path) -> None:
    """OUT is absent; what a kill leaves beside it is hidden, and not in the way of a second run."""
    big = zoo.llama_of(vocab_size=8000, hidden_size=512, intermediate_size=2048)
    zoo.make_family(big, tmp_path, names="ab", max_shard_size="20MB")
    path = write(dare(tmp_path, seed=1), tmp_path / "c.yml")
    before = set(tmp_path.iterdir())
    out = tmp_path / "out"
    program = [sys.executable, str(SCRIPTS / "mergekit-dare"), "by-name", path, str(out)]
    with subprocess.Popen(
        [*program, "--out-shard-size", "500K"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and not list(tmp_path.glob(".merging-*/*.safetensors")):
            time.sleep(0.005)
        process.send_signal(kill)
        assert process.wait() == (130 if kill is signal.SIGINT else -kill)
    left = set(tmp_path.iterdir()) - before
    assert all(path.name.startswith(".merging-") for path in left)
    assert bool(left) == (kill is signal.SIGKILL)
    assert run("by-name", path, str(out), "--quiet")[0] == 0
    assert run("verify", str(out), "--quiet")[0] == 0

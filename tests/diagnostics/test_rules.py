"""The rules as a whole: each has an id, a case that triggers it and a near one that does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from mergekit_dare.cli import main
from mergekit_dare.diagnostics.checking import RULES, check_file
from tests import zoo
from tests.diagnostics.test_config_rules import CLEAN
from tests.running import Config, dare, write

SLICES = """\
merge_method: dare_ties
base_model: ./base
slices:
  - sources:
      - {model: ./base, layer_range: [0, 2]}
      - {model: ./a, layer_range: [0, 2], parameters: {weight: 1, density: 0.5}}
parameters: {seed: 1}
"""
DELLA = """\
merge_method: della
base_model: ./base
models:
  - {model: ./a, parameters: {weight: 1, density: 0.5, epsilon: 0.1}}
"""
SLERP = "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\n"
SEVERAL = "name: one\n" + CLEAN + "---\nname: two\n" + CLEAN
ALONE = yaml.safe_dump(dare(Path("x"), names=["a"], seed=1))
Pair = tuple[str, str]


def replaced(old: str, new: str, near: str | None = None, text: str = CLEAN) -> Pair:
    """A config with a change that triggers a rule, and one with a change that does not."""
    assert old in text
    return text.replace(old, new, 1), text if near is None else text.replace(old, near, 1)


# By rule: a config that triggers it, and one that does not.
CONFIGS: dict[str, Pair] = {
    "other-command": ("experts: [{source_model: a}]\n", "experts: []\n" + CLEAN),
    "unknown-merge-method": replaced(
        "method: dare_ties", "method: dare_tis", "method: dare_linear"
    ),
    "unknown-key": replaced("dtype:", "dtyp:"),
    "misplaced-parameter": replaced("dtype: bfloat16", "rescale: true"),
    "misplaced-int8-mask": replaced("dtype: bfloat16", "int8_mask: true"),
    "repeated-key": replaced("seed: 42", "seed: 42\n  seed: 43"),
    "malformed-list": ("merge_method: dare_ties\nmodels: ./a\n", CLEAN),
    "unreadable-model": replaced("./code", "./c++/code", "./c+/code"),
    "repeated-model": replaced("./code", "./math", "./maths"),
    "missing-base-model": replaced("base_model: ./base\n", ""),
    "no-fine-tuned-model": (ALONE.replace("x/a", "x/base"), ALONE),
    "invalid-layer-range": replaced("./base, layer_range: [0, 2]", "./base", text=SLICES),
    "malformed-parameters": ("merge_method: linear\nparameters: 3\n", "merge_method: linear\n"),
    "unknown-parameter": replaced("normalize:", "normalise:"),
    "shared-parameter-of-a-model": replaced(
        "density: 0.3\n  -", "density: 0.3\n      seed: 1\n  -"
    ),
    "parameter-without-a-value": replaced("lambda: 1.0", "lambda:", "lambda: 0"),
    "invalid-parameter-value": replaced("density: 0.3\n  -", "density: 30\n  -", "density: 1\n  -"),
    "empty-gradient": replaced("weight: [0.2, 0.8]", "weight: []", "weight: [0.2]"),
    "unreachable-filter": replaced("filter: mlp", "filter: '*'", "filter: '*.mlp'"),
    "unfiltered-tensors": replaced(
        "weight: 0.5\n",
        "weight: [{filter: mlp, value: 1}]\n",
        "weight: [{filter: mlp, value: 1}, {value: 0}]\n",
    ),
    "missing-parameter": replaced("      weight: 0.5\n", ""),
    "parameter-of-the-base-model": replaced(
        "models:\n",
        "models:\n  - {model: ./base, parameters: {weight: 1}}\n",
        "models:\n  - {model: ./base}\n",
    ),
    "normalize-with-negative-weights": replaced(
        "normalize: false", "normalize: true", text=CLEAN.replace("[0.2, 0.8]", "-0.1")
    ),
    "nothing-dropped": (ALONE.replace("0.5", "1.0"), ALONE),
    "everything-dropped": (ALONE.replace("density: 0.5", "density: 0"), ALONE),
    "no-seed": replaced("  seed: 42\n", ""),
    "float16-overflow": replaced(
        "dtype: b", "out_dtype: float16\ndtype: b", "out_dtype: bfloat16\ndtype: b"
    ),
    "rounding-without-effect": replaced(
        "dtype: bfloat16",
        "  rounding: stochastic\ndtype: float32",
        "  rounding: stochastic\ndtype: bfloat16",
    ),
    "epsilon-of-della": replaced("density: 0.5", "density: 0.95", text=DELLA),
    "unknown-rule": replaced(
        "seed: 42",
        "seed: 42  # mergekit-dare: ignore no-sed",
        "seed: 42  # mergekit-dare: ignore no-seed",
    ),
    "refused-config": replaced(
        "dtype: bfloat16",
        "tokenizer: {source: base}\ntokenizer_source: base",
        "tokenizer_source: base",
    ),
    "refused-dtype": replaced("dtype: bfloat16", "dtype: bf16"),
    "refused-chat-template": replaced(
        "dtype: bfloat16", "chat_template: chatml3", "chat_template: chatml"
    ),
    "refused-inputs": (
        SLERP + "models: [{model: a}, {model: b}, {model: c}]\n",
        SLERP + "models: [{model: a}, {model: b}]\n",
    ),
    "repeated-name": replaced("name: two", "name: one", text=SEVERAL),
    "refused-order": (SEVERAL.replace("./math", "two").replace("./code", "one"), SEVERAL),
}


def ids(path: str, *, files: bool = False, ignored: tuple[str, ...] = ()) -> set[str]:
    return {finding.rule for finding in check_file(path, files=files, ignored=ignored)}


@pytest.mark.parametrize("rule", CONFIGS)
def test_rules_on_configs(rule: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    triggers, near = CONFIGS[rule]
    path.write_text(triggers)
    assert rule in ids(str(path))
    assert rule not in ids(str(path), ignored=(rule,))
    path.write_text(near)
    assert rule not in ids(str(path))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    zoo.make_family(zoo.ARCHITECTURES["llama"], folder, names="a")
    return folder


def change_json(model: Path, file: str = "config.json", **changes: object) -> None:
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(model: Path, more: dict[str, torch.Tensor], without: str = "") -> None:
    tensors = load_file(model / "model.safetensors") | more
    tensors.pop(without, None)
    save_file(tensors, model / "model.safetensors")


def pickle(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def quantize(folder: Path) -> None:
    codes = torch.zeros(8, dtype=torch.int32)
    change_tensors(folder / "a", {"x.qweight": codes})
    change_json(folder / "a", quantization_config={"quant_method": "gptq"})


def make_strange(folder: Path) -> None:
    """An architecture that mergekit does not know, and one tensor more in a model."""
    for name in ("base", "a"):
        change_json(folder / name, architectures=["X"], model_type="x")
    change_tensors(folder / "a", {"y": torch.ones(1)})


def add_mlp_biases(folder: Path) -> None:
    """What Llama's class needs if its settings say so, and mergekit's description does not name."""
    for name in ("base", "a"):
        change_json(folder / name, mlp_bias=True)
        biases = {
            f"model.layers.{layer}.mlp.{part}_proj.bias": torch.ones(32 if part == "down" else 48)
            for layer in range(zoo.LAYERS)
            for part in ("gate", "up", "down")
        }
        change_tensors(folder / name, biases)


def two_sets(folder: Path) -> None:
    """An index and its one shard beside the file that was there."""
    shutil.copy(folder / "a" / "model.safetensors", folder / "a" / "model-1-of-1.safetensors")
    weight_map = dict.fromkeys(
        load_file(folder / "a" / "model.safetensors"), "model-1-of-1.safetensors"
    )
    (folder / "a" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )


def a_model(name: str) -> Config:
    return {"models": [{"model": name, "parameters": {"weight": 1, "density": 0.5}}]}


def too_many_layers(folder: Path) -> Config:
    sources = [
        {"model": f"{folder}/{name}", "layer_range": [0, 9], "parameters": {"weight": 1}}
        for name in ("base", "a")
    ]
    return {"slices": [{"sources": sources}]}


def of_files(folder: Path) -> Config:
    config = dare(folder, names=["a/model.safetensors"], seed=1)
    return config | {"base_model": f"{folder}/base/model.safetensors"}


def a_filter(word: str) -> Callable[[Path], Config]:
    """A config with a filter, and a value for what it does not take."""

    def config(folder: Path) -> Config:
        weight = [{"filter": word, "value": 1}, {"value": 0.5}]
        parameters = {"weight": weight, "density": 0.5}
        return {"models": [{"model": f"{folder}/a", "parameters": parameters}]}

    return config


NORM = "model.norm.weight"
VOCABULARY = [*range(10), *range(127, 9, -1)]
# By rule: what is changed in the models' folder, in which there were no problems.
MODELS: dict[str, Callable[[Path], object]] = {
    "unusable-model": lambda f: (f / "a" / "config.json").unlink(),
    "quantized-model": quantize,
    "pickled-weights": lambda f: pickle(f / "a"),
    "damaged-tokenizer": lambda f: (f / "a" / "tokenizer.json").write_text("{"),
    "different-architecture": lambda f: change_json(f / "a", model_type="mistral"),
    "different-size": lambda f: change_json(f / "a", intermediate_size=50),
    "different-setting": lambda f: change_json(f / "a", rms_norm_eps=0.5),
    "different-tied-embeddings": lambda f: change_json(f / "a", tie_word_embeddings=True),
    "moved-tokens": lambda f: zoo.tokenizer(order=VOCABULARY).save_pretrained(f / "a"),
    "unknown-tokens": lambda f: zoo.tokenizer(added=("<x>",)).save_pretrained(f / "a"),
    "different-special-token": lambda f: change_json(
        f / "a", "tokenizer_config.json", eos_token="<unk>"
    ),
    "lost-chat-template": lambda f: (f / "a" / "chat_template.jinja").write_text("x"),
    "missing-tensor": lambda f: change_tensors(f / "a", {}, without=NORM),
    "different-shape": lambda f: change_tensors(f / "a", {NORM: torch.ones(3)}),
    "left-out-tensor": lambda f: change_tensors(f / "base", {"more": torch.ones(3)}),
    "lost-weights": add_mlp_biases,
    "only-in-a-fine-tuned-model": lambda f: change_tensors(
        f / "a", {"v_head.summary.weight": torch.ones(3)}
    ),
    "two-sets-of-weights": two_sets,
    "leftover-quantization-config": lambda f: change_json(
        f / "base", quantization_config={"quant_method": "fp8"}
    ),
    "mixed-dtypes": lambda f: change_tensors(f / "a", {NORM: torch.ones(32, dtype=torch.half)}),
    "tokens-without-rows": lambda f: [
        zoo.tokenizer(added=("<x>",)).save_pretrained(f / name) for name in ("base", "a")
    ],
    "tokens-left-out": lambda f: zoo.tokenizer(added=("<x>",)).save_pretrained(f / "a"),
    "refused-tokenizer": lambda f: (f / "base" / "tokenizer.json").write_text("{}"),
    "refused-plan": make_strange,
    "missing-in-a-file": lambda f: change_tensors(f / "a", {}, without=NORM),
    "different-shape-in-a-file": lambda f: change_tensors(f / "a", {NORM: torch.ones(3)}),
}
# Of these, what is changed in the config, without problems while the models were unchanged.
WITH: dict[str, Callable[[Path], Config]] = {
    "tokens-left-out": lambda f: {"tokenizer_source": "base"},
    "refused-tokenizer": lambda f: {"tokenizer_source": "union"},
    "missing-in-a-file": of_files,
    "different-shape-in-a-file": of_files,
    "unmatched-filter": a_filter("self_attn.q"),
}

# By rule: what is changed in the config alone.
NAMES: dict[str, Callable[[Path], Config]] = {
    "unusable-adapter": lambda f: a_model(f"{f}/a+{f}/none"),
    "name-looked-up-on-the-hub": lambda f: a_model("a"),
    "missing-layers": too_many_layers,
    "unmatched-filter": a_filter("self_atn.q"),
}


@pytest.mark.parametrize("rule", [*MODELS, *NAMES])
def test_rules_on_models(
    rule: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    config = dare(tmp_path, names="a", seed=1)
    if rule in WITH:
        config |= WITH[rule](tmp_path)
    path = write(config, tmp_path / "c.yml")
    assert ids(path, files=True) == set()
    if rule in MODELS:
        MODELS[rule](tmp_path)
    else:
        config |= NAMES[rule](tmp_path)
        if "slices" in config:
            del config["models"]
        write(config, tmp_path / "c.yml")
    assert rule in ids(path, files=True)
    assert rule not in ids(path, files=True, ignored=(rule,))


# Whose cases need a hub, or a disk without room.
ELSEWHERE = {
    "weights-on-the-hub": ("test_hub.py", "fetches"),
    "full-disk": ("test_compatibility.py", "the merge needs 0.1 MB"),
}


def test_each_rule_has_its_cases() -> None:
    assert {*CONFIGS, *MODELS, *NAMES, *ELSEWHERE} == RULES.keys()
    for file, message in ELSEWHERE.values():
        assert message in Path(__file__).with_name(file).read_text()


def check(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def test_a_list_of_all() -> None:
    result = check("--rules")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(RULES)
    assert all(line.split("  ", 1)[1].strip().endswith(".") for line in lines)


def test_ids_are_shown_and_switch_rules_off(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text(CLEAN.replace("lambda: 1.0", "lamda: 1.0").replace("  seed: 42\n", ""))
    shown = check(path)
    assert shown.exit_code == 1
    assert shown.stdout.splitlines()[0].endswith("[no-seed]")
    assert shown.stdout.splitlines()[1].endswith("did you mean lambda? [unknown-parameter]")
    found = json.loads(check(path, "--json").stdout)
    assert [finding["rule"] for finding in found] == ["no-seed", "unknown-parameter"]
    assert check(path, "--ignore", "unknown-parameter").exit_code == 0
    for ignored in (["--ignore", "unknown-parameter,no-seed"], ["--ignore", "no-seed"] * 2):
        more = ["--ignore", "unknown-parameter"] if len(ignored) > 2 else []
        assert check(path, *ignored, *more).stdout == "No problems found.\n"
    wrong = check(path, "--ignore", "no-sed")
    assert wrong.exit_code == 2
    assert "there is no rule no-sed; did you mean no-seed?" in wrong.stderr


def test_a_comment_switches_off_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    comment = "# mergekit-dare: ignore unknown-parameter, no-seed"
    path.write_text(CLEAN.replace("lambda: 1.0", f"lamda: 1.0  {comment}"))
    assert check(path).stdout == "No problems found.\n"
    path.write_text(CLEAN.replace("lambda: 1.0", f"lamda: 1.0\n  rescal: true  {comment}"))
    (line,) = check(path).stdout.splitlines()
    assert "lamda" in line
    other = comment.replace("unknown-parameter, ", "")
    path.write_text(CLEAN.replace("lambda: 1.0", f"lamda: 1.0  {other}"))
    assert check(path).exit_code == 1


def test_an_ignored_error_hides_nothing(tmp_path: Path) -> None:
    """What mergekit says about a line that a rule reports is shown once the rule is ignored."""
    path = tmp_path / "c.yml"
    path.write_text(CLEAN.replace("density: 0.3\n  -", "density: 30\n  -"))
    assert ids(str(path)) == {"invalid-parameter-value"}
    assert ids(str(path), ignored=("invalid-parameter-value",)) == set()
    path.write_text("merge_method: dare_ties\nbase_model: b\nmodels: ./a\n")
    assert "refused-config" not in ids(str(path))
    assert "refused-config" in ids(str(path), ignored=("malformed-list",))

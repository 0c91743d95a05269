"""Every kind of finding: a config that triggers it, and the twin that does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_dare.cli import main
from mergekit_dare.diagnostics.checking import check_file
from mergekit_dare.diagnostics.findings import Severity, UnusableFileError
from tests.running import PROJECT, run_command

ERROR, WARNING, HINT = Severity.ERROR, Severity.WARNING, Severity.HINT

CLEAN = """\
merge_method: dare_ties
base_model: ./base
models:
  - model: ./math
    parameters:
      weight: 0.5
      density: 0.3
  - model: ./code
    parameters:
      weight: [0.2, 0.8]
      density:
        - filter: mlp
          value: 0.3
        - value: 0.5
parameters:
  normalize: false
  rescale: true
  lambda: 1.0
  int8_mask: true
  seed: 42
dtype: bfloat16
"""

# What is replaced in CLEAN, by what, the severity, the line that is named, and the message.
CASES: dict[str, tuple[str, str, Severity, str, str]] = {
    "misspelled parameter": (
        "density: 0.3\n  - model",
        "densty: 0.3\n  - model",
        ERROR,
        "densty: 0.3",
        "dare_ties has no parameter densty; did you mean density?",
    ),
    "parameter of another method": (
        "rescale: true",
        "epsilon: 0.1",
        ERROR,
        "epsilon: 0.1",
        "dare_ties has no parameter epsilon",
    ),
    "parameter at the top level": (
        "dtype: bfloat16",
        "rescale: true",
        ERROR,
        "rescale: true",
        "rescale has no effect at the top level; put it under parameters:",
    ),
    "int8_mask at the top level": (
        "dtype: bfloat16",
        "int8_mask: true",
        HINT,
        "int8_mask: true",
        "int8_mask has no effect: no mask is stored",
    ),
    "sampling misspelled": (
        "seed: 42",
        "seed: 42\n  sampling: magnitud",
        ERROR,
        "sampling: magnitud",
        "sampling is 'magnitud', but must be uniform or magnitude; did you mean magnitude?",
    ),
    "rounding misspelled": (
        "seed: 42",
        "seed: 42\n  rounding: up",
        ERROR,
        "rounding: up",
        "rounding is 'up', but must be nearest or stochastic",
    ),
    "stochastic rounding before another rounding": (
        "seed: 42\ndtype: bfloat16",
        "seed: 42\n  rounding: stochastic\ndtype: float32\nout_dtype: bfloat16",
        WARNING,
        "rounding: stochastic",
        "mergekit rounds to nearest, for out_dtype: bfloat16; set dtype: bfloat16 instead",
    ),
    "stochastic rounding of float32": (
        "seed: 42\ndtype: bfloat16",
        "seed: 42\n  rounding: stochastic\ndtype: float32",
        WARNING,
        "rounding: stochastic",
        "stochastic rounding has no effect in float32",
    ),
    "out_dtype that overflows": (
        "dtype: bfloat16",
        "dtype: float32\nout_dtype: float16",
        WARNING,
        "out_dtype: float16",
        "numbers above 65504 silently become infinite",
    ),
    "dtype that is none": (
        "dtype: bfloat16",
        "dtype: bf16",
        ERROR,
        "dtype: bf16",
        'mergekit refuses this: Unimplemented dtype "bf16"',
    ),
    "chat template that is none": (
        "dtype: bfloat16",
        "chat_template: chatml3",
        ERROR,
        "chat_template: chatml3",
        "mergekit refuses this: Invalid chat template: chatml3",
    ),
    "two settings of the tokenizer": (
        "dtype: bfloat16",
        "tokenizer: {source: base}\ntokenizer_source: base",
        ERROR,
        "tokenizer: {source: base}",
        "Cannot specify both tokenizer_source and tokenizer",
    ),
    "parameter without a value": (
        "density: 0.3\n  -",
        "density:\n  -",
        ERROR,
        "density:",
        "density has no value; give one, or remove the line",
    ),
    "filter that is a list": (
        "filter: mlp",
        "filter: [mlp, attn]",
        ERROR,
        "- filter: [mlp, attn]",
        "mergekit refuses models.1.parameters.density",
    ),
    "gradient of the seed": (
        "seed: 42",
        "seed: [1, 2]",
        ERROR,
        "seed: [1, 2]",
        "seed is a whole number, but a gradient is interpolated between the layers",
    ),
    "model that cannot be parsed": (
        "- model: ./code",
        "- model: ./c++/code",
        ERROR,
        "- model: ./c++/code",
        "mergekit cannot parse ./c++/code as a model",
    ),
    "model listed twice in another form": (
        "- model: ./code",
        "- model: {model: {path: ./math}}",
        ERROR,
        "- model: {model: {path: ./math}}",
        "./math is listed twice, which mergekit refuses",
    ),
    "weight outside parameters": (
        "    parameters:\n      weight: 0.5",
        "    weight: 0.5\n    parameters:\n      weight: 0.5",
        ERROR,
        "weight: 0.5",
        "weight has no effect at the model level; put it under parameters:",
    ),
    "shared parameter of one model": (
        "      weight: 0.5",
        "      weight: 0.5\n      normalize: true",
        ERROR,
        "normalize: true",
        "normalize has no effect on one model; put it under the top-level parameters:",
    ),
    "missing weight": (
        "      weight: 0.5\n",
        "",
        ERROR,
        "- model: ./math",
        "weight is missing for this model",
    ),
    "missing base model": (
        "base_model: ./base\n",
        "",
        ERROR,
        "- model: ./math",
        "dare_ties needs base_model: the model that the others were fine-tuned from",
    ),
    "base model that is null": (
        "base_model: ./base",
        "base_model: null",
        ERROR,
        "- model: ./math",
        "dare_ties needs base_model: the model that the others were fine-tuned from",
    ),
    "no fine-tuned model": (
        CLEAN[CLEAN.index("  - model: ./math") : CLEAN.index("parameters:\n  normalize")],
        "  - model: ./base\n",
        ERROR,
        "- model: ./base",
        "there is no fine-tuned model, so the result is the base model",
    ),
    "density above 1": (
        "density: 0.3\n  -",
        "density: 1.3\n  -",
        ERROR,
        "density: 1.3",
        "density is 1.3, but must be from 0 to 1",
    ),
    "density in percent": (
        "value: 0.5",
        "value: 50",
        ERROR,
        "- value: 50",
        "did you mean 0.5?",
    ),
    "negative density in a gradient": (
        "density: 0.3\n  -",
        "density: [0.3, -0.1]\n  -",
        ERROR,
        "density: [0.3, -0.1]",
        "density is -0.1, but must be from 0 to 1",
    ),
    "weight that is no number": (
        "[0.2, 0.8]",
        "[0.2, heavy]",
        ERROR,
        "weight: [0.2, heavy]",
        "weight is 'heavy', but must be a number",
    ),
    "infinite weight": (
        "weight: 0.5",
        "weight: .inf",
        ERROR,
        "weight: .inf",
        "weight is inf, but must be a finite number",
    ),
    "seed that is no integer": (
        "seed: 42",
        "seed: 4.2",
        ERROR,
        "seed: 4.2",
        "seed is 4.2, but must be an integer",
    ),
    "filter entry without a value": (
        "          value: 0.3\n",
        "",
        ERROR,
        "- filter: mlp",
        "density: each entry in a list of filters needs value:",
    ),
    "misspelled filter": (
        "- filter: mlp",
        "- filtr: mlp",
        ERROR,
        "- filtr: mlp",
        "mergekit has no key filtr at the filter level and ignores it; did you mean filter?",
    ),
    "entry after the one without a filter": (
        "        - value: 0.5",
        "        - value: 0.5\n        - filter: attn\n          value: 0.1",
        WARNING,
        "- filter: attn",
        "density: never reached, as an entry before it matches every tensor",
    ),
    "weight for some tensors only": (
        "weight: 0.5",
        "weight: [{filter: mlp, value: 0.5}]",
        WARNING,
        "weight: [{filter: mlp, value: 0.5}]",
        "weight: tensors that match no filter have no value; add an entry without a filter",
    ),
    "base listed with parameters": (
        "models:\n",
        "models:\n  - model: ./base\n    parameters:\n      weight: 0.3\n",
        WARNING,
        "weight: 0.3",
        "weight has no effect on the base model, whose delta is zero; remove it",
    ),
    "model listed twice": (
        "- model: ./code",
        "- model: ./math",
        ERROR,
        "- model: ./math",
        "./math is listed twice, which mergekit refuses",
    ),
    "model without a name": (
        "- model: ./code",
        "- modle: ./code",
        ERROR,
        "- modle: ./code",
        "model is missing; give the model's path or name",
    ),
    "weights that cancel": (
        "[0.2, 0.8]",
        "-0.5",
        WARNING,
        "- model: ./math",
        "the weights cancel out, so normalize divides by 1, not their sum; set normalize: false",
    ),
    "negative weight": (
        "[0.2, 0.8]",
        "-0.2",
        WARNING,
        "- model: ./math",
        "with negative weights, normalize divides by less than is added up; set normalize: false",
    ),
    "unknown top-level key": (
        "dtype: bfloat16",
        "author: someone",
        WARNING,
        "author: someone",
        "mergekit has no key author at the top level and ignores it",
    ),
    "misspelled top-level key": (
        "dtype: bfloat16",
        "dtpye: bfloat16",
        ERROR,
        "dtpye: bfloat16",
        "mergekit has no key dtpye at the top level and ignores it; did you mean dtype?",
    ),
    "key that stands twice": (
        "dtype: bfloat16",
        "dtype: bfloat16\ndtype: float16",
        ERROR,
        "dtype: float16",
        "dtype appears here twice; only the last one counts",
    ),
    "parameter that stands twice": (
        "weight: 0.5",
        "weight: 0.5\n      weight: 0.7",
        ERROR,
        "weight: 0.7",
        "weight appears here twice; only the last one counts",
    ),
    "parameters that are a list": (
        "    parameters:\n      weight: 0.5\n      density: 0.3\n",
        "    parameters: [0.5]\n",
        ERROR,
        "parameters: [0.5]",
        "parameters must be a mapping of parameter names to values",
    ),
    "misspelled method": (
        "merge_method: dare_ties",
        "merge_method: dare_tie",
        ERROR,
        "merge_method: dare_tie",
        "mergekit has no merge method dare_tie; did you mean dare_ties?",
    ),
    "no method": (
        "merge_method: dare_ties\n",
        "",
        ERROR,
        "base_model: ./base",
        "merge_method is missing",
    ),
    "no models": (
        CLEAN[CLEAN.index("models:") : CLEAN.index("parameters:\n  normalize")],
        "",
        ERROR,
        "merge_method: dare_ties",
        "Exactly one of 'models', 'slices', or 'modules' must be present",
    ),
    "no density": (
        CLEAN[CLEAN.index("      density:\n") : CLEAN.index("parameters:\n  normalize")],
        "",
        WARNING,
        "merge_method: dare_ties",
        "no model has a density, so nothing is dropped; try density: 0.5",
    ),
    "no seed": (
        "  seed: 42\n",
        "",
        HINT,
        "merge_method: dare_ties",
        "no seed is set; with one, the config alone determines the merge: seed: 42",
    ),
}


def write(folder: Path, text: str) -> str:
    path = folder / "config.yml"
    path.write_text(text)
    return str(path)


def test_the_twin_is_clean(tmp_path: Path) -> None:
    assert check_file(write(tmp_path, CLEAN)) == []


@pytest.mark.parametrize("name", CASES)
def test_finding(name: str, tmp_path: Path) -> None:
    before, after, severity, line, message = CASES[name]
    assert CLEAN.count(before) == 1
    text = CLEAN.replace(before, after)
    if name == "no density":
        text = text.replace("      density: 0.3\n", "")
    if severity is WARNING and "normalize" in message:
        assert check_file(write(tmp_path, text)) == []  # without normalize, all is well
        text = text.replace("normalize: false", "normalize: true")
    findings = check_file(write(tmp_path, text))
    found = [finding for finding in findings if message in finding.message]
    assert len(found) == 1, findings
    assert found[0].severity is severity
    assert found[0].text == line
    assert text.splitlines()[found[0].line - 1].strip() == line


SLICES = """\
merge_method: dare_linear
slices:
  - base_model: ./base
    sources:
      - model: ./base
        layer_range: [0, 2]
      - model: ./math
        layer_range: [0, 2]
    parameters:
      weight: 0.5
      density: 0.5
      seed: 1
  - sources:
      - model: ./base
        layer_range: [0, 2]
      - model: ./math
        layer_range: [0, 2]
        parameters: {weight: 1.0, density: 2}
base_model: ./base
"""

MODULES = """\
merge_method: dare_linear
base_model: ./base
modules:
  text_decoder:
    models:
      - model: ./math
        parameters: &settings
          weight: 0.5
          density: 0.5
    parameters: {seed: 1, lamda: 2}
  vision_tower:
    models:
      - model: ./math
        parameters:
          <<: *settings
          density: 0.1
"""


def test_slices(tmp_path: Path) -> None:
    (finding,) = check_file(write(tmp_path, SLICES))
    assert finding.line == 18
    assert (
        finding.message == "density is 2, but must be from 0 to 1: it is the fraction of the "
        "deltas to keep; did you mean 0.02?"
    )
    assert check_file(write(tmp_path, SLICES.replace("density: 2", "density: 0.2"))) == []
    misplaced = SLICES.replace("density: 2", "density: 0.2").replace(
        "  - sources:\n", "  - density: 0.3\n    sources:\n"
    )
    (finding,) = check_file(write(tmp_path, misplaced))
    assert finding.message == "density has no effect at the slice level; put it under parameters:"
    without_base = SLICES.replace("base_model: ./base\n", "\n").replace("  - \n", "  -\n")
    findings = check_file(write(tmp_path, without_base))
    assert sum("needs base_model" in finding.message for finding in findings) == 2


def test_modules_and_anchors(tmp_path: Path) -> None:
    (finding,) = check_file(write(tmp_path, MODULES))
    assert finding.message == "dare_linear has no parameter lamda; did you mean lambda?"
    clean = MODULES.replace("lamda", "lambda")
    assert check_file(write(tmp_path, clean)) == []
    misspelled = clean.replace("    parameters: {", "    paramters: {")
    finding, hint = check_file(write(tmp_path, misspelled))[::-1]
    assert "no seed is set" in hint.message
    assert finding.text.startswith("paramters:")
    assert "at the module level and ignores it; did you mean parameters?" in finding.message


def test_several_documents(tmp_path: Path) -> None:
    first, second = (CLEAN + f"name: {name}\n" for name in ("first", "second"))
    last = "merge_method: linear\nmodels:\n- model: first\n  parameters: {weight: 0.5}\n"
    last += "- model: second\n  parameters: {weight: 0.5}\n"
    assert check_file(write(tmp_path, "---\n".join([first, second, last]))) == []
    findings = check_file(write(tmp_path, "---\n".join([first, first, last, last])))
    assert [finding.message for finding in findings] == [
        "two merges have the name first; give each a name of its own",
        "two merges have no name; only one may go without",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: slerp\nbase_model: a\nmodels:\n- model: a\n- model: b\n", "t is missing"),
        (
            (
                "merge_method: ties\nbase_model: a\nmodels:\n"
                "- {model: b, parameters: {weight: 1, density: 7}}\n"
            ),
            "density is 7, but must be from 0 to 1",
        ),
        (
            "merge_method: linear\nmodels:\n- {model: b, parameters: {weight: much}}\n",
            "weight is 'much', but must be a number",
        ),
        (
            (
                "merge_method: della\nbase_model: a\nmodels:\n"
                "- {model: b, parameters: {weight: 1, epsilom: 0.1}}\n"
            ),
            "della has no parameter epsilom; did you mean epsilon?",
        ),
    ],
)
def test_other_methods(text: str, message: str, tmp_path: Path) -> None:
    findings = check_file(write(tmp_path, text))
    assert [finding for finding in findings if message in finding.message], findings


@pytest.mark.parametrize("text", ["", "- a list\n", "a: [1\n", "just words\n", "\0"])
def test_unusable(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UnusableFileError) as caught:
        check_file(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
    result = CliRunner().invoke(main, ["check", path])
    assert result.exit_code == 2
    missing = CliRunner().invoke(main, ["check", str(tmp_path / "missing.yml")])
    assert missing.exit_code == 2


def test_command(tmp_path: Path) -> None:
    path = write(tmp_path, CLEAN)
    result = CliRunner().invoke(main, ["check", path])
    assert (result.exit_code, result.output) == (0, "No problems found.\n")

    hinted = write(tmp_path, CLEAN.replace("  seed: 42\n", ""))
    result = CliRunner().invoke(main, ["check", hinted])
    assert result.exit_code == 0
    assert result.output.startswith(f"{path}:1: hint: merge_method: dare_ties: no seed is set")

    bad = write(tmp_path, CLEAN.replace("density: 0.3\n  -", "density: 30\n  -"))
    result = CliRunner().invoke(main, ["check", bad, "--json"])
    assert result.exit_code == 1
    (finding,) = json.loads(result.output)
    assert finding["severity"] == "error"
    assert finding["line"] == 7
    assert finding["text"] == "density: 30"


def test_our_examples_are_clean() -> None:
    folders = (PROJECT / "examples", PROJECT / "examples" / "recipes")
    examples = [str(path) for folder in folders for path in folder.glob("*.yml")]
    assert examples
    result = CliRunner().invoke(main, ["check", *examples])
    assert (result.exit_code, result.output) == (0, "No problems found.\n")


WHOLE = CLEAN.replace("[0.2, 0.8]", "0.5")


@pytest.mark.parametrize(
    ("density", "message"),
    [
        ("1.0", "density is 1 everywhere, so nothing"),
        ("0", "density is 0 everywhere, so everything is"),
    ],
)
def test_densities_that_are_the_same_everywhere(density: str, message: str, tmp_path: Path) -> None:
    start = WHOLE.index("      density:\n")
    text = (
        WHOLE[:start] + f"      density: {density}\n" + WHOLE[WHOLE.index("parameters:\n  nor") :]
    )
    assert check_file(write(tmp_path, text)) == []  # of the other model, 0.3 is kept
    (finding,) = check_file(write(tmp_path, text.replace("0.3", density)))
    assert finding.severity is WARNING
    assert message in finding.message


def test_lists_that_are_none(tmp_path: Path) -> None:
    bare = CLEAN.replace("  - model: ./math", "  - ./other\n  - model: ./math")
    (finding,) = [f for f in check_file(write(tmp_path, bare)) if f.severity is ERROR]
    assert finding.message == "each entry of models must be a mapping: write - model: ./other"
    without_dash = (
        "merge_method: dare_ties\nbase_model: ./base\nmodels:\n  model: ./math\n"
        "  parameters: {weight: 1, density: 0.5}\nparameters: {seed: 1}\n"
    )
    (finding,) = [f for f in check_file(write(tmp_path, without_dash)) if f.severity is ERROR]
    assert finding.message == "models must be a list: write - model: with a dash"


OF_BASE = "      - model: ./base\n        layer_range: [0, 2]\n"
OF_MATH = "      - model: ./math\n        layer_range: [0, 2]\n    parameters"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (OF_MATH, OF_MATH.replace("[0, 2]", "[0, 1]"), "all sources of a slice need the same"),
        (OF_MATH, OF_MATH.replace("        layer_range: [0, 2]\n", ""), "layer_range is missing"),
        (OF_MATH, OF_MATH.replace("[0, 2]", "[2]"), "is [2], but must be [FIRST, LAST + 1]"),
        (OF_MATH, OF_MATH.replace("[0, 2]", "[2, 0]"), "ends before it begins"),
        ("[0, 2]", "[2, 2]", "no slice has any layers, so the merged model would have none"),
        (OF_BASE + OF_MATH, OF_MATH, "Base input is not present in merge inputs for config.slices"),
    ],
)
def test_slices_that_do_not_fit(before: str, after: str, message: str, tmp_path: Path) -> None:
    text = SLICES.replace("density: 2", "density: 0.2").replace(before, after)
    findings = check_file(write(tmp_path, text))
    assert [finding for finding in findings if message in finding.message], findings


def test_a_slice_of_the_base_alone(tmp_path: Path) -> None:
    """As to keep some layers, or a vision tower, as they are."""
    start = SLICES.index("      - model: ./math\n        layer_range: [0, 2]\n    parameters")
    end = SLICES.index("    parameters:\n      weight")
    text = (SLICES[:start] + SLICES[end:]).replace("density: 2", "density: 0.2")
    assert check_file(write(tmp_path, text)) == []


def test_other_commands(tmp_path: Path) -> None:
    moe = "base_model: ./b\ngate_mode: random\nexperts:\n  - source_model: ./a\n"
    evolve = "genome:\n  models: [./a, ./b]\n  merge_method: dare_ties\ntasks:\n  - name: x\n"
    for text, command in ((moe, "mergekit-moe"), (evolve, "mergekit-evolve")):
        (finding,) = check_file(write(tmp_path, text))
        assert f"this config is for {command}" in finding.message


def test_steps_that_need_each_other(tmp_path: Path) -> None:
    def step(name: str, base: str) -> str:
        return (
            f"name: {name}\nmerge_method: dare_linear\nbase_model: {base}\nmodels:\n"
            "- {model: ./a, parameters: {weight: 1, density: 0.5}}\nparameters: {seed: 1}\n"
        )

    (finding,) = check_file(write(tmp_path, step("one", "two") + "---\n" + step("two", "one")))
    assert "Circular dependency detected" in finding.message
    assert check_file(write(tmp_path, step("one", "./b") + "---\n" + step("two", "one"))) == []


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("models: [{model: ./b}, {model: ./a}, {model: ./c}]\nparameters: {t: 0.5}", "slerp"),
        ("models: [{model: ./a, parameters: {weight: 1, density: 0.5, epsilon: 0.5}}]", "della"),
    ],
)
def test_what_other_methods_refuse(text: str, method: str, tmp_path: Path) -> None:
    config = f"merge_method: {method}\nbase_model: ./b\n{text}\n"
    (finding,) = check_file(write(tmp_path, config))
    assert "exactly 2 inputs" in finding.message or "density + epsilon" in finding.message


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)
HOSTILE = {
    "a tag": (CLEAN.replace("rescale: true", "rescale: !!bool x"), "cannot be read as YAML"),
    "a date": (CLEAN.replace("seed: 42", "seed: !!timestamp x"), "cannot be read as YAML"),
    "a number": (CLEAN.replace("seed: 42", f"seed: {'9' * 5000}"), "cannot be read as YAML"),
    "depth": ("merge_method: dare_ties\nmodels: " + "[" * 10_000 + "]" * 10_000, "too deeply"),
    "itself": ("&r\nmerge_method: dare_ties\nmodels: [*r]\n", "contains itself"),
    "aliases": (BOMB + CLEAN.replace("weight: 0.5", "weight: *i"), "more than 100,000 values"),
    "no text": ("\udcff", ":1: byte 0xff is not UTF-8; save the file as UTF-8"),
    "cp1252": (CLEAN + "# caf\udce9\n", ":22: byte 0xe9 is not UTF-8"),
    "UTF-16": ("\udcff\udcfe" + "\0".join(CLEAN), "is in UTF-16; save it as UTF-8"),
    "a tab": (
        CLEAN.replace("    parameters:", "\tparameters:", 1),
        "that cannot start any token, while scanning for the next token; indent with spaces",
    ),
    "a Windows path": (
        CLEAN.replace("./base", '"D:\\models"'),
        ":2: cannot be read as YAML: found unknown escape character 'm', while scanning a double",
    ),
    "an indented key": (
        CLEAN.replace("dtype:", "  dtype:").replace("  seed: 42\n", "  seed: 42\n "),
        "; dtype belongs at the top level: remove the spaces before it",
    ),
    "a colon in a text": (
        CLEAN.replace("./base", "models: base"),
        ":2: cannot be read as YAML: mapping values are not allowed here; put a text that contains",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_documents(name: str, tmp_path: Path) -> None:
    """One sentence, no traceback, no hang, in JSON, too."""
    text, message = HOSTILE[name]
    path = tmp_path / "config.yml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UnusableFileError) as caught:
        check_file(str(path))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    result = CliRunner().invoke(main, ["check", "--json", str(path)])
    assert result.exit_code == 2
    (finding,) = json.loads(result.output)
    assert finding["message"] == str(caught.value)


def test_long_names_and_other_files(tmp_path: Path) -> None:
    long = CLEAN.replace("./code", "x" * 5000).replace("densi", "densi")
    findings = check_file(write(tmp_path, long), files=True)
    assert all(len(str(finding)) < 1000 for finding in findings)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / ("y" * 5000)):
        with pytest.raises(UnusableFileError):
            check_file(str(path))


def test_a_flood_is_counted(tmp_path: Path) -> None:
    lines = "".join(f"  densit{i}: 1\n" for i in range(500))
    findings = check_file(write(tmp_path, CLEAN.replace("  seed: 42\n", lines + "  seed: 42\n")))
    assert len(findings) == 101
    assert findings[-1].message == "400 more findings; fix these first"


@pytest.mark.slow
def test_a_terminal_without_utf8(tmp_path: Path) -> None:
    path = write(tmp_path, CLEAN.replace("  seed: 42", "  sed: 42 # 数"))
    result = run_command("mergekit-dare", "check", path, check=False, PYTHONIOENCODING="latin-1")
    assert result.returncode == 1
    assert "did you mean seed?" in result.stdout

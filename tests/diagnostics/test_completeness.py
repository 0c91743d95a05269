"""What mergekit would leave out of a model: an error if, and only if, the merged model needs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mergekit.options import MergeOptions

from mergekit_dare.diagnostics.plan.completeness import in_words
from mergekit_dare.diagnostics.verification import verify
from tests import architectures

# One or two of each kind of fault that mergekit's descriptions have, and of what merges right.
FAULTY = [
    "AriaForConditionalGeneration",
    "BertForMaskedLM",
    "BeitForImageClassification",
    "ConvNextForImageClassification",
    "DeepseekV3ForCausalLM",
    "GPTNeoXForCausalLM",
    "JambaForCausalLM",
    "LlavaForConditionalGeneration",
    "NemotronHForCausalLM",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
]
SOUND = [
    "BartForConditionalGeneration",
    "Gemma2ForCausalLM",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "RobertaForSequenceClassification",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTY + SOUND)
def test_an_error_if_and_only_if_the_merge_is_wrong(name: str, tmp_path: Path) -> None:
    pair = architectures.make_pair(name, dict(architectures.classes())[name], tmp_path)
    wrong = architectures.merged_wrongly(name, pair)
    assert bool(wrong) == (name in FAULTY), wrong
    assert architectures.is_an_error(pair) == bool(wrong)


def test_verify_says_so_too(tmp_path: Path) -> None:
    pair = architectures.make_pair("DeepseekV3ForCausalLM", "deepseek_v3", tmp_path)
    assert architectures.merged_wrongly("DeepseekV3ForCausalLM", pair)
    shutil.copy(pair / "c.yml", pair / "out" / "mergekit_config.yml")
    found = verify(pair / "out", MergeOptions(quiet=True)).as_text().splitlines()
    assert found[0].startswith("Identical to the byte")
    assert found[1].startswith("But the merged model lacks the experts of layer 1")
    assert architectures.merged_wrongly("DeepseekV3ForCausalLM", pair, by_name=True) == ""
    assert len(verify(pair / "out", MergeOptions(quiet=True)).as_text().splitlines()) == 1


def test_the_merge_itself_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, model_type in (
        ("DeepseekV3ForCausalLM", "deepseek_v3"),
        ("LlamaForCausalLM", "llama"),
    ):
        pair = architectures.make_pair(name, model_type, tmp_path / name)
        caplog.clear()
        wrong = architectures.merged_wrongly(name, pair)
        warnings = [text for text in caplog.messages if "the merged model will lack" in text]
        assert len(warnings) == bool(wrong)
        caplog.clear()
        assert architectures.merged_wrongly(name, pair, by_name=True) == ""
        assert not [text for text in caplog.messages if "lack" in text]


def layers(*numbers: int, module: str = "mlp.experts.up") -> list[str]:
    return [f"model.layers.{number}.{module}.weight" for number in numbers]


ALL = [
    "lm_head.weight",
    *layers(*range(12)),
    *layers(*range(12), module="mlp.gate"),
    *layers(*range(12), module="attn.q"),
    *layers(*range(3), module="attn.k"),
    "model.vision_tower.patches.weight",
    "model.vision_tower.patches.bias",
]


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (["lm_head.weight"], "all of the lm head (lm_head)"),
        (layers(1), "the experts of layer 1 (model.layers.*.mlp.experts)"),
        (layers(11, 2), "the experts of layer 2 and 1 more layer (model.layers.*.mlp.experts)"),
        (
            layers(*range(1, 12)),
            "the experts of layer 1 and 10 more layers (model.layers.*.mlp.experts)",
        ),
        (layers(5) + layers(5, module="mlp.gate"), "the mlp of layer 5 (model.layers.*.mlp)"),
        (
            layers(5) + layers(5, module="mlp.gate") + layers(5, module="attn.q"),
            "all of layer 5 (model.layers.*)",
        ),
        (["model.vision_tower.patches.bias"], "the bias of the patches"),
        (
            [name for name in ALL if "vision" in name] + layers(3, module="mlp.gate"),
            "the gate of layer 3 (model.layers.*.mlp.gate) and all of the vision tower (model.v",
        ),
        (ALL, "all of the lm head (lm_head) and all of the model (model)"),
    ],
)
def test_words(lost: list[str], words: str) -> None:
    assert in_words(lost, ALL).startswith(words)

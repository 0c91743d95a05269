"""Every architecture of transformers, tiny: does check --files know what a merge makes of it?

    python -m tests.architectures FOLDER [CLASS...]

For each class that can be made small (some 440; or those that are named): a base and a fine-tuned
model, what ``check --files`` says of a merge at density 1 and weight 1, that merge by mergekit-yaml
and by mergekit-dare by-name. A merge is right if transformers misses nothing when it loads the
result, and every weight is the fine-tuned model's. Prints a table, each disagreement of the check
and the first merge, and each merge by name that is not right.
"""

from __future__ import annotations

import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mergekit_dare.by_name import merging
from mergekit_dare.diagnostics.checking import check_file
from mergekit_dare.diagnostics.findings import Severity
from tests.running import dare, write

KINDS = [
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
]
WIDE, NARROW, HEADS, LAYERS = 64, 32, 4, 2
# What a config may count, by the words in its name; the first that fits.
COUNTS = {
    NARROW: "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim lru_width "
    "moe_intermediate_size shared_expert_intermediate_size",
    WIDE: "intermediate_size ffn_dim d_ff n_inner hidden_dim ffn_hidden_size inner_dim "
    "encoder_ffn_dim decoder_ffn_dim max_position_embeddings n_positions",
    LAYERS: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers "
    "num_decoder_layers num_key_value_heads num_kv_heads linear_num_key_heads "
    "num_experts_per_tok attn_layer_period expert_layer_period expand",
    HEADS: "num_attention_heads n_head num_heads n_heads encoder_attention_heads "
    "decoder_attention_heads num_experts num_local_experts n_routed_experts state_size "
    "mamba_d_state mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank conv_kernel "
    "linear_num_value_heads",
    8: "head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_head_dim rotary_dim "
    "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input",
    16: "q_lora_rank kv_lora_rank mamba_d_head sliding_window attention_window_size",
    1: "n_group topk_group first_k_dense_replace mamba_n_groups n_groups attn_layer_offset "
    "expert_layer_offset bos_token_id",
    0: "pad_token_id num_kv_shared_layers num_nextn_predict_layers",
    96: "vocab_size vocab_size_per_layer_input",
}
SIZES = {name: size for size, names in COUNTS.items() for name in names.split()}
MOST_PARAMETERS = 6_000_000


def classes() -> list[tuple[str, str]]:
    """Each class once, with its model type."""
    found: dict[str, str] = {}
    for kind in KINDS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
        for model_type, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names[:1]:
                found.setdefault(name, model_type)
    return list(found.items())


def make_small(config: PretrainedConfig, depth: int = 2) -> None:
    """Give a config, and those inside it, small numbers."""
    for name, size in SIZES.items():
        value = getattr(config, name, None)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        is_open = hasattr(config, name) and value is None and name in ("pad_token_id", "head_dim")
        if is_number or is_open:
            _set(config, name, size)
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and len(kinds) > LAYERS:
            different = list(dict.fromkeys(kinds))
            _set(config, name, [different[0], different[-1]])
    for inner in list(vars(config).values()):
        if isinstance(inner, PretrainedConfig) and depth:
            make_small(inner, depth - 1)


def _set(config: PretrainedConfig, name: str, value: object) -> None:
    with suppress(Exception):  # one that is made of others
        setattr(config, name, value)


def make(name: str, model_type: str) -> PreTrainedModel:
    """Make a model of a class, in bfloat16."""
    kind = CONFIG_MAPPING[model_type]
    usual = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    try:
        config = kind(**{key: SIZES[key] for key in (*usual, "intermediate_size")})
    except Exception:  # it needs more of its own
        config = kind()
    make_small(config)
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in getattr(transformers, name)(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{name} has {size:,} parameters")
    model: PreTrainedModel = getattr(transformers, name)(config).to(torch.bfloat16)
    return model


def make_pair(name: str, model_type: str, folder: Path) -> Path:
    """Save ``base`` and ``a``, a fine-tuned model, and a config that merges them."""
    model = make(name, model_type)
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            delta = torch.randn(parameter.shape, generator=generator) * 0.004
            parameter.add_(delta.to(parameter.dtype))
    model.save_pretrained(folder / "a")
    config = dare(folder, "dare_linear", "a", weight=1.0, density=1.0, seed=1)
    write(config | {"dtype": "bfloat16"}, folder / "c.yml")
    return folder


def merged_wrongly(name: str, folder: Path, *, by_name: bool = False) -> str:
    """Merge a pair, and say what is wrong with it; nothing if it is right.

    ``by_name``: as mergekit-dare by-name does, not as mergekit-yaml.
    """
    config, out = folder / "c.yml", folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        with patience(40):
            if by_name:
                merging.merge(str(config), out, MergeOptions(quiet=True))
            else:
                checked = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
                run_merge(checked, str(out), options=MergeOptions(quiet=True))
    except Exception as refusal:
        return f"refused: {refusal}"
    return what_is_wrong(name, folder)


def what_is_wrong(name: str, folder: Path) -> str:
    """Say what is wrong with a merged model; nothing if it is right."""
    kind = getattr(transformers, name)

    def load(model: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded, found = kind.from_pretrained(folder / model, **options)
        return loaded.state_dict(), found

    try:
        (expected, before), (actual, after) = load("a"), load("out")
    except Exception as error:
        return f"does not load: {error}"
    if lost := sorted(set(after["missing_keys"]) - set(before["missing_keys"])):
        return f"loses weights: {len(lost)}, {lost[0]}"
    skipped = set(before["missing_keys"]) | {key[0] for key in before["mismatched_keys"]}
    wrong = [
        key
        for key, tensor in expected.items()
        if key not in skipped
        and tensor.is_floating_point()
        and not torch.equal(tensor, actual[key])
    ]
    return f"other values: {wrong[0]}" if wrong else ""


def is_an_error(folder: Path) -> bool:
    """Tell whether check --files finds an error."""
    found = check_file(str(folder / "c.yml"), files=True)
    return any(finding.severity is Severity.ERROR for finding in found)


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main(arguments: list[str]) -> int:
    """Try the classes, and print what came out."""
    folder, names = Path(arguments[0]).resolve(), arguments[1:]
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    table: Counter[tuple[str, str]] = Counter()
    off, skipped = [], 0
    for name, model_type in classes():
        if names and name not in names:
            continue
        try:
            with patience(25):
                pair = make_pair(name, model_type, folder / name)
        except Exception:  # it cannot be made small by rule
            shutil.rmtree(folder / name, ignore_errors=True)
            skipped += 1
            continue
        error, wrong = is_an_error(pair), merged_wrongly(name, pair)
        table["error" if error else "no error", wrong.split(":")[0] or "right"] += 1
        if error != bool(wrong):
            off.append(f"{name}: {'error' if error else 'no error'}, but {wrong or 'right'}")
        if wrong_by_name := merged_wrongly(name, pair, by_name=True):
            off.append(f"{name} by name: {wrong_by_name}")
        shutil.rmtree(folder / name)
    for (said, what), count in sorted(table.items()):
        print(f"{said:9} {what:14} {count}")
    print(*off, f"{skipped} classes cannot be made small by rule", sep="\n")
    return bool(off)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

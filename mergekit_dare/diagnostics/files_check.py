"""What keeps the models of a config from being merged, told from their files' headers.

mergekit plans the merge, and what it plans to load is compared with what the headers say is there.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from mergekit import merge_methods
from mergekit.architecture import arch_info_for_config, get_architecture_info
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods import OptionalTensorPolicy
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from tqdm import tqdm
from yaml.nodes import Node

from mergekit_dare.diagnostics import compatibility, model_files, planning
from mergekit_dare.diagnostics.document import Document, get, reference, slices
from mergekit_dare.diagnostics.findings import Finding, Severity, cut
from mergekit_dare.diagnostics.host import configuration
from mergekit_dare.diagnostics.hub import Hub
from mergekit_dare.diagnostics.model_files import ModelFiles, Stored

Findings = Iterator[Finding]
Examined = dict[ModelReference, ModelFiles]

# Buffers that older files have, and that are made anew when a model is loaded.
_BUFFERS = ("inv_freq", "position_ids", "masked_bias", ".attn.bias", "rotary_emb.cos_cached")


def check(document: Document, made_here: set[str], *, and_plan: bool) -> Findings:
    """Find what is wrong with the models' files.

    Args:
        document: The config.
        made_here: Names of the file's own merges, which are no files yet.
        and_plan: Also plan the merge, which needs a config without errors.

    """
    nodes = _model_nodes(document)
    examined, problems = examine(document, made_here)
    yield from problems
    yield from _asked_for(document, nodes)
    whole = not problems and len(examined) == len(nodes)
    if not whole or not nodes or not and_plan:
        return
    try:
        config = configuration(document)
    except Exception:  # said by the other rules
        return
    if any(Path(model.model.path).is_file() for model in nodes):
        yield from _compare_single_files(document, config, nodes, examined)
        return
    compared = list(compatibility.check(document, config, nodes, examined))
    yield from compared
    if all(finding.severity is not Severity.ERROR for finding in compared):
        yield from _compare_with_plan(document, config, nodes, examined)


def examine(document: Document, made_here: set[str]) -> tuple[Examined, list[Finding]]:
    """Look at the files of every model, here or on the hub, but those that are made here.

    Returns:
        What was found, and what is wrong with it.

    """
    nodes = _model_nodes(document)
    examined: Examined = {}
    findings = []
    hub = Hub()
    remote = [model for model in nodes if not is_local(model.model.path)]
    waiting = tqdm(total=len(remote), desc="Asking the hub", disable=None if remote else True)
    for model, node in nodes.items():
        name = model.model.path
        if name in made_here:
            continue
        if name.startswith("~"):
            message = "mergekit does not know ~; write the whole path"
            findings.append(document.finding(node, message))
            continue
        if is_local(name):
            examined[model] = model_files.examine(Path(name))
        else:
            examined[model] = hub.examine(model.model)
            waiting.update()
        problems = list(examined[model].problems)
        if model.lora is not None and is_local(model.lora.path):
            problems += model_files.examine_adapter(Path(model.lora.path))
        elif model.lora is not None:
            problems += hub.examine_adapter(model.lora)
        findings += [document.finding(node, problem) for problem in problems]
    waiting.close()
    return examined, findings


def _model_nodes(document: Document) -> dict[ModelReference, Node]:
    """Return every model of a config, and where it is first named."""
    found: list[Node | None] = [get(document.root, "base_model")]
    found += [get(part, "base_model") for h in document.holders for part in slices(h)]
    found += [get(model, "model") for output in document.outputs for model in output.models]
    nodes: dict[ModelReference, Node] = {}
    for node in found:
        model = None if node is None else reference(node)
        if node is not None and model is not None:
            nodes.setdefault(model, node)
    return nodes


def is_local(name: str) -> bool:
    """Tell whether a model's name is a path on this machine, and none of the hub."""
    path = Path(name)
    try:
        if path.exists():
            return True
        beside_others = len(path.parts) == 2 and path.parent.is_dir()  # not the hub's owner/name
    except (OSError, ValueError):  # longer than a name may be
        return True
    return path.is_absolute() or name.startswith(".") or len(path.parts) > 2 or beside_others


def looks_like_the_hubs(name: str) -> bool:
    """Tell whether mergekit takes a folder's name for one of the hub, perhaps.

    For the model card, after a merge, it asks the hub about names of local models, too, unless they
    cannot be one of the hub.
    """
    if name.startswith(("/", "~")) or name.count("/") > 1 or not is_local(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _asked_for(document: Document, nodes: Mapping[ModelReference, Node]) -> Findings:
    """Find names of folders for which a merge fails at its very end where there is no network."""
    for model, node in nodes.items():
        adapter = [] if model.lora is None else [model.lora.path]
        for name in filter(looks_like_the_hubs, [model.model.path, *adapter]):
            offline = constants.HF_HUB_OFFLINE
            message = (
                f"after the merge, mergekit asks the hub whether it has a model {name}, and fails "
                f"{'as HF_HUB_OFFLINE is set' if offline else 'without a network'}; write ./{name}"
            )
            severity = Severity.WARNING if offline else Severity.HINT
            yield document.finding(node, message, severity)


def _compare_single_files(
    document: Document,
    config: MergeConfiguration,
    nodes: Mapping[ModelReference, Node],
    examined: Examined,
) -> Findings:
    """Compare files as mergekit-pytorch takes them: by their names, without an architecture."""
    base = config.base_model or config.referenced_models()[0]
    for model, files in examined.items():
        ours, theirs = examined[base].tensors, files.tensors
        if not ours or not theirs:  # pickled: names are not known
            continue
        missing = [name for name in ours if name not in theirs]
        if missing:
            message = (
                f"{_some(missing)} of {base} {_are(missing)} missing in {model}; mergekit-pytorch "
                "needs --tensor-intersection or --tensor-union"
            )
            yield document.finding(nodes[model], message, Severity.WARNING)
        for name in ours.keys() & theirs.keys():
            if ours[name].shape != theirs[name].shape:
                shapes = f"{theirs[name].shape} in {model}, {ours[name].shape} in {base}"
                yield document.finding(nodes[model], f"tensor {name} is {shapes}")
                break


def _compare_with_plan(
    document: Document,
    config: MergeConfiguration,
    nodes: Mapping[ModelReference, Node],
    examined: Examined,
) -> Findings:
    options = MergeOptions(allow_crimes=False)
    try:
        remote = {m: examined[m].tensors for m in nodes if not is_local(m.model.path)}
        if remote and any(arch_info_for_config(m.config()) is None for m in nodes):
            return  # mergekit would look into the weights of an architecture that it does not know
        layers = _layers(document, config, options)
        problems = list(_layer_problems(document, config, layers, nodes))
        if problems:
            yield from problems
            return
        _, saves = planning.plan(config, options, merge_adapters=False, names=remote)
    except Exception as error:
        yield document.finding(document.root, f"mergekit cannot plan this merge: {cut(str(error))}")
        return
    tasks = [(s, s.tensor_task) for s in saves if isinstance(s.tensor_task, ExecuteMergeMethodTask)]
    try:
        planning.build_tokenizer(saves)
    except Exception as error:
        keys = (get(document.root, key) for key in ("tokenizer", "tokenizer_source"))
        node = next((key for key in keys if key is not None), document.root)
        yield document.finding(node, f"mergekit cannot build the tokenizer: {cut(str(error))}")
    loaded = [(save, task, _Loaded(task, examined)) for save, task in tasks]
    yield from _missing(document, loaded, nodes)
    yield from _other_shapes(document, loaded, nodes)
    yield from _room(document, config, loaded, examined)
    base = config.base_model
    if base is not None and config.slices is None and examined[base].tensors:
        yield from _left_out(document, [found for _, _, found in loaded], base, nodes, examined)


def _layers(
    document: Document, config: MergeConfiguration, options: MergeOptions
) -> dict[ModelReference, int]:
    """Return each model's number of layers, if it has one kind of layers."""
    architecture = get_architecture_info(config, options)
    if len(architecture.modules) != 1:
        return {}
    (module,) = architecture.modules.values()
    return {
        model: module.architecture.num_layers(model.config(options.trust_remote_code))
        for model in config.referenced_models()
    }


def _layer_problems(
    document: Document,
    config: MergeConfiguration,
    layers: Mapping[ModelReference, int],
    nodes: Mapping[ModelReference, Node],
) -> Findings:
    """Find ranges beyond a model's layers."""
    for part in config.slices or []:
        for source in part.sources:
            count, last = layers.get(source.model), source.layer_range[1]
            if count is not None and last > count:
                message = f"layer_range ends at {last}, but {source.model} has {count} layers"
                yield document.finding(nodes[source.model], message)


class _Loaded:
    """What one task would load of each model, as the headers have it.

    Attributes:
        tensors: By model; ``None`` where it is not there.
        used: The stored names that it takes, by model.
        pickled: Whether a model's names are not known.

    """

    def __init__(self, task: ExecuteMergeMethodTask, examined: Examined) -> None:
        self.tensors: dict[ModelReference, Stored | None] = {}
        self.used: dict[ModelReference, set[str]] = {}
        self.pickled = False
        for model, weight in planning.gathered(task).weight_info.items():
            stored = examined[model].tensors
            self.pickled |= not stored
            names = [weight.name, *(weight.aliases or ()), *(weight.tied_names or ())]
            name = next((name for name in names if name in stored), None)
            if name is not None:
                self.tensors[model], self.used[model] = stored[name], {name}
            else:
                model_type = str(examined[model].config.get("model_type"))
                names = [weight.name, *(weight.aliases or ())]
                self.tensors[model], self.used[model] = _converted(model_type, stored, names)


def _converted(
    model_type: str, stored: Mapping[str, Stored], names: list[str]
) -> tuple[Stored | None, set[str]]:
    """Let mergekit convert tensors without data, as it does for layouts of other releases."""
    used: set[str] = set()

    def source(name: str) -> torch.Tensor:
        used.add(name)
        return torch.empty(stored[name].shape, device="meta")

    sources = {name: (lambda name=name: source(name)) for name in stored}
    for name in names:
        try:
            tensor = convert_checkpoint_tensors(model_type, sources, name)
        except Exception:  # it is asked for what it may not know
            tensor = None
        if tensor is not None:
            return Stored("", tuple(tensor.shape)), used
    return None, set()


Loaded = list[tuple[SaveTensor, ExecuteMergeMethodTask, _Loaded]]


def _missing(document: Document, loaded: Loaded, nodes: Mapping[ModelReference, Node]) -> Findings:
    """Find tensors that the merge needs and a model does not have."""
    missing: dict[ModelReference, list[str]] = {}
    for _, task, found in loaded:
        if found.pickled:
            continue
        lacking = [model for model, tensor in found.tensors.items() if tensor is None]
        if task.output_weight.optional and not _must_be_whole(task, lacking):
            continue
        for model in lacking:
            missing.setdefault(model, []).append(task.output_weight.name)
    for model, names in missing.items():
        message = f"{_some(names)} {_are(names)} missing in {model}, which the merge needs"
        yield document.finding(nodes[model], message)


def _must_be_whole(task: ExecuteMergeMethodTask, lacking: list[ModelReference]) -> bool:
    """Tell whether mergekit refuses to merge an optional tensor that some models do not have."""
    method = merge_methods.get(task.method_name)
    present = [model for model in task.model_order if model not in lacking]
    if not lacking or not present:
        return False
    if method.spec.optional_tensor_policy != OptionalTensorPolicy.ERROR and len(present) == 1:
        return False
    try:
        method.validate_inputs(present, task.base_model, group_name=task.output_weight.name)
    except ValueError:
        return True
    return False


def _other_shapes(
    document: Document, loaded: Loaded, nodes: Mapping[ModelReference, Node]
) -> Findings:
    """Find the first tensor of each model whose shape is not the base's."""
    named: set[ModelReference] = set()
    for _, task, found in loaded:
        present = {model: tensor for model, tensor in found.tensors.items() if tensor is not None}
        if len(present) < 2:
            continue
        first = task.base_model if task.base_model in present else next(iter(present))
        assert first is not None
        axis = task.output_weight.vocabulary_axis
        for model, tensor in present.items():
            wanted, shape = present[first].shape, tensor.shape
            if planning.aligns_tokens(task) and axis is not None:
                wanted, shape = (s[:axis] + s[axis + 1 :] for s in (wanted, shape))
            if shape == wanted or model in named:
                continue
            named.add(model)
            is_vocabulary = axis is not None and not planning.aligns_tokens(task)
            hint = "; its vocabulary is another: set tokenizer_source" if is_vocabulary else ""
            shapes = f"{tensor.shape} in {model}, {present[first].shape} in {first}"
            name = task.output_weight.name
            yield document.finding(nodes[model], f"tensor {name} is {shapes}{hint}")


def _room(
    document: Document, config: MergeConfiguration, loaded: Loaded, examined: Examined
) -> Findings:
    """Say how much a merge fetches and writes, and whether the disks have room for it."""
    name = config.out_dtype or config.dtype
    width = None if name is None else torch.empty(0, dtype=dtype_from_name(name)).element_size()
    writes = 0
    for _, _, found in loaded:
        tensor = next((t for t in found.tensors.values() if t is not None), None)
        if tensor is not None:
            writes += math.prod(tensor.shape) * (width or _width(tensor.dtype))
    fetches = sum(files.download for files in examined.values())
    if fetches:
        sizes = f"fetches {_readable(fetches)} from the hub first, and writes {_readable(writes)}"
        yield document.finding(document.root, f"the merge {sizes}", Severity.HINT)
    needs: dict[Path, int] = {Path.cwd(): writes}
    if fetches:
        cache = Path(constants.HF_HUB_CACHE)
        cache = next(folder for folder in (cache, *cache.parents) if folder.exists())
        same_disk = cache.stat().st_dev == Path.cwd().stat().st_dev
        needs = {Path.cwd(): writes + fetches} if same_disk else needs | {cache: fetches}
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if needed > free:
            message = (
                f"the merge needs {_readable(needed)} on the disk of {cut(str(folder))}, which has "
                f"{_readable(free)} free"
            )
            yield document.finding(document.root, message, Severity.WARNING)


def _width(dtype: str) -> int:
    """Return the bytes of an element, from the name that safetensors gives its dtype."""
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else max(1, int(bits[0]) // 8)


def _readable(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"


def _left_out(
    document: Document,
    loaded: list[_Loaded],
    base: ModelReference,
    nodes: Mapping[ModelReference, Node],
    examined: Examined,
) -> Findings:
    """Find tensors of the base that no output contains: mergekit drops them without a word."""
    used = {name for found in loaded for name in found.used.get(base, ())}
    # A tied pair is stored once or twice; the plan takes the one.
    stored = examined[base].tensors
    left = [n for n in stored if n not in used and not n.endswith(_BUFFERS)]
    if examined[base].config.get("tie_word_embeddings"):
        left = [name for name in left if "lm_head" not in name]
    if left:
        message = (
            f"{_some(left)} of {base} {_are(left)} in no output: mergekit's description of this "
            "architecture does not name them, and the merged model will lack them"
        )
        yield document.finding(nodes[base], message, Severity.WARNING)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {cut(names[0])}{more}"


def _are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"

"""The files that a merged model takes as they are: all that are small and hold no weights."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePath

import huggingface_hub
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dare.diagnostics.findings import UnusableFileError
from mergekit_dare.diagnostics.models import tokenizer
from mergekit_dare.diagnostics.models.files import read_json

LARGEST = 64 << 20  # bytes; tokenizers have up to 35 MB
# Weights, in whatever format, and what training leaves beside them.
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".npz", ".pkl"),
    *(".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".pb", ".mlmodel", ".index.json"),
)
# Written anew, or of something else than this model.
LEFT_OUT = ("README.md", "mergekit_config.yml", "adapter_config.json", "trainer_state.json")
_OF_TOKENIZER = (*tokenizer.FILES, "merges.txt", "sentencepiece.bpe.model")
_TEMPLATES = "additional_chat_templates"


def folder_of(model: ModelReference, options: MergeOptions) -> Path:
    """Return a model's folder; its small files are fetched if it is on the hub.

    mergekit fetches weights and JSON files alone.
    """
    plain = ModelReference(model=model.model)
    folder = Path(plain.local_path(cache_dir=options.transformers_cache))
    if Path(model.model.path).exists():
        return folder
    name, commit, cache = model.model.path, folder.name, options.transformers_cache
    info = huggingface_hub.HfApi().model_info(name, revision=commit, files_metadata=True)
    inner = _inner_folders(folder)
    for file in info.siblings or []:
        path = PurePath(file.rfilename)
        if path.parts[0] in inner or (len(path.parts) == 1 and _is_small(path, file.size or 0)):
            huggingface_hub.hf_hub_download(name, str(path), revision=commit, cache_dir=cache)
    return folder


def copy(donor: Path, tokenizer_of: Path | None, out: Path) -> None:
    """Copy the donor's small files, and the tokenizer's of another model or of none.

    Args:
        donor: The folder of the model whose settings the output takes.
        tokenizer_of: The folder of the one whose tokenizer it takes, if it is to have one.
        out: Where they go.

    """
    for name in _names(donor):
        if not _is_of_tokenizer(name):
            _copy(donor / name, out / name)
    for name in _names(tokenizer_of) if tokenizer_of is not None else []:
        if _is_of_tokenizer(name):
            _copy(tokenizer_of / name, out / name)  # type: ignore[operator]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)


def refuse_other_inner_weights(donor: Path, others: Iterable[Path]) -> None:
    """Refuse models whose modules beside the transformer have other weights than the donor's.

    Raises:
        UnusableFileError: the message names the file.

    """
    for name in _names(donor):
        for other in others if name.endswith(WEIGHTS) else []:
            if not (other / name).is_file() or not filecmp.cmp(donor / name, other / name, False):
                raise UnusableFileError(
                    f"{donor / name} is not the same in {other}, and would not be merged: merge "
                    "these folders on their own, and take them out of the models' modules.json"
                )


def write_settings(out: Path, config: MergeConfiguration, donor: ModelReference) -> None:
    """Set in the copied config.json what the merge changes: the dtype, as mergekit does."""
    file = out / "config.json"
    settings = read_json(file)
    assert isinstance(settings, dict)  # as examined
    if dtype := config.out_dtype or config.dtype:
        keys = {"torch_dtype", "dtype"} & settings.keys()  # in the words of old and new releases
        settings |= dict.fromkeys(keys or {"dtype"}, dtype.removeprefix("torch."))
    if donor.override_architecture:
        settings["architectures"] = [donor.override_architecture]
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_chat_template(out: Path, template: str) -> None:
    """Give the copied tokenizer this chat template in place of its own."""
    for name in ("tokenizer_config.json", "processor_config.json"):
        file = out / name
        settings = read_json(file) if file.is_file() else None
        if isinstance(settings, dict) and settings.pop("chat_template", None) is not None:
            text = json.dumps(settings, indent=2, ensure_ascii=False)
            file.write_text(text + "\n", encoding="utf-8")
    (out / "chat_template.json").unlink(missing_ok=True)
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def _names(folder: Path) -> list[str]:
    """Return the files that are taken of a folder, with those of its modules and templates."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    found = [file.name for file in files if _is_small(PurePath(file.name), file.stat().st_size)]
    for inner in sorted(_inner_folders(folder)):
        files = sorted(folder.glob(f"{inner}/*"))
        found += [f"{inner}/{file.name}" for file in files if file.is_file()]
    return found


def _is_small(name: PurePath, size: int) -> bool:
    is_other = name.name.startswith(".") or name.name in LEFT_OUT
    return size <= LARGEST and not is_other and not name.name.lower().endswith(WEIGHTS)


def _inner_folders(folder: Path) -> set[str]:
    """Return the folders of sentence-transformers' modules, and of further chat templates."""
    file = folder / "modules.json"
    modules = read_json(file) if file.is_file() else []
    entries = [m for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    paths = {str(entry.get("path") or "") for entry in entries}
    # In the folder itself: no file leads out of it.
    return {path for path in paths if PurePath(path).parts == (path,) and path != ".."} | {
        _TEMPLATES
    }


def _is_of_tokenizer(name: str) -> bool:
    return name in _OF_TOKENIZER or name.startswith(f"{_TEMPLATES}/")

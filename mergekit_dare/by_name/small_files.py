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

from mergekit_dare.by_name import tokenizers
from mergekit_dare.diagnostics.config import chat_template
from mergekit_dare.diagnostics.examination import Examination
from mergekit_dare.diagnostics.models.files import read_json
from mergekit_dare.diagnostics.plan.by_name import NotByNameError

LARGEST = 64 << 20  # bytes; tokenizers have up to 35 MB
# Weights in whatever format, and their indexes.
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".npz", ".pkl"),
    *(".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".pb", ".mlmodel", ".index.json"),
)
# Written anew, or of something else than this model.
LEFT_OUT = ("README.md", "mergekit_config.yml", "adapter_config.json", "trainer_state.json")


class SmallFiles:
    """What a merged model has beside its weights; nothing if its donor is a single file."""

    def __init__(
        self, examination: Examination, donor: ModelReference, options: MergeOptions
    ) -> None:
        """Look for the files, and fetch them where they are on the hub.

        Raises:
            NotByNameError: what the config asks for cannot be had.
            Exception: whatever mergekit raises of a chat template.

        """
        config = self._config = examination.config
        self._folders: list[tuple[Path, bool]] = []  # and whether a tokenizer is taken of it
        self._template = chat_template.text_of(config)
        source = tokenizers.source_of(examination, donor)
        if not Path(donor.model.path).is_file():
            donors_folder = _fetched(donor, options)
            self._folders.append((donors_folder, False))
            if options.copy_tokenizer or config.tokenizer or config.tokenizer_source:
                self._folders.append((_fetched(source, options), True))
            _refuse_other_modules(donors_folder, config.referenced_models(), options)
        if self._template is not None and (
            len(self._folders) < 2 or examination.models[source].vocabulary is None
        ):
            raise NotByNameError(f"chat_template is set, but no tokenizer of {source} is taken")

    def write(self, out: Path) -> None:
        """Write them."""
        for folder, is_tokenizers in self._folders:
            for name in _names(folder):
                if tokenizers.is_of_tokenizer(name) == is_tokenizers:
                    (out / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(folder / name, out / name)
        if self._folders:
            _set_dtype(out / "config.json", self._config)
        if self._template is not None:
            tokenizers.write_chat_template(out, self._template)


def _set_dtype(file: Path, config: MergeConfiguration) -> None:
    """Set the dtype in a copied config.json, as mergekit does."""
    settings = read_json(file)
    dtype = config.out_dtype or config.dtype
    if dtype and isinstance(settings, dict):
        keys = {"torch_dtype", "dtype"} & settings.keys()  # in the words of old and new releases
        settings |= dict.fromkeys(keys or {"dtype"}, dtype.removeprefix("torch."))
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def _folder_of(model: ModelReference, options: MergeOptions) -> Path:
    plain = ModelReference(model=model.model)
    return Path(plain.local_path(cache_dir=options.transformers_cache))


def _fetched(model: ModelReference, options: MergeOptions) -> Path:
    """Return a model's folder, whole: of the hub, mergekit fetches JSON files and weights alone."""
    folder = _folder_of(model, options)
    if Path(model.model.path).exists():
        return folder
    name, commit, cache = model.model.path, folder.name, options.transformers_cache
    info = huggingface_hub.HfApi().model_info(name, revision=commit, files_metadata=True)
    inner = _inner_folders(folder)
    for file in info.siblings or []:
        first, *rest = PurePath(file.rfilename).parts
        if first in inner if rest else _is_small(first, file.size or 0):
            huggingface_hub.hf_hub_download(name, file.rfilename, revision=commit, cache_dir=cache)
    return folder


def _refuse_other_modules(
    donor: Path, models: Iterable[ModelReference], options: MergeOptions
) -> None:
    """Refuse models whose modules beside the transformer have other weights than the donor's."""
    weights = [name for name in _names(donor) if name.endswith(WEIGHTS)]
    for other in (_folder_of(model, options) for model in models if weights):
        for name in weights:
            if not (other / name).is_file() or not filecmp.cmp(donor / name, other / name, False):
                raise NotByNameError(
                    f"{donor / name} is not the same in {other}, and would not be merged: merge "
                    "these folders on their own, and take them out of the models' modules.json"
                )


def _names(folder: Path) -> list[str]:
    """Return the files that are taken of a folder, with those of its modules and templates."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    found = [file.name for file in files if _is_small(file.name, file.stat().st_size)]
    for inner in filter(Path.is_dir, (folder / name for name in sorted(_inner_folders(folder)))):
        found += [f"{inner.name}/{file.name}" for file in sorted(inner.iterdir()) if file.is_file()]
    return found


def _is_small(name: str, size: int) -> bool:
    is_other = name.startswith(".") or name in LEFT_OUT
    return size <= LARGEST and not is_other and not name.lower().endswith(WEIGHTS)


def _inner_folders(folder: Path) -> set[str]:
    """Return the folders of sentence-transformers' modules, and of further chat templates."""
    file = folder / "modules.json"
    modules = read_json(file) if file.is_file() else []
    entries = [m for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    paths = {str(entry.get("path") or "") for entry in entries} | {tokenizers.FURTHER_TEMPLATES}
    # No path leads out of the folder.
    return {path for path in paths if PurePath(path).parts == (path,) and path != ".."}

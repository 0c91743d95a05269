"""What a merge was made from: the sha256 of each weight file that it read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

import mergekit_dare
from mergekit_dare.diagnostics.verification import CannotVerifyError, choose_config


def input_files(config: Path, options: MergeOptions, name: str | None = None) -> str:
    """Return the sha256 of each file that a merge reads, as YAML to keep beside the config.

    Raises:
        CannotVerifyError: a model does not exist.

    """
    document = choose_config(config, name)
    models: dict[str, dict[str, Any]] = {}
    for model in document.configuration().referenced_models():
        models[str(model)] = _files_of(model, options)
    header = (
        f"# What a merge was made from, recorded by mergekit-dare {mergekit_dare.__version__}.\n"
    )
    return header + str(yaml.safe_dump({"inputs": models}, sort_keys=True))


def _files_of(model: ModelReference, options: MergeOptions) -> dict[str, Any]:
    found: dict[str, Any] = {}
    parts = [("files", model.model.path)]
    if model.lora is not None:
        parts.append(("adapter", model.lora.path))
    for key, path in parts:
        folder = Path(path)
        if not folder.exists():
            reference = ModelReference.model_validate({"model": {"path": path}})
            folder = Path(reference.local_path(cache_dir=options.transformers_cache))
            found["revision"] = folder.name  # of the snapshot from the hub
        files = [folder] if folder.is_file() else sorted(folder.iterdir())
        weights = [f for f in files if f.suffix in (".safetensors", ".bin") and f.is_file()]
        if not weights:
            raise CannotVerifyError(f"model {model} has no weights in {folder}")
        found[key] = {file.name: _sha256(file) for file in weights}
    return found


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def changed_inputs(record: Path, config: Path, options: MergeOptions) -> list[str]:
    """Return what differs from a record of :func:`input_files`, one sentence each.

    Raises:
        CannotVerifyError: the record cannot be read.

    """
    try:
        before = yaml.safe_load(record.read_text(encoding="utf-8"))["inputs"]
        now = yaml.safe_load(input_files(config, options))["inputs"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise CannotVerifyError(f"{record} is not a record of inputs: {error}") from error
    found = []
    for model in sorted(before.keys() | now.keys()):
        if model not in before or model not in now:
            found.append(f"{model} is {'new' if model not in before else 'no longer used'}")
            continue
        for key in ("files", "adapter"):
            old, new = before[model].get(key, {}), now[model].get(key, {})
            for file in sorted(old.keys() | new.keys()):
                if old.get(file) != new.get(file):
                    found.append(f"{model}: {file} is not the file that was merged")
    return found

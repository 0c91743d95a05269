"""What a model on the hub says about itself: its JSON files and the headers of its weights.

Uses huggingface_hub, which mergekit depends on. Only a few hundred kB are fetched, and the JSON
files stay in the cache, where a merge finds them.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from mergekit.common import ModelPath

from mergekit_dare.diagnostics.findings import cut
from mergekit_dare.diagnostics.models import files as model_files
from mergekit_dare.diagnostics.models import tokenizer
from mergekit_dare.diagnostics.models.files import ModelFiles
from mergekit_dare.plugin.headers import StoredTensor

JSON_FILES = ("config.json", "generation_config.json", "adapter_config.json", *tokenizer.FILES)
# Seconds to wait for a server that does not respond.
PATIENCE = 5.0
# What mergekit fetches of a model besides its weights.
_FETCHED = (".json", "tokenizer.model")


class Hub:
    """Looks models up, in the cache and then on the hub.

    A server that could not be reached is not asked again, and a file that several models share is
    fetched only once.
    """

    def __init__(self) -> None:
        self._unreachable: str | None = None
        self._fetched: dict[str, Path] = {}

    def examine(self, model: ModelPath) -> ModelFiles:
        """Examine a model by its name and revision."""
        found = ModelFiles()
        try:
            folder = _cached(model)
            if constants.HF_HUB_OFFLINE:
                found.problems.append(_offline(model, folder))
                return found
            if folder is not None and not (whole := model_files.examine(folder)).problems:
                return whole
            if self._unreachable is not None:
                found.problems.append(f"{model} was not looked up: {self._unreachable}")
                return found
            self._examine(model, found)
        except Exception as error:  # from the hub's client, its HTTP library, or the file system
            found.problems.append(self._refusal(model, error))
        return found

    def examine_adapter(self, model: ModelPath) -> list[str]:
        """Say what is wrong with an adapter of that name."""
        found = ModelFiles()
        try:
            if constants.HF_HUB_OFFLINE:
                return [_offline(model, _cached(model))]
            if self._unreachable is not None:
                return [f"{model} was not looked up: {self._unreachable}"]
            info = _info(model)
            if "adapter_config.json" not in {file.rfilename for file in info.siblings or []}:
                found.problems.append(f"{model} is not an adapter: it has no adapter_config.json")
        except Exception as error:
            found.problems.append(self._refusal(model, error))
        return found.problems

    def _examine(self, model: ModelPath, found: ModelFiles) -> None:
        info = _info(model)
        files = {file.rfilename: file for file in info.siblings or []}
        if (what := model_files.why_not_a_model(files, str(model))) is not None:
            found.problems.append(what)
            return
        if "config.json" not in files:
            found.problems.append(f"{model} on the hub has no config.json, so it is not a model")
            return
        for name in filter(files.__contains__, JSON_FILES):
            blob = str(files[name].blob_id)
            # transformers reads the settings from the model's own folder.
            if blob in self._fetched and name != "config.json":
                found.same_as[name] = self._fetched[blob]
                continue
            path = huggingface_hub.hf_hub_download(
                model.path, name, revision=info.sha, etag_timeout=PATIENCE
            )
            self._fetched[blob] = Path(path)
            found.folder = Path(path).parent
        assert found.folder is not None
        model_files.read_config(found.folder / "config.json", found)
        suffix = ".safetensors" if any(n.endswith(".safetensors") for n in files) else ".bin"
        fetched = [f for n, f in files.items() if n.endswith((suffix, *_FETCHED))]
        found.download = sum(file.size or 0 for file in fetched)
        if suffix == ".bin":
            found.is_pickled = any(name.endswith(".bin") for name in files)
            if not found.is_pickled:
                found.problems.append(
                    f"{model} on the hub has no weights: neither .safetensors nor .bin"
                )
        else:
            found.tensors = _headers(model.path, info.sha)
        model_files.note_quantization(str(model), found)

    def _refusal(self, model: ModelPath, error: Exception) -> str:
        """Say in one sentence why a model cannot be examined, and what to do about it."""
        if isinstance(error, errors.GatedRepoError):
            return (
                f"{model} on the hub is gated: accept its terms on its page, and log in with "
                "hf auth login or HF_TOKEN"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{model.path} on the hub has no revision {model.revision}"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{model} is not a folder here, and the hub has no such model, or it is private: "
                "check the name, or log in with hf auth login or HF_TOKEN"
            )
        if isinstance(error, errors.HFValidationError):
            return f"{cut(str(model))} is neither a folder here nor a valid name on the hub"
        if isinstance(error, (errors.SafetensorsParsingError, errors.NotASafetensorsRepoError)):
            return f"{model} on the hub has no usable safetensors: {cut(str(error))}"
        if isinstance(error, errors.HfHubHTTPError):
            code = error.response.status_code if error.response is not None else "no status code"
            return f"{model} cannot be looked up: the hub answered with {code}; try again later"
        if _is_of_the_network(error):
            self._unreachable = (
                f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}); check the "
                "network, or give the models as folders"
            )
            return f"{model} cannot be looked up: {self._unreachable}"
        return f"{model} cannot be looked up: {cut(f'{type(error).__name__}: {error}')}"


def _is_of_the_network(error: BaseException) -> bool:
    """Tell whether an error, or one that caused it, is about the connection.

    The hub's client does not use the same HTTP library in all of its releases.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    network = ("Timeout", "Connect", "Network", "Protocol", "ReadError", "gaierror", "SSL")
    return any(
        isinstance(link, (ConnectionError, TimeoutError))
        or any(word in type(link).__name__ for word in network)
        for link in chain
    )


def _info(model: ModelPath) -> huggingface_hub.ModelInfo:
    return huggingface_hub.HfApi().model_info(
        model.path, revision=model.revision, files_metadata=True, timeout=PATIENCE
    )


def _cached(model: ModelPath) -> Path | None:
    """Return the folder of the cache that holds a model's files."""
    path = huggingface_hub.try_to_load_from_cache(
        model.path, "config.json", revision=model.revision
    )
    return Path(path).parent if isinstance(path, str) else None


def _offline(model: ModelPath, folder: Path | None) -> str:
    what = "HF_HUB_OFFLINE is set, but mergekit still asks the hub for a list of files"
    if folder is None:
        return f"{model} is not on this machine: {what}; unset it, or give a folder's path"
    return f"{model} is given by its name: {what}; unset it, or give the path {folder}"


def _headers(name: str, revision: str | None) -> dict[str, StoredTensor]:
    """Fetch the headers of all weight files."""
    metadata = huggingface_hub.HfApi().get_safetensors_metadata(name, revision=revision)
    return {
        tensor: StoredTensor(info.dtype, tuple(info.shape))
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    }

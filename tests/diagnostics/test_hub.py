"""``check --files`` and ``verify`` of models on the hub, with its real client and a server here."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import zoo
from tests.hub_server import COMMIT, HubServer, serve
from tests.running import Config, run_command, write

pytestmark = pytest.mark.slow

LARGE = 100_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The models ``me/base``, ``a``, ``b``, and others with one fault each."""
    folder = tmp_path_factory.mktemp("hub")
    zoo.make_family(zoo.ARCHITECTURES["llama"], folder / "me", names="ab", max_shard_size="40KB")
    me = folder / "me"
    for name in ("adapter", "gguf", "damaged", "large", "other", "gated", "broken", "pickled"):
        shutil.copytree(me / "a", me / name)
    for name in ("adapter", "gguf", "damaged", "large", "pickled"):
        for file in (me / name).glob("model*"):
            file.unlink()
    (me / "adapter" / "config.json").unlink()
    (me / "adapter" / "adapter_config.json").write_text("{}")
    (me / "gguf" / "model.gguf").write_bytes(b"GGUF")
    (me / "damaged" / "model.safetensors").write_bytes(b"\xff" * 1000)
    torch.save({"weight": torch.zeros(3)}, me / "pickled" / "pytorch_model.bin")
    save_file({"w": torch.zeros(LARGE // 4)}, me / "large" / "model.safetensors")
    config = json.loads((me / "other" / "config.json").read_text())
    config["num_hidden_layers"] = 7
    (me / "other" / "config.json").write_text(json.dumps(config))
    with serve(folder) as running:
        running.gated.add("me/gated")
        running.broken.add("me/broken")
        yield running


def environment(server: HubServer, folder: Path, **more: str) -> dict[str, str]:
    own = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    return own | {"HF_HUB_DISABLE_TELEMETRY": "1"} | more


def merge_of(model: str, base: str = "me/base") -> Config:
    entries = [
        {"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in (model, "me/b")
    ]
    return {
        "merge_method": "dare_ties",
        "base_model": base,
        "models": entries,
        "parameters": {"seed": 1},
    }


def check(models: list[str], folder: Path, environment: dict[str, str]) -> dict[str, list[Any]]:
    """Check one config for each model; return the findings of each, except on the seed."""
    paths = [write(merge_of(m), folder / f"{n}.yml") for n, m in enumerate(models)]
    command = ["mergekit-dare", "check", "--files", "--json", *paths]
    result = run(folder, environment, *command)
    assert "Traceback" not in result.stderr
    findings = json.loads(result.stdout)
    of_path = {path: [f for f in findings if f["file"] == path] for path in paths}
    return dict(zip(models, of_path.values(), strict=True))


def run(
    folder: Path, environment: dict[str, str], *command: str
) -> subprocess.CompletedProcess[str]:
    return run_command(*command, check=False, cwd=folder, **environment)


EXPECTED = {
    "me/a": "the merge first fetches 0.2 MB from the hub, and writes 0.1 MB",
    f"me/a@{COMMIT}": "the merge first fetches",
    "me/a@v9": "me/a on the hub has no revision v9",
    "me/none": "me/none is not a folder here, and the hub has no such model, or it is private",
    "a b/c": "a b/c is neither a folder here nor a valid name on the hub",
    "me/gated": "me/gated on the hub is gated: accept its terms on its page, and log in",
    "me/broken": "the hub answered with 503; try again later",
    "me/adapter": "me/adapter is an adapter, not a model: write BASE+me/adapter",
    "me/base+me/adapter": "the merge first fetches",
    "me/base+me/a": "me/a is not an adapter: it has no adapter_config.json",
    "me/gguf": "me/gguf has its weights only as GGUF",
    "me/damaged": "me/damaged on the hub has no usable safetensors",
    "me/other": "me/other has 7 layers (not 3)",
    "me/pickled": "the weights of me/pickled are available only as pickles",
    "me/large": "are missing from me/large",
}


def test_what_is_said_of_models_on_the_hub(server: HubServer, tmp_path: Path) -> None:
    server.sent, server.requests = 0, []
    findings = check(list(EXPECTED), tmp_path, environment(server, tmp_path))
    for model, message in EXPECTED.items():
        matching = [f for f in findings[model] if message in f["message"]]
        assert len(matching) == 1, (model, findings[model])
        if model not in ("me/a", f"me/a@{COMMIT}", "me/base+me/adapter", "me/pickled", "me/large"):
            assert matching[0]["severity"] == "error"
            assert matching[0]["text"] == f"- model: {model}"
    assert [f["severity"] for f in findings["me/a"]] == ["hint"]
    # 100,000 bytes of each file of weights is what its header costs; all weights are far more.
    assert server.sent < 6_000_000 < LARGE


def test_a_tokenizer_that_two_models_share_is_fetched_once(
    server: HubServer, tmp_path: Path
) -> None:
    server.requests = []
    check(["me/a"], tmp_path, environment(server, tmp_path))
    fetched = [r for r in server.requests if r.startswith("GET") and r.endswith("/tokenizer.json")]
    assert len(fetched) == 1


def test_tokenizers_of_the_hub(server: HubServer, tmp_path: Path) -> None:
    """With tokenizer_source, mergekit builds the tokenizer of what was fetched."""
    path = write(merge_of("me/a") | {"tokenizer_source": "union"}, tmp_path / "c.yml")
    own = environment(server, tmp_path)
    result = run(tmp_path, own, "mergekit-dare", "check", "--files", path)
    assert result.returncode == 0, result.stdout
    assert "error" not in result.stdout
    assert "the merge first fetches" in result.stdout


def test_explaining_models_of_the_hub(server: HubServer, tmp_path: Path) -> None:
    path = write(merge_of("me/a"), tmp_path / "c.yml")
    result = run(tmp_path, environment(server, tmp_path), "mergekit-dare", "explain", path)
    assert result.returncode == 0, result.stderr
    assert "dare_ties into me/base (bfloat16, as stored)" in result.stdout
    assert not list(tmp_path.rglob("*.safetensors"))
    offline = environment(server, tmp_path, HF_HUB_OFFLINE="1")
    result = run(
        tmp_path, offline | {"HF_HOME": str(tmp_path / "x")}, "mergekit-dare", "explain", path
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_without_the_hub(server: HubServer, tmp_path: Path) -> None:
    """Offline, and where no server answers; a progress bar shows that the command is waiting."""
    offline = environment(server, tmp_path, HF_HUB_OFFLINE="1")
    findings = check(["me/a"], tmp_path, offline)
    message = findings["me/a"][0]["message"]
    assert message.startswith("me/base is not on this machine: HF_HUB_OFFLINE is set")
    nobody = environment(server, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    findings = check(["me/a"], tmp_path, nobody)
    messages = [finding["message"] for finding in findings["me/a"]]
    assert len(messages) == 3
    assert all("http://127.0.0.1:9 cannot be reached" in message for message in messages)


def test_merge_and_verify_with_a_revision(server: HubServer, tmp_path: Path) -> None:
    """After a merge, what is cached is known offline, and verify records the revision."""
    own = environment(server, tmp_path)
    path = write(merge_of(f"me/a@{COMMIT}"), tmp_path / "c.yml")
    out = tmp_path / "out"
    assert run(tmp_path, own, "mergekit-yaml", path, str(out)).returncode == 0
    inputs = run(tmp_path, own, "mergekit-dare", "verify", str(out), "--inputs")
    assert f"me/a@{COMMIT}" in inputs.stdout
    (tmp_path / "inputs.yml").write_text(inputs.stdout)
    compared = ["mergekit-dare", "verify", str(out), "--inputs-from", "inputs.yml"]
    assert run(tmp_path, own, *compared).returncode == 0
    findings = check(["me/a"], tmp_path, own | {"HF_HUB_OFFLINE": "1"})
    folder = tmp_path / "home" / "hub" / "models--me--base" / "snapshots" / COMMIT
    assert findings["me/a"][0]["message"].endswith(f"unset it, or give the path {folder}")
    offline = own | {"HF_HUB_OFFLINE": "1"}
    refused = run(tmp_path, offline, "mergekit-yaml", path, str(tmp_path / "x"))
    assert "OfflineModeIsEnabled" in refused.stderr

"""Merging and scoring in Ray workers, on nodes that merge alike."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from search import SearchError
from search.evaluation import Evaluator, merge
from search.scores import Run

EXAMPLES = str(Path(__file__).resolve().parent.parent)


@contextmanager
def ray_workers(evaluator: Evaluator, config: str) -> Iterator[Run]:
    """Merge and score in Ray workers: of the cluster of RAY_ADDRESS, or of two nodes started here.

    First, one config is merged on every node.

    Raises:
        SearchError: there is no Ray, or nodes merge differently, or not with mergekit-dare.

    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.cluster_utils import Cluster
    except ImportError as error:
        raise SearchError("--ray needs Ray: pip install 'mergekit[evolve]'") from error
    address = os.environ.get("RAY_ADDRESS")
    cluster = None
    if address is None:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        address = cluster.address
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    try:
        _check_nodes(config, evaluator)
        yield lambda configs: _in_workers(evaluator, configs)
    finally:
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()


def _in_workers(evaluator: Evaluator, configs: Sequence[str]) -> Iterator[float | None]:
    """Yield the scores of configs that workers merge and score side by side."""
    import ray

    command, folder, options = evaluator.command, str(evaluator.folder), evaluator.options
    examples = EXAMPLES

    def score(config: str) -> float | None:
        # Ray sends this function's code, but this package the worker has to find.
        import sys

        sys.path.insert(0, examples)
        from search.evaluation import Evaluator

        return Evaluator(command, Path(folder), options).score(config)

    remote = ray.remote(num_cpus=1)(score)
    asked = [remote.remote(config) for config in configs]
    try:
        for answer in asked:
            yield ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise SearchError(f"a Ray worker failed: {error.cause}") from error


def merged_hash(config: str, folder: Path, options: Sequence[str]) -> tuple[str, str]:
    """Merge in this process; return the method's line of the model card and the model's hash."""
    out = folder / f"merged-{uuid.uuid4().hex}"
    try:
        merge(config, out, options)
        digest = hashlib.sha256()
        for path in sorted(out.glob("*.safetensors")):
            digest.update(path.read_bytes())
        card = (out / "README.md").read_text(encoding="utf-8")
        method = next(line for line in card.splitlines() if "merged using" in line)
        return method, digest.hexdigest()
    finally:
        shutil.rmtree(out, ignore_errors=True)
        out.with_suffix(".yml").unlink(missing_ok=True)


def _check_nodes(config: str, evaluator: Evaluator) -> None:
    """Merge the same config on every node and compare."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder, options, examples = str(evaluator.folder), evaluator.options, EXAMPLES

    def merged() -> tuple[str, str]:
        import sys

        sys.path.insert(0, examples)
        from search.workers import merged_hash

        return merged_hash(config, Path(folder), options)

    asked = {}
    for node in ray.nodes():
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        remote = ray.remote(num_cpus=1)(merged).options(scheduling_strategy=where)
        asked[node["NodeID"]] = remote.remote()
    found = {name: ray.get(answer) for name, answer in asked.items()}
    for name, (method, digest) in found.items():
        print(f"node {name[:8]}: {digest[:16]}", flush=True)
        if yaml.safe_load(config)["merge_method"] == "dare_ties" and "mergekit-dare" not in method:
            message = "uses mergekit's own dare_ties; run there: mergekit-dare doctor"
            raise SearchError(f"Ray node {name[:8]} {message}")
    if len({digest for _, digest in found.values()}) != 1:
        raise SearchError("Ray nodes merge the same config differently")

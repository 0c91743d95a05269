"""Search density and weight of a DARE-TIES merge with CMA-ES, in Ray workers on two nodes.

Usage: python examples/evolve/search.py [--evaluations N] [--folder FOLDER]

The genome and its config are mergekit-evolve's own (``genome.yml`` works with it, too); this script
evaluates on CPUs, which mergekit-evolve 0.1.5 does not: see README.md. Before the search, one
genome is merged on each node: the models must be equal to the byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

Found = dict[str, Any]


def merge(config: str, out: Path, seed: int) -> Found:
    """Merge in this process; return the method's name and the model's hash."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods import get
    from mergekit.options import MergeOptions

    parsed = MergeConfiguration.model_validate(yaml.safe_load(config))
    run_merge(parsed, str(out), options=MergeOptions(random_seed=seed, quiet=True))
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    return {"method": str(get("dare_ties").spec.pretty_name), "sha256": digest}


def merge_and_score(config: str, seed: int, settings: Found, folder: str) -> Found:
    """Run in a Ray worker: merge, evaluate with lm-eval on the CPU, throw the model away."""
    import lm_eval
    import lm_eval.tasks
    import ray

    out = Path(folder) / f"merged-{uuid.uuid4().hex}"
    try:
        found = merge(config, out, seed) | {"node": ray.get_runtime_context().get_node_id()}
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(out), "dtype": "bfloat16"},
            device="cpu",
            tasks=[task["name"] for task in settings["tasks"]],
            limit=settings.get("limit"),
            batch_size=16,
            task_manager=lm_eval.tasks.TaskManager(include_path=str(Path(folder) / "tasks")),
            verbosity="ERROR",
        )["results"]
    finally:
        shutil.rmtree(out, ignore_errors=True)
    scores = {task["name"]: results[task["name"]]["acc,none"] for task in settings["tasks"]}
    return found | {"scores": scores, "score": sum(scores.values())}


def check_nodes(config: str, seed: int, folder: Path) -> None:
    """Merge the same config on every node; leave with a message if anything differs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {}
    for node in ray.nodes():
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        remote = ray.remote(num_cpus=1)(merge).options(scheduling_strategy=where)
        out = folder / f"same-{node['NodeID']}"
        asked[node["NodeID"]] = remote.remote(config, out, seed)
    found = {name: ray.get(answer) for name, answer in asked.items()}
    for name, merged in found.items():
        print(f"node {name[:8]}: {merged['method']}, {merged['sha256'][:16]}", flush=True)
    if any("mergekit-dare" not in merged["method"] for merged in found.values()):
        sys.exit("a worker uses mergekit's own method; run there: mergekit-dare doctor")
    if len({merged["sha256"] for merged in found.values()}) != 1:
        sys.exit("equal genomes gave different models")


def search(genome: Any, settings: Found, evaluations: int, seed: int, folder: Path) -> Any:
    """Maximize the score; return the best genotype."""
    import cma
    import ray

    remote = ray.remote(num_cpus=1)(merge_and_score)
    start = genome.initial_genotype().view(-1).numpy()
    options = {"popsize": 4, "seed": seed, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(start, 1 / 6, options)
    best: tuple[float, Any] = (float("-inf"), start)
    workers: dict[str, int] = {}
    for _ in range(-(-evaluations // 4)):
        asked = strategy.ask()
        configs = [genome.genotype_merge_config(genotype).to_yaml() for genotype in asked]
        found = ray.get([remote.remote(c, seed, settings, str(folder)) for c in configs])
        strategy.tell(asked, [-merged["score"] for merged in found])
        for genotype, merged in zip(asked, found, strict=True):
            if "mergekit-dare" not in merged["method"]:
                sys.exit("a worker uses mergekit's own method; run there: mergekit-dare doctor")
            workers[merged["node"]] = workers.get(merged["node"], 0) + 1
            scores = ", ".join(f"{name} {score:.2f}" for name, score in merged["scores"].items())
            print(f"{merged['score']:.2f} = {scores}; node {merged['node'][:8]}", flush=True)
            best = max(best, (merged["score"], genotype), key=lambda pair: pair[0])
    print("Evaluations by node:", {name[:8]: count for name, count in workers.items()})
    return best[1]


def main() -> None:
    """Start two nodes, or use the cluster of RAY_ADDRESS; check them; search; merge the best."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--genome", type=Path, default=HERE / "genome.yml")
    parser.add_argument("--evaluations", type=int, default=24, help="models to merge and score")
    parser.add_argument("--folder", type=Path, default=HERE / "work", help="shared by all nodes")
    parser.add_argument("--seed", type=int, default=1, help="of the masks and the search")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    import make_tasks
    import ray
    from mergekit.evo.config import EvolMergeConfiguration
    from mergekit.evo.genome import ModelGenome
    from ray.cluster_utils import Cluster

    make_tasks.main(folder / "tasks")
    settings = yaml.safe_load(arguments.genome.read_text())
    genome = ModelGenome(EvolMergeConfiguration.model_validate(settings).genome)
    address = os.environ.get("RAY_ADDRESS")
    cluster = None
    if address is None:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        address = cluster.address
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    try:
        first = genome.genotype_merge_config(genome.initial_genotype() * 0.6).to_yaml()
        check_nodes(first, arguments.seed, folder)
        best = search(genome, settings, arguments.evaluations, arguments.seed, folder)
    finally:
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()
    config = genome.genotype_merge_config(best).to_yaml()
    (folder / "best.yml").write_text(config)
    merge(config, folder / "best", arguments.seed)
    card = (folder / "best" / "README.md").read_text(encoding="utf-8")
    by_us = "by mergekit-dare" if "(mergekit-dare " in card else "NOT by mergekit-dare"
    print(f"The best of {arguments.evaluations} is in {folder / 'best'}, merged {by_us}.")


if __name__ == "__main__":
    main()

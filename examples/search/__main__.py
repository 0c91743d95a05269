"""Search the weights, densities and lambda of a merge, by a score of your own.

Without CONFIG, it searches a merge of the example models. A config has placeholders such as
$lambda, which --grid gives values; a genome of mergekit-evolve is searched by CMA-ES.
The same command goes on where a search was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from environment import PROJECT, prepare

if TYPE_CHECKING:
    from search.searching import Wanted

HERE = Path(__file__).resolve().parent
EXAMPLE_GRID = ["lambda=0.2:1.0:0.2", "density=0.1,0.5,0.9"]
EXAMPLE_SCORE = "python examples/search/score_example.py {model}"


def main() -> None:
    """Search in an environment that has mergekit; make one in a clone that has none."""
    arguments = _parse()
    if importlib.util.find_spec("mergekit") is None:
        _again_in(prepare(".[plot]"))
    if importlib.util.find_spec("mergekit_dare") is None:
        sys.exit(f"{sys.executable} has mergekit, but not mergekit-dare: pip install {PROJECT}")
    from search import SearchError, searching

    if arguments.config is None:
        _use_the_example(arguments)
    try:
        searching.search(_wanted(arguments))
    except SearchError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python examples/search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", type=Path, nargs="?", help="a config with placeholders, or a genome")
    add("--grid", nargs="+", metavar="NAME=VALUES", help="lambda=0.2:1.0:0.2 density=0.1,0.3")
    add("--score", metavar="COMMAND", help="prints a number last: 'python my_eval.py {model}'")
    add("--minimize", action="store_true", help="the lowest score is the best, as of a loss")
    add("--folder", type=Path, help="to work and write in (default: CONFIG's name and -search)")
    add("--merge-options", default="", help="of mergekit-yaml: --merge-options='--cuda'")
    add("--seed", type=int, default=42, help="of CMA-ES, and of configs without one")
    add("--evaluations", type=int, default=24, help="merges of a search by CMA-ES or --agree")
    add(
        "--agree",
        nargs="*",
        action="extend",
        metavar="NAME=FILE",
        help="search one weight a model by how much the merge says what each model says on "
        "texts of its own kind, without labels (JSON lines)",
    )
    add("--agree-by", choices=["same", "divergence"], help="same class or token, or divergence")
    add("--ray", action="store_true", help="CMA-ES in Ray workers: RAY_ADDRESS, or two nodes here")
    arguments = parser.parse_args()
    if arguments.evaluations < 1:
        parser.error("--evaluations must be at least 1")
    if arguments.agree is not None and bool(arguments.agree) != (arguments.config is not None):
        parser.error("with a CONFIG, --agree takes NAME=FILE of each model, without one, nothing")
    return arguments


def _again_in(programs: Path) -> None:
    """Run this command with the Python of another environment and leave with its exit code."""
    try:
        sys.exit(subprocess.run([str(programs / "python"), *sys.argv], check=False).returncode)
    except KeyboardInterrupt:
        sys.exit(130)


def _use_the_example(arguments: argparse.Namespace) -> None:
    """Fill in what searches the example models, and train them if they are not there."""
    given: Path | None = arguments.folder
    work = Path("examples/search/work") / ("" if arguments.agree is None else "agree")
    arguments.folder = work if given is None else given.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"  # the models are local
    os.chdir(PROJECT)  # the config's paths start there
    if not (HERE.parent / "models" / "arithmetic").exists():
        made = subprocess.run([sys.executable, "examples/make_models.py"], check=False)
        if made.returncode != 0:
            sys.exit(made.returncode)
    if arguments.agree is None:
        _use_the_grid(arguments)
    else:
        _use_the_texts(arguments)


def _use_the_grid(arguments: argparse.Namespace) -> None:
    arguments.config = HERE / "example.yml"
    arguments.grid = arguments.grid or EXAMPLE_GRID
    if arguments.score is None:
        arguments.score = EXAMPLE_SCORE
        arguments.minimize = True


def _use_the_texts(arguments: argparse.Namespace) -> None:
    from search.agreement import make_texts

    arguments.config = HERE / "agreement" / "example.yml"
    files = make_texts.main(arguments.folder / "texts")
    arguments.agree = [f"{name}={path}" for name, path in files.items()]


def _wanted(arguments: argparse.Namespace) -> Wanted:
    from search.searching import Wanted

    return Wanted(
        config=arguments.config,
        folder=arguments.folder or Path(f"{arguments.config.stem}-search"),
        grid=arguments.grid or [],
        score=arguments.score,
        minimize=arguments.minimize,
        merge_options=tuple(arguments.merge_options.split()),
        seed=arguments.seed,
        evaluations=arguments.evaluations,
        ray=arguments.ray,
        agree=arguments.agree or [],
        agree_by=arguments.agree_by,
    )


if __name__ == "__main__":
    main()

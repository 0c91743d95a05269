"""Merging one config, scoring the model with a command, and removing it again."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from search import SearchError

RANDOM_SEED = 42  # for merge methods that draw and have no parameter seed
_LAST_LINES = 10
_NUMBER = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\b(?:nan|inf)\b)")


@dataclass(frozen=True)
class Evaluator:
    """Gives a config its score.

    Attributes:
        command: The score command; ``{model}`` stands for the folder of the merged model.
        folder: To merge in; one model is there at a time, and none afterwards.
        options: Of mergekit-yaml.

    """

    command: str
    folder: Path
    options: tuple[str, ...] = ()

    def check(self, config: str) -> None:
        """Find out before any work whether command and options can be used with a config.

        Raises:
            SearchError: they cannot.

        """
        import click
        from mergekit.scripts import run_yaml

        _arguments(self.command, Path("model"))
        try:
            arguments = ["in.yml", "out", *options_for(config, self.options)]
            run_yaml.main.make_context("mergekit-yaml", arguments)
        except click.UsageError as error:
            raise SearchError(f"--merge-options: {error.format_message()}") from error

    def score(self, config: str) -> float | None:
        """Merge, score, remove.

        Returns:
            What the command printed; None if that was not a finite number.

        Raises:
            SearchError: the merge or the command failed, or the command printed no number.

        """
        out = self.folder / f"merged-{uuid.uuid4().hex}"
        try:
            merge(config, out, self.options)
            return _run(self.command, out)
        finally:
            shutil.rmtree(out, ignore_errors=True)
            out.with_suffix(".yml").unlink(missing_ok=True)

    def scores(self, configs: Sequence[str]) -> Iterator[float | None]:
        """Yield the score of each config, one after the other."""
        for config in configs:
            yield self.score(config)

    def clean(self) -> None:
        """Remove what a search that was killed has left."""
        for left in self.folder.glob("merged-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def as_text(config: dict[str, Any], seed: int) -> str:
    """Return a config as YAML, with a seed if its merge method takes one and it has none."""
    if _takes_seed(str(config.get("merge_method"))):
        config = config | {"parameters": {"seed": seed} | (config.get("parameters") or {})}
    return yaml.safe_dump(config, sort_keys=False)


def options_for(config: str, options: Sequence[str]) -> list[str]:
    """Return the options of mergekit-yaml that make a merge reproducible, and the user's."""
    if _takes_seed(str(yaml.safe_load(config).get("merge_method"))):
        return [*options]
    return ["--random-seed", str(RANDOM_SEED), *options]


def _takes_seed(method: str) -> bool:
    from mergekit import merge_methods

    try:
        spec = merge_methods.get(method).spec
    except Exception:  # no such method: checking the config tells
        return False
    return any(parameter.name == "seed" for parameter in spec.parameters)


def use_our_methods(method: str) -> None:
    """Make sure that DARE is that of mergekit-dare.

    Raises:
        SearchError: mergekit's own is in place.

    """
    import mergekit_dare

    if not mergekit_dare.register() and method in ("dare_linear", "dare_ties"):
        raise SearchError(f"{method} is mergekit's own here; mergekit-dare doctor tells why")


def check_configs(configs: Sequence[str], folder: Path) -> None:
    """Look for mistakes as ``mergekit-dare check`` does: the models of the first config, too.

    Prints the warnings for the first config.

    Raises:
        SearchError: a config has an error; it is left in ``folder`` / config.yml.

    """
    from mergekit_dare.diagnostics.checking import check_file
    from mergekit_dare.diagnostics.findings import Severity

    path = folder / "config.yml"
    for config in configs:
        path.write_text(config, encoding="utf-8")
        for finding in check_file(str(path), files=config is configs[0]):
            if finding.severity is Severity.ERROR:
                raise SearchError(str(finding))
            if finding.severity is Severity.WARNING and config is configs[0]:
                print(finding, flush=True)
    path.unlink()


def merge(config: str, out: Path, options: Sequence[str] = ()) -> None:
    """Run ``mergekit-yaml`` in this process: a new one takes seconds to start.

    Raises:
        SearchError: mergekit failed, for whatever reason.

    """
    import mergekit_dare

    mergekit_dare.register()
    from mergekit.scripts import run_yaml

    path = out.with_suffix(".yml")
    path.write_text(config, encoding="utf-8")
    arguments = [str(path), str(out), "--quiet", *options_for(config, options)]
    try:
        run_yaml.main.main(args=arguments, standalone_mode=False)
    except Exception as error:
        message = (
            f"mergekit-yaml failed with {type(error).__name__}: {error}; its config:\n{config}"
        )
        raise SearchError(message) from error


def _run(command: str, model: Path) -> float | None:
    """Run a score command on a model and return the last number of its last line."""
    result = subprocess.run(
        _arguments(command, model),
        env=os.environ | {"PATH": _path()},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        what = f"failed with exit code {result.returncode}"
        raise SearchError(_told(command, what, result.stdout + result.stderr))
    lines = result.stdout.strip().splitlines()
    numbers = _NUMBER.findall(lines[-1]) if lines else []
    if not numbers:
        what = "printed no number in its last line"
        raise SearchError(_told(command, what, result.stderr + result.stdout))
    score = float(numbers[-1])
    return score if math.isfinite(score) else None


def _told(command: str, what: str, output: str) -> str:
    last = output.strip().splitlines()[-_LAST_LINES:]
    tail = "".join(f"\n  {line}" for line in last) or " nothing"
    return f"the score command {what}: {command}\nThe last of what it printed:{tail}"


def _arguments(command: str, model: Path) -> list[str]:
    """Return the program of a score command and its arguments, without a shell."""
    try:
        program, *arguments = shlex.split(command)
    except ValueError as error:
        raise SearchError(f"--score {command}: this is no command: {error}") from error
    if not any("{model}" in argument for argument in arguments):
        raise SearchError(f"--score {command}: {{model}}, the merged model's folder, is missing")
    found = shutil.which(program, path=_path())
    if found is None:
        raise SearchError(f"--score {command}: there is no program {program}")
    return [found, *(argument.replace("{model}", str(model)) for argument in arguments)]


def _path() -> str:
    """Return where programs are looked for: ``python`` is the one that runs the search."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

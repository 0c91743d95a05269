"""The command ``mergekit-dare compile``, which takes mergekit's own options for loading models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click
import torch
from mergekit.common import dtype_from_name
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options
from torch import Tensor
from tqdm import tqdm

import mergekit_dare
from mergekit_dare.diagnostics import planning
from mergekit_dare.diagnostics.document import choose
from mergekit_dare.diagnostics.findings import cut
from mergekit_dare.kernel import building, compiled, merging, packages
from mergekit_dare.kernel.formula import Combine, Steps
from mergekit_dare.kernel.packages import Case


@click.command("compile", cls=PrettyPrintHelp)
@click.argument("configs", nargs=-1)
@click.option("--name", help="Which config of a file for mergekit-multi.")
@add_merge_options
def command(configs: tuple[str, ...], name: str | None, merge_options: MergeOptions) -> None:
    """Compile the formula for CONFIGS, ahead of time, for this machine.

    Merges use what is there without being asked, to the same bytes; nothing is merged here.
    Without CONFIGS: two or three models in bfloat16, by either method. Exit code 0: done; 2: a
    config or its models cannot be used, or there is no compiler.
    """
    if reason := compiled.why_not_here():
        click.echo(f"Compiled code is not for this machine: {reason}", err=True)
        sys.exit(2)
    cases: dict[Case, None] = {}
    for config in configs:
        try:
            cases |= dict.fromkeys(cases_of(config, merge_options, name=name))
        except Exception as error:  # of mergekit, torch, safetensors, yaml: each has its own types
            click.echo(f"{config}: {cut(str(error)) or type(error).__name__}", err=True)
            sys.exit(2)
    if configs and not cases:
        click.echo("Nothing to compile: no tensor is large enough, or is merged by our methods.")
        return
    wanted = list(cases) or usual_cases()
    with tqdm(total=len(wanted), desc="Compiling", file=sys.stderr) as progress:

        def done(case: Case) -> None:
            progress.write(str(case))
            progress.update()

        try:
            building.build(wanted, done)
        except packages.NoPackageError as error:
            progress.close()
            click.echo(f"This cannot be compiled: {error}", err=True)
            sys.exit(2)


def usual_cases() -> list[Case]:
    """Return those of most merges: two or three models in bfloat16."""
    ways = [
        Steps(Combine.LINEAR, torch.float32),
        Steps(Combine.TIES, torch.float32),
        Steps(Combine.TIES, torch.float32, normalize=True),
    ]
    return [Case(w, torch.bfloat16, (torch.bfloat16,) * count) for count in (2, 3) for w in ways]


def cases_of(config: str, options: MergeOptions, *, name: str | None = None) -> Iterator[Case]:
    """Yield the cases of what a config merges; no weight is read, but of pickled files.

    Raises:
        Exception: whatever mergekit raises, or why the file cannot be used.

    """
    mergekit_dare.register()
    with planning.cached_adapters(options) as options:
        _, saves = planning.plan_document(choose(config, name), options)
        kept: dict[Any, Any] = {}
        for save in saves:
            task = save.tensor_task
            if not isinstance(task, ExecuteMergeMethodTask):
                continue
            recipe = planning.recipe_of(task)
            if recipe is None:
                continue
            tensors = {m: t for m, t in planning.loaded(task, kept).items() if t is not None}
            base = tensors.pop(task.base_model, None)
            if base is None or not compiled.is_worth_making(base.numel()):
                continue
            dtype = dtype_from_name(task.dtype)
            firsts = {model: _first(tensor, dtype) for model, tensor in tensors.items()}
            job = merging.plan(_first(base, dtype), planning.fine_tuned(task, firsts), recipe)
            if compiled.suits(job.vectors, job.steps):
                yield Case.of(job.vectors, job.steps)


def _first(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a few elements, as they are merged: the files' weights are mapped, and not read."""
    return tensor.reshape(-1)[:4].to(dtype or tensor.dtype)

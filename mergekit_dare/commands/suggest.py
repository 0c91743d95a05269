"""The command ``mergekit-dare suggest``, which takes mergekit's own options for loading models."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dare.diagnostics import suggestion
from mergekit_dare.diagnostics.findings import Severity


@click.command("suggest", cls=PrettyPrintHelp)
@click.argument("base")
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--method",
    type=click.Choice(["dare_linear", "dare_ties"]),
    default="dare_ties",
    help="dare_ties elects signs (the default); dare_linear only adds the deltas.",
)
@click.option(
    "-o", "--output", metavar="FILE.yml", help="Write the config to this file, not to stdout."
)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@add_merge_options
def command(
    base: str,
    models: tuple[str, ...],
    method: str,
    output: str | None,
    force: bool,
    merge_options: MergeOptions,
) -> None:
    """Write a config to start from that merges MODELS, which were fine-tuned from BASE.

    The models are examined as by check --files and inspect, and a comment gives the reason for each
    value. Exit code 0: done; 1: the models cannot be merged; 2: a file cannot be read or written.
    """
    if output is not None and os.path.lexists(output) and not force:
        raise FileExistsError(f"{output} already exists; use --force to overwrite it")
    made = suggestion.suggest(base, models, method, merge_options)
    for finding in made.findings:
        if finding.severity is not Severity.HINT or not made.text:
            click.echo(f"{finding.severity.value}: {finding.message}", err=True)
    if not made.text:
        sys.exit(1)
    if output is None:
        click.echo(made.text, nl=False)
        return
    try:
        _write(Path(output), made.text)
    except OSError as error:
        raise OSError(f"{output} cannot be written: {error}") from error


def _write(path: Path, text: str) -> None:
    """Write a file in one step: it is the old one or the new one, never a partial one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise

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
    help="With sign election (the default), or a plain sum.",
)
@click.option("-o", "--output", metavar="FILE.yml", help="Write it there, not to stdout.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@add_merge_options
def command(
    base: str,
    models: tuple[str, ...],
    method: str,
    output: str | None,
    force: bool,
    merge_options: MergeOptions,
) -> None:
    """Write a config to start from, that merges MODELS, which were fine-tuned from BASE.

    It looks at the models as check --files and inspect do, and says behind each value why it is so.
    Exit code 0: done; 1: the models cannot be merged; 2: something cannot be read or written.
    """
    if output is not None and os.path.lexists(output) and not force:
        raise FileExistsError(f"{output} is there already; --force writes over it")
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
    """Write a file in one step: it is the old one or the new one, never a part."""
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

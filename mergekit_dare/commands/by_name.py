"""The command ``mergekit-dare by-name``, which takes mergekit's own options for merging."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dare.by_name import merging


@click.command("by-name", cls=PrettyPrintHelp)
@click.argument("config")
@click.argument("out", type=click.Path(path_type=Path))
@add_merge_options
def command(config: str, out: Path, merge_options: MergeOptions) -> None:
    """Merge the models of CONFIG into the new folder OUT, every tensor by its name.

    For models whose weights mergekit-yaml leaves out, or which it refuses: no description of an
    architecture is needed, but the models' tensors must have the same names and shapes. Slices,
    modules and unions of tokenizers are for mergekit-yaml. What it merges right comes out the same.
    OUT is there when it is whole; a merge that is killed leaves a folder .merging-* beside it. Exit
    code 0: done; 2: it cannot be merged, and OUT is not there.
    """
    merge_options.apply_global_options()  # type: ignore[no-untyped-call]
    count = merging.merge(config, out, merge_options)
    if not merge_options.quiet:
        click.echo(f"Merged {count:,} tensors by name into {out}.")

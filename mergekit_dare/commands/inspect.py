"""The command ``mergekit-dare inspect``, which takes mergekit's own options for loading models."""

from __future__ import annotations

import json

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dare.commands import inspect_plot, inspect_text
from mergekit_dare.diagnostics.deltas import inspection
from mergekit_dare.diagnostics.findings import reason


@click.command("inspect", cls=PrettyPrintHelp)
@click.argument("config")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--plot", "png", metavar="FILE.png", help="Plot deltas and noise; needs matplotlib.")
@click.option("--name", help="Name of the config in a file for mergekit-multi.")
@click.option("--full", is_flag=True, help="Read all weights, not an excerpt of each tensor.")
@add_merge_options
def command(
    config: str,
    as_json: bool,
    png: str | None,
    name: str | None,
    full: bool,
    merge_options: MergeOptions,
) -> None:
    """Measure the deltas of the models of CONFIG and say whether DARE suits them.

    Less than 2% of a large model is read, evenly spread over each tensor; nothing is merged. Exit
    code 0: done; 2: the config or a model cannot be used.
    """
    if png is not None:
        inspect_plot.check_plot(png)
    report = inspection.inspect_config(config, merge_options, name=name, full=full)
    if as_json:
        click.echo(json.dumps(inspect_text.as_json(report), indent=1, allow_nan=False))
    else:
        click.echo(inspect_text.as_text(report))
    if png is not None:
        try:
            inspect_plot.plot(report, png)
        except Exception as error:  # the report has been printed all the same
            raise OSError(f"{png} could not be drawn: {reason(error)}") from error

"""The command ``mergekit-dare inspect``, which takes mergekit's own options for loading models."""

from __future__ import annotations

import json
import sys

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dare.diagnostics import inspect_plot, inspect_report, inspection
from mergekit_dare.diagnostics.findings import cut


@click.command("inspect", cls=PrettyPrintHelp)
@click.argument("config")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--plot", "png", metavar="FILE.png", help="Draw deltas and noise; needs matplotlib.")
@click.option("--name", help="Which config of a file for mergekit-multi.")
@click.option("--full", is_flag=True, help="Read every weight, not a sample of each tensor.")
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

    A sample of each tensor is read, under 2 % of a large model; nothing is merged. Exit code 0:
    done; 2: the config or a model cannot be used.
    """
    try:
        if png is not None:
            inspect_plot.check_plot(png)
        report = inspection.inspect_config(config, merge_options, name=name, full=full)
    except Exception as error:  # of mergekit, torch, safetensors, yaml: each has its own types
        reason = " ".join(str(error).split()) or type(error).__name__
        click.echo(reason if reason.startswith(config) else f"{config}: {reason}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(inspect_report.as_json(report), indent=1, allow_nan=False))
    else:
        click.echo(inspect_report.as_text(report))
    if png is not None:
        try:
            inspect_plot.plot(report, png)
        except Exception as error:  # the report is out, whatever becomes of the picture
            click.echo(f"{png} could not be drawn: {cut(str(error))}", err=True)
            sys.exit(2)

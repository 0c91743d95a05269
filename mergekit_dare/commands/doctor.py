"""The command ``mergekit-dare doctor``."""

from __future__ import annotations

import json
import sys

import click

from mergekit_dare.diagnostics.installation import examine


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(as_json: bool) -> None:
    """Check whether the plugin is active and, if not, how to fix it.

    Exit code 0: everything is ok; 1: something is off.
    """
    lines = examine()
    if as_json:
        click.echo(json.dumps([vars(line) for line in lines], indent=1))
    else:
        for line in lines:
            click.echo(f"{'ok ' if line.remedy is None else 'OFF'} {line.name}: {line.found}")
            if line.remedy is not None:
                click.echo(f"    {line.remedy}")
    sys.exit(any(line.remedy is not None for line in lines))

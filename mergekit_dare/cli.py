"""The command ``mergekit-dare``: know before you merge."""

from __future__ import annotations

import json
import sys

import click

from mergekit_dare import __version__


@click.group()
@click.version_option(__version__, prog_name="mergekit-dare")
def main() -> None:
    """DARE for mergekit: know before you merge."""


@main.command()
@click.argument("configs", nargs=-1, required=True)
@click.option("--files", is_flag=True, help="Also look at the headers of the models' files.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(configs: tuple[str, ...], files: bool, as_json: bool) -> None:
    """Find what is wrong with CONFIGS, without reading a weight.

    Exit code 0: no errors (warnings and hints may be there); 1: errors; 2: a file is no config.
    """
    from mergekit_dare.diagnostics.config_check import Severity, UnusableFileError, check_file

    code = 0
    findings = []
    for config in configs:
        try:
            found = check_file(config, files=files)
        except UnusableFileError as error:
            click.echo(str(error), err=True)
            code = 2
            continue
        findings += found
        if code == 0 and any(finding.severity is Severity.ERROR for finding in found):
            code = 1
    if as_json:
        click.echo(json.dumps([finding.as_json() for finding in findings], indent=1))
    else:
        for finding in findings:
            click.echo(str(finding))
        if code == 0 and not findings:
            click.echo("Nothing to find.")
    sys.exit(code)


@main.command()
@click.argument("config")
@click.option("--device", default="cpu", show_default=True, help="Where to compute.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--plot", "png", metavar="FILE.png", help="Draw deltas and noise; needs matplotlib.")
@click.option("--quiet", is_flag=True, help="Show no progress bar.")
def inspect(config: str, device: str, as_json: bool, png: str | None, quiet: bool) -> None:
    """Measure the deltas of the models of CONFIG and say whether DARE suits them.

    Every weight is read once, one tensor at a time; nothing is merged. Exit code 0: done;
    2: the config or a model cannot be used.
    """
    from mergekit_dare.diagnostics import inspection

    try:
        report = inspection.inspect_config(config, device, quiet)
        if png is not None:
            inspection.plot(report, png)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        click.echo(f"{config}: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(inspection.as_json(report), indent=1))
    else:
        click.echo(inspection.as_text(report))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(as_json: bool) -> None:
    """See whether the plugin is active, and what mends it if it is not.

    Exit code 0: it is; 1: something is off.
    """
    from mergekit_dare.diagnostics.doctor import examine

    lines = examine()
    if as_json:
        click.echo(json.dumps([vars(line) for line in lines], indent=1))
    else:
        for line in lines:
            click.echo(f"{'ok ' if line.remedy is None else 'OFF'} {line.name}: {line.found}")
            if line.remedy is not None:
                click.echo(f"    {line.remedy}")
    sys.exit(any(line.remedy is not None for line in lines))

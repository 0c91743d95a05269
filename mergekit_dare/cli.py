"""The command ``mergekit-dare``: know before you merge."""

from __future__ import annotations

import errno
import importlib
import json
import sys

import click

from mergekit_dare import __version__

# Commands that are imported when they are called: they bring mergekit and torch.
LAZY = {
    "inspect": ("mergekit_dare.diagnostics.inspect_command", "Measure the deltas of a config."),
    "suggest": ("mergekit_dare.diagnostics.suggest_command", "Write a config to start from."),
    "verify": ("mergekit_dare.diagnostics.verify_command", "Merge again, and compare the bytes."),
}


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OSError as error:  # as of a full disk; Python's own exit code, 1, is a verdict here
            if error.errno == errno.EPIPE:  # who reads has seen enough: click knows of that
                raise
            click.echo(f"mergekit-dare cannot go on: {error}", err=True)
            sys.exit(2)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *LAZY])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        if "--help" in sys.argv and sys.argv[1:2] == ["--help"]:  # the list of all commands
            return click.Command(cmd_name, help=LAZY[cmd_name][1])
        command: click.Command = importlib.import_module(LAZY[cmd_name][0]).command
        return command


@click.group(cls=_Commands)
@click.version_option(__version__, prog_name="mergekit-dare")
def main() -> None:
    """DARE for mergekit: know before you merge."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know every character of a config
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@main.command()
@click.argument("configs", nargs=-1, required=True)
@click.option("--files", is_flag=True, help="Also look at the headers of the models' files.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(configs: tuple[str, ...], files: bool, as_json: bool) -> None:
    """Find what is wrong with CONFIGS, without reading a weight.

    Exit code 0: no errors (warnings and hints may be there); 1: errors; 2: a file is no config.
    """
    from mergekit_dare.diagnostics.config_check import (
        Finding,
        Severity,
        UnusableFileError,
        check_file,
    )

    code = 0
    findings = []
    for config in configs:
        try:
            found = check_file(config, files=files)
        except UnusableFileError as error:
            if as_json:
                findings.append(Finding(Severity.ERROR, config, 1, "", str(error)))
            else:
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

"""The command ``mergekit-dare``: know before you merge."""

from __future__ import annotations

import errno
import importlib
import sys
from typing import NamedTuple

import click

from mergekit_dare import __version__


class _Command(NamedTuple):
    """A command: its line in the list of commands, and what precedes an error's message."""

    summary: str
    before_error: str = ""


# Each is in mergekit_dare.commands, in the module of its name (with underscores), which is imported
# only when the command is called: most of them import mergekit and torch.
COMMANDS = {
    "by-name": _Command("Merge every tensor by its name, whatever the architecture."),
    "check": _Command("Find mistakes in configs without reading any weights."),
    "doctor": _Command("Check whether the plugin is active and, if not, how to fix it."),
    "explain": _Command("Say what each tensor gets, without reading any weights."),
    "inspect": _Command("Measure the deltas of a config's models."),
    "suggest": _Command("Write a config to start from."),
    "verify": _Command("Repeat a merge and compare the bytes.", "Cannot verify: "),
}
CANNOT_GO_ON, INTERRUPTED = 2, 130


class _Commands(click.Group):
    """Imports commands when they are called, and gives each failure its exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except KeyboardInterrupt:  # click's own code for it, 1, means a verdict here
            sys.exit(INTERRUPTED)
        except Exception as error:  # mergekit, torch and safetensors raise types of their own
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader has closed the pipe: click handles that
            from mergekit_dare.diagnostics.findings import reason

            before = COMMANDS[str(ctx.invoked_subcommand)].before_error
            click.echo(f"{before}{reason(error)}", err=True)
            sys.exit(CANNOT_GO_ON)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].summary) for name in sorted(COMMANDS)])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mergekit_dare.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command


@click.group(cls=_Commands)
@click.version_option(__version__, prog_name="mergekit-dare")
def main() -> None:
    """DARE for mergekit: know before you merge."""
    for stream in (sys.stdout, sys.stderr):  # not every terminal can show every character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

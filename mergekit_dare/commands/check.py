"""The command ``mergekit-dare check``."""

from __future__ import annotations

import json
import sys

import click

from mergekit_dare.diagnostics.checking import RULES, check_file
from mergekit_dare.diagnostics.findings import (
    Finding,
    Severity,
    UnusableFileError,
    did_you_mean,
)


def _list_rules(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        width = max(map(len, RULES))
        for name, rule in sorted(RULES.items()):
            click.echo(f"{name:<{width}}  {rule.sentence}")
        ctx.exit()


def _ids(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name.strip() for value in values for name in value.split(","))
    for name in names:
        if name not in RULES:
            raise click.BadParameter(f"there is no rule {name}{did_you_mean(name, RULES)}")
    return names


@click.command("check")
@click.argument("configs", nargs=-1, required=True)
@click.option("--files", is_flag=True, help="Also check the models, by the headers of their files.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option(
    "--ignore", metavar="ID", multiple=True, callback=_ids, help="Skip a rule; repeatable."
)
@click.option(
    "--rules",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_rules,
    help="List the rules with their ids and exit.",
)
def command(configs: tuple[str, ...], files: bool, as_json: bool, ignore: tuple[str, ...]) -> None:
    """Find mistakes in CONFIGS without reading any weights.

    The comment # mergekit-dare: ignore ID skips a rule for its line. Exit code 0: no errors (there
    may be warnings and hints); 1: errors; 2: a file cannot be used.
    """
    code = 0
    findings = []
    for config in configs:
        try:
            found = check_file(config, files=files, ignored=ignore)
        except UnusableFileError as error:  # the other configs are checked all the same
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
            click.echo("No problems found.")
    sys.exit(code)

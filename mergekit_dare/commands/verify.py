"""The command ``mergekit-dare verify``, which takes mergekit's own options for loading models."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_dare.diagnostics import input_record, verification


class _Share(click.ParamType):  # type: ignore[type-arg]
    name = "share"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Accept ``5%`` and ``0.05``."""
        text = str(value)
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            self.fail(f"{text} is not a valid share; give 5% or 0.05", param, ctx)
        return share


@click.command("verify", cls=PrettyPrintHelp)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--config", type=click.Path(path_type=Path), help="Config to use instead of the one beside OUT."
)
@click.option("--name", help="Name of the config in a file for mergekit-multi.")
@click.option("--sample", type=_Share(), default=1.0, help="Share of the tensors to compare: 5%.")
@click.option("--tensors", default="*", help="Compare tensors whose names match: '*.mlp.*'.")
@click.option("--inputs", is_flag=True, help="Print the sha256 of each input file, as YAML.")
@click.option(
    "--inputs-from",
    type=click.Path(path_type=Path),
    help="First compare the inputs with this record of --inputs.",
)
@add_merge_options
def command(
    out: Path,
    config: Path | None,
    name: str | None,
    sample: float,
    tensors: str,
    inputs: bool,
    inputs_from: Path | None,
    merge_options: MergeOptions,
) -> None:
    """Repeat the merge that made OUT and compare the bytes; nothing is written.

    Exit code 0: identical to the byte; 1: different; 2: it cannot be verified.
    """
    path = config or (out if out.is_dir() else out.parent) / verification.CONFIG_FILE
    if inputs:
        click.echo(input_record.input_files(path, merge_options, name), nl=False)
        return
    if inputs_from is not None:
        changed = input_record.changed_inputs(inputs_from, path, merge_options)
        if changed:
            click.echo("\n".join(changed))
            sys.exit(1)
    found = verification.verify(
        out, merge_options, config=config, name=name, sample=sample, tensors=tensors
    )
    click.echo(found.as_text())
    sys.exit(0 if found.is_match else 1)

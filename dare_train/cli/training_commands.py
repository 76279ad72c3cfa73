"""Commands around other people's trainings: arguments only."""

from __future__ import annotations

from typing import Annotated

import typer

from .given_once import OnceCommand

app = typer.Typer()


@app.command(cls=OnceCommand, context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="Whatever trains.")],
    dare: Annotated[
        list[str],
        typer.Option(
            "--dare",
            metavar="NAME=VALUE",
            help="An argument of DareCallback, such as p=0.9 or when=epoch; may be given several times.",
        ),
    ] = [],  # noqa: B006
) -> None:
    """Run a command that trains, with a DareCallback in every Trainer that it makes."""
    from ..integrations.running import run as start
    from ..integrations.written_options import read

    raise typer.Exit(start(command, read(dare)))

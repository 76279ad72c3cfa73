"""`dare-train moe`: arguments only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import printable
from .given_once import OnceCommand
from .terminal import AllowNonfinite, Out, Overwrite

app = typer.Typer()


@app.command(cls=OnceCommand)
def moe(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yml", help="As for mergekit-moe.")],
    out: Out,
    seed: Annotated[int, typer.Option(help="Of gates and noise that are drawn.")] = 0,
    allow_same: Annotated[
        bool, typer.Option("--allow-same", help="One model for all experts, for a result that is trained.")
    ] = False,
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Overwrite = False,
) -> None:
    """Make a mixture of experts of dense models."""
    from ..merging.mixture import mixture_of_experts
    from ..parallel.inputs_of import check_apart

    check_apart(out, [config])
    report = mixture_of_experts(
        config, out, seed=seed, allow_same=allow_same, allow_nonfinite=allow_nonfinite, overwrite=overwrite
    )
    for note in report.notes:
        typer.echo(f"dare-train: {printable(note)}", err=True)
    typer.echo(report.summary)
    typer.echo(f"{out}: fingerprint {report.fingerprint[:12]}…")

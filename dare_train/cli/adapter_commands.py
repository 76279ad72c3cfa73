"""Adapters as a command: arguments only."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .given_once import OnceCommand
from .terminal import Base, Out, Overwrite, expect_models, progress_bar

app = typer.Typer()


@app.command(cls=OnceCommand)
def lora(
    base: Base,
    tuned: Annotated[
        list[str],
        typer.Argument(
            metavar="TUNED | PKG...", help="The fine-tuned model; or packages on the base, as for apply."
        ),
    ],
    out: Out,
    rank: Annotated[Optional[int], typer.Option(help="Of each matrix, at most.")] = None,
    error: Annotated[
        Optional[float],
        typer.Option(help="Instead: the smallest rank at which so much of a matrix's norm is left out."),
    ] = None,
    exclude: Annotated[list[str], typer.Option(help="Name pattern of tensors to leave as in the base.")] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="Of the factors: F32, BF16 or F16.")] = "F32",
    seed: Annotated[
        int, typer.Option(help="Of the random combinations by which large matrices are cut.")
    ] = 0,
    gram: Annotated[
        Optional[str],
        typer.Option(help="Gram matrices, to tell the error of outputs; by default those beside TUNED."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the delta as a PEFT adapter of low rank."""
    expect_models()
    from ..adapters.extracted_lora import extract_lora as run

    with progress_bar("factoring", of_bytes=False) as progress:
        found = run(
            base, tuned, out, rank=rank, error=error, exclude=exclude, dtype=dtype, seed=seed, gram=gram,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    typer.echo(f"{out}: {found}")

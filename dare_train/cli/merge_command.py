"""`dare-train merge`: arguments, the merge or the search, and what is told of it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from ..errors import ConfigError, printable
from .terminal import (
    AllowNonfinite,
    CastBase,
    Dequantize,
    Out,
    Overwrite,
    Rename,
    joined_ranks,
    pairs,
    progress_bar,
    show,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..config import Rounding

app = typer.Typer()


@app.command()
def merge(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE MODEL... | CONFIG.yml", help="Packages and checkpoints; or a configuration."
        ),
    ],
    out: Out,
    method: Annotated[Optional[str], typer.Option(help="task_arithmetic by default.")] = None,
    weight: Annotated[
        Optional[list[float]], typer.Option("--weight", help="Factor of each model, in order; 1 by default.")
    ] = None,
    p: Annotated[
        Optional[list[float]],
        typer.Option("--p", help="Drop rate of DARE before the method: one, or one for each model."),
    ] = None,
    settings: Annotated[
        list[str], typer.Option("--set", help="NAME=VALUE of the method, such as density=0.2 or lambda=0.5.")
    ] = [],  # noqa: B006
    rescale: Annotated[
        Optional[str], typer.Option(help="paper: 1/(1-p). norm: mergekit's. q: DAREx's. none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Selects the masks.")] = 0,
    out_dtype: Annotated[
        Optional[str], typer.Option(help="BF16, F16, F32 or F64; the base's by default.")
    ] = None,
    dtype: Annotated[
        Optional[str], typer.Option(help="base: the result has the base's dtypes, rounded by draws.")
    ] = None,
    rounding: Annotated[
        Optional[str],
        typer.Option(help="Of the result: nearest (default), or stochastic."),
    ] = None,
    tokenizer: Annotated[
        Optional[str], typer.Option(help="base or union, where models added tokens.")
    ] = None,
    exclude: Annotated[list[str], typer.Option(help="Name pattern of tensors to leave as in the base.")] = [],  # noqa: B006
    take: Annotated[list[str], typer.Option(help="PATTERN=MODEL: take these tensors from that model.")] = [],  # noqa: B006
    rename: Rename = [],  # noqa: B006
    fisher: Annotated[
        list[str], typer.Option(help="Fisher statistics of each model; those beside it by default.")
    ] = [],  # noqa: B006
    gram: Annotated[
        list[str], typer.Option(help="Gram matrices of each model; those beside it by default.")
    ] = [],  # noqa: B006
    package: Annotated[
        bool, typer.Option("--package", help="Write a delta package instead of a checkpoint.")
    ] = False,
    search: Annotated[
        Optional[str],
        typer.Option(help="Settings to search: NAME=LOW:HIGH:STEP or NAME=A,B; more may follow."),
    ] = None,
    evaluate: Annotated[
        Optional[str], typer.Option("--eval", help="MODULE:FUNCTION that scores a merged folder.")
    ] = None,
    trials: Annotated[
        Optional[int], typer.Option(help="Let Optuna choose this many, instead of the whole grid.")
    ] = None,
    minimize: Annotated[bool, typer.Option("--minimize", help="The smallest score is the best.")] = False,
    wandb: Annotated[Optional[str], typer.Option(help="Log the search to this wandb project.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="A row for each tensor.")] = False,
    device: Annotated[
        Optional[str], typer.Option(help="Where to work it out, such as cuda; by default on the CPU.")
    ] = None,
    cast_base: CastBase = False,
    dequantize: Dequantize = False,
    allow_nonfinite: AllowNonfinite = False,
    allow_unchanged: Annotated[
        bool, typer.Option("--allow-unchanged", help="Write a result in which nothing was merged.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse what a configuration says and no merge here uses.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Merge packages and models of one base into a checkpoint or a package."""
    from ..merging.config.task import MergeTask, rounding_of
    from ..merging.merge import run
    from ..parallel.inputs_of import check_apart
    from . import merge_arguments as arguments

    check_apart(out, [Path(source) for source in sources if Path(source).is_file()])
    if dtype is not None:
        rounding = rounding_of(dtype, out_dtype, cast("Rounding | None", rounding))
    models, axes = arguments.axes(sources, search) if search else (sources, [])
    task, notes = arguments.task_and_notes(
        models, method, settings, weights=weight, p=p[0] if p and len(p) == 1 else p, rescale=rescale,
        seed=seed, out_dtype=out_dtype, rounding=rounding,
        tokenizer=tokenizer, exclude=exclude, take=pairs("take", take),
        rename=pairs("rename", rename), fisher=fisher,
        gram=gram, cast_base=cast_base, dequantize=dequantize, strict=strict,
    )  # fmt: skip
    if not isinstance(task, MergeTask):
        if axes or package:
            raise ConfigError("passthrough", expected="no --search and no --package", found="one of them")
        _stack(task, out, allow_nonfinite=allow_nonfinite, overwrite=overwrite)
        return
    if axes:
        if evaluate is None or package:
            raise ConfigError(
                "--search", expected="--eval, and no --package", found="--package" if package else "no --eval"
            )
        show(
            _searched(
                task,
                axes,
                evaluate,
                out,
                trials=trials,
                minimize=minimize,
                overwrite=overwrite,
                device=device,
                project=wandb,
            )
        )
        return
    for note in notes:
        typer.echo(f"dare-train: {printable(note)}", err=True)
    with joined_ranks() as ranks:
        with progress_bar("merging", ranks) as progress:
            report = run(
                task,
                out,
                notes=notes,
                package=package,
                allow_nonfinite=allow_nonfinite,
                allow_unchanged=allow_unchanged,
                overwrite=overwrite,
                device=device,
                progress=progress,
                ranks=ranks,
            )
        if ranks.first:
            show(report.table(every_tensor=tensors))
            typer.echo(report.summary)
            typer.echo(f"{out}: fingerprint {report.fingerprint[:12]}…")


def _stack(what: Any, out: Path, **options: bool) -> None:
    """Layers put one on the other, with nothing merged."""
    from ..merging.stacking import stack

    report = stack(what, out, **options)
    for note in report.notes:
        typer.echo(f"dare-train: {printable(note)}", err=True)
    typer.echo(report.summary)
    typer.echo(f"{out}: fingerprint {report.fingerprint[:12]}…")


def _searched(
    task: Any, axes: Any, evaluate: str, out: Path, *, project: str | None, **options: Any
) -> RenderableType:
    """A table of the trials. The user's function may be anything, so the process is no longer settled for a
    small command.
    """
    from ..merging.search import metric_of, results, search
    from ..wandb_run import searching

    gc.enable()
    with searching(project) as tell:
        trials_done = search(task, axes, metric_of(evaluate), out, told=tell, **options)
    return results(trials_done)

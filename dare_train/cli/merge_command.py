"""`dare-train merge`: arguments, the merge or the search, and what is told of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from ..errors import ConfigError, printable
from . import merge_options as options
from .mergekit_flags import NOTES, MergeCommand
from .terminal import (
    AllowNonfinite,
    CastBase,
    Dequantize,
    Out,
    Overwrite,
    Rename,
    expect_models,
    joined_ranks,
    pairs,
    progress_bar,
    show,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..config import Rounding

app = typer.Typer()


@app.command(cls=MergeCommand)
def merge(
    context: typer.Context,
    sources: options.Sources,
    out: Out,
    method: options.Method = None,
    weight: options.Weight = None,
    p: options.DropRate = None,
    settings: options.Settings = [],  # noqa: B006
    rescale: options.Rescale = None,
    seed: options.Seed = 0,
    out_dtype: options.OutDtype = None,
    dtype: options.Dtype = None,
    rounding: options.RoundingOption = None,
    tokenizer: options.TokenizerOption = None,
    exclude: options.Exclude = [],  # noqa: B006
    take: options.Take = [],  # noqa: B006
    rename: Rename = [],  # noqa: B006
    fisher: options.Fisher = [],  # noqa: B006
    gram: options.Gram = [],  # noqa: B006
    package: options.AsPackage = False,
    search: options.Search = None,
    evaluate: options.Evaluate = None,
    trials: options.Trials = None,
    minimize: options.Minimize = False,
    wandb: options.Wandb = None,
    tensors: options.EveryTensor = False,
    device: options.Device = None,
    cast_base: CastBase = False,
    dequantize: Dequantize = False,
    allow_nonfinite: AllowNonfinite = False,
    allow_unchanged: options.AllowUnchanged = False,
    strict: options.Strict = False,
    intermediate_dir: options.IntermediateDir = None,
    quiet: options.Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Merge packages and models of one base into a checkpoint or a package."""
    from ..merging.config.task import rounding_of
    from ..parallel.inputs_of import check_apart
    from ..parallel.staged_folder import check_free
    from . import merge_arguments as arguments

    check_apart(out, [Path(source) for source in sources if Path(source).is_file()])
    if dtype is not None:
        rounding = rounding_of(dtype, out_dtype, cast("Rounding | None", rounding))
    models, axes = arguments.axes(sources, search) if search else (sources, [])
    asked = arguments.asked(
        models, method, settings, out=out, intermediate_dir=intermediate_dir, weights=weight,
        p=p[0] if p and len(p) == 1 else p, rescale=rescale, seed=seed, out_dtype=out_dtype,
        rounding=rounding, tokenizer=tokenizer, exclude=exclude, take=pairs("take", take),
        rename=pairs("rename", rename), fisher=fisher, gram=gram, cast_base=cast_base,
        dequantize=dequantize, strict=strict,
    )  # fmt: skip
    _tell(context.meta.get(NOTES, ()))
    if axes:
        given = {"trials": trials, "minimize": minimize, "overwrite": overwrite, "device": device}
        show(_searched(asked, axes, evaluate, project=wandb, package=package, **given))
        return
    if package and isinstance(asked[-1], arguments.Stacking):
        raise ConfigError("passthrough", expected="no --package", found="--package")
    written = {"allow_nonfinite": allow_nonfinite, "overwrite": overwrite}
    for each in asked[:-1]:
        check_free(each.out, overwrite)
    for each in asked:
        if isinstance(each, arguments.Stacking):
            _stack(each, **written)
        else:
            _merge(
                each, package=package and each is asked[-1], tensors=tensors, quiet=quiet, device=device,
                allow_unchanged=allow_unchanged, **written,
            )  # fmt: skip


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        typer.echo(f"dare-train: {printable(note)}", err=True)


def _merge(asked: Any, *, tensors: bool, quiet: bool, **given: Any) -> None:
    from ..merging.merge import run

    _tell(asked.notes)
    with joined_ranks() as ranks:
        with nullcontext(None) if quiet else progress_bar("merging", ranks) as progress:
            report = run(asked.task, asked.out, notes=asked.notes, progress=progress, ranks=ranks, **given)
        if ranks.first:
            if not quiet:
                show(report.table(every_tensor=tensors))
            _conclude(report, asked.out)


def _stack(asked: Any, **given: bool) -> None:
    """Layers put one on the other, with nothing merged."""
    from ..merging.stacking import stack

    report = stack(asked.task, asked.out, **given)
    _tell(report.notes)
    _conclude(report, asked.out)


def _conclude(report: Any, out: Path) -> None:
    typer.echo(report.summary)
    typer.echo(f"{out}: fingerprint {report.fingerprint[:12]}…")


def _searched(
    asked: Sequence[Any],
    axes: Any,
    evaluate: str | None,
    *,
    project: str | None,
    package: bool,
    **given: Any,
) -> RenderableType:
    """A table of the trials. The user's function may be anything, so the process is no longer settled for a
    small command.
    """
    from ..evaluation.harness_text import is_harness
    from ..evaluation.wandb_run import searching
    from ..merging.search import metric_of, results, search
    from .merge_arguments import Merging

    (only, *others) = asked
    if others or not isinstance(only, Merging):
        found = f"{len(asked)} merges" if others else "passthrough"
        raise ConfigError("--search", expected="one merge", found=found)
    if evaluate is None or package:
        raise ConfigError(
            "--search", expected="--eval, and no --package", found="--package" if package else "no --eval"
        )
    gc.enable()
    metric = _of_tasks(evaluate, given["minimize"]) if is_harness(evaluate) else metric_of(evaluate)
    with searching(project) as tell:
        trials_done = search(only.task, axes, metric, only.out, told=tell, **given)
    return results(trials_done)


def _of_tasks(evaluate: str, minimize: bool) -> Callable[[str], float]:
    """What a search goes by where `--eval` names tasks of lm-evaluation-harness."""
    from ..evaluation.harness_text import harness_version

    harness_version()
    expect_models()
    from ..evaluation.lm_harness import folder_score

    return folder_score(evaluate, minimize=minimize)

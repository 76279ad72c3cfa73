"""The `dare-train` command: arguments, exit codes, and what a person sees meanwhile.

Exit codes: 0 done; 1 the data said no; 2 the command line was wrong.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional, cast

import typer

from ..errors import ConfigError, DareError, printable
from ..kernels.backends import asked_for
from . import adapter_commands as adapters
from . import merge_command as merging
from . import moe_command as moe
from . import study_commands as studies
from . import training_commands as training
from .given_once import OnceCommand
from .leaving import code_of, leave_cleanly
from .terminal import (
    AllowNonfinite,
    AsJson,
    Base,
    CastBase,
    CastBaseOrNot,
    Dequantize,
    Out,
    Overwrite,
    Package,
    Rename,
    Tuned,
    debugging,
    exit_code,
    expect_models,
    first_word,
    joined_ranks,
    pairs,
    progress_bar,
    settle_streams,
    show,
)

if TYPE_CHECKING:
    from ..config import Rescale, Rounding, Target, Values

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3  # <malloc.h>

app = typer.Typer(
    name="dare-train", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Delta packages: what fine-tuning changed, small, verifiable, applied to the bit.",
)  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        from .._version import __version__

        typer.echo(f"dare_train {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options before the command."""


@app.command(cls=OnceCommand)
def extract(
    base: Base,
    tuned: Tuned,
    out: Out,
    p: Annotated[
        list[str],
        typer.Option(
            "--p", help="Drop rate in [0, 1), or PATTERN=RATE; may be given several times, first match wins."
        ),
    ] = ["0.9"],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Selects the mask.")] = 0,
    rescale: Annotated[str, typer.Option(help="paper: survivors times 1/(1-p). none: drop only.")] = "paper",
    values: Annotated[str, typer.Option(help="auto, exact, rounded, int8, int4 or sign.")] = "auto",
    include: Annotated[
        list[str], typer.Option(help="Name pattern of tensors to cover; may be given several times.")
    ] = ["*"],  # noqa: B006
    exclude: Annotated[list[str], typer.Option(help="Name pattern of tensors to leave as in the base.")] = [],  # noqa: B006
    whole: Annotated[list[str], typer.Option(help="Name pattern of tensors to carry as they are.")] = [],  # noqa: B006
    dtype: Annotated[
        Optional[str],
        typer.Option(
            help="Of the result, where TUNED is finer than BASE: trained (TUNED's) or base (BASE's, by "
            "default where something is dropped)."
        ),
    ] = None,
    rounding: Annotated[
        str, typer.Option(help="With --dtype base, where elements land: stochastic or nearest.")
    ] = "stochastic",
    rename: Rename = [],  # noqa: B006
    cast_base: CastBase = False,
    dequantize: Dequantize = False,
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the delta between two checkpoints as a package."""
    from ..extracting.extract import extract as run
    from ..integrations.written_options import drop_rates

    rates = drop_rates(p, "--p")
    with joined_ranks() as ranks:
        with progress_bar("extracting", ranks) as progress:
            package = run(
                base,
                tuned,
                out,
                p=rates,
                seed=seed,
                rescale=cast("Rescale", rescale),
                values=cast("Values", values),
                include=include,
                exclude=exclude,
                whole=whole,
                rename=pairs("rename", rename),
                cast_base=cast_base,
                dequantize=dequantize,
                allow_nonfinite=allow_nonfinite,
                dtype=cast("Target | None", dtype),
                rounding=cast("Rounding", rounding),
                overwrite=overwrite,
                progress=progress,
                ranks=ranks,
            )
        if ranks.first:
            stats = package.stats
            size = (
                f"{stats['bits_per_parameter']:.3f} bits per parameter, "
                f"{stats['compression_ratio']:.1f}× smaller than the model"
            )
            typer.echo(f"{out}: {stats['bytes']:,} bytes, {size}")


@app.command(cls=OnceCommand)
def apply(
    base: Base,
    packages: Annotated[
        list[str], typer.Argument(metavar="PKG...", help="Packages on this base, or a chain in order.")
    ],
    out: Out,
    weight: Annotated[
        Optional[list[float]],
        typer.Option("--weight", help="Factor of each package, in order; 1 by default."),
    ] = None,
    cast_base: CastBaseOrNot = None,
    dequantize: Dequantize = False,
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the checkpoint that packages make of a base, verified."""
    from ..applying.apply import apply as run

    with joined_ranks() as ranks:
        with progress_bar("applying", ranks) as progress:
            result = run(
                base,
                packages,
                out,
                weights=weight,
                cast_base=cast_base,
                dequantize=dequantize,
                allow_nonfinite=allow_nonfinite,
                overwrite=overwrite,
                progress=progress,
                ranks=ranks,
            )
        if ranks.first:
            verified = "as on record" if weight is None and len(packages) == 1 else "of the combination"
            typer.echo(f"{out}: fingerprint {result[:12]}…, {verified}")


app.add_typer(merging.app)
app.add_typer(moe.app)
app.add_typer(adapters.app)
app.add_typer(studies.app)
app.add_typer(training.app)


@app.command(cls=OnceCommand)
def inspect(
    package: Package,
    as_json: AsJson = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="A row for each tensor instead of each kind.")
    ] = False,
    plot: Annotated[
        Optional[Path], typer.Option(help="Draw density, bits per parameter and |δ| by layer into this file.")
    ] = None,
) -> None:
    """Show what a package holds."""
    from ..package.reader import DeltaPackage
    from ..reports import package_tables as report

    if plot is not None:
        report.picture_format(plot)
    opened = DeltaPackage.open(package)
    show(report.inspect_json(opened) if as_json else report.inspect_table(opened, every_tensor=tensors))
    if plot is not None:
        report.plot(opened, plot)
        typer.echo(f"drew {plot}", err=True)


@app.command(cls=OnceCommand)
def verify(
    package: Package,
    base: Annotated[
        Optional[str],
        typer.Option("--base", help="Also check that this is the right base, and that applying arrives."),
    ] = None,
    cast_base: CastBaseOrNot = None,
    dequantize: Dequantize = False,
) -> None:
    """Check every byte of a package, and with a base the result too."""
    from ..applying.apply import verify as run
    from ..package.reader import DeltaPackage

    opened = DeltaPackage.open(package)
    run(opened, base, cast_base=cast_base, dequantize=dequantize)
    typer.echo(
        f"{package}: intact"
        + (f", and gives {opened.manifest.result[:12]}… on {base}" if base is not None else "")
    )


@app.command(cls=OnceCommand)
def push(
    packages: Annotated[
        list[str], typer.Argument(metavar="PKG... REPO", help="Packages; and the repository, as user/name.")
    ],
    folder: Annotated[
        str, typer.Option(help="Of the repository; by default its root, and of several packages their names.")
    ] = "",
    revision: Annotated[Optional[str], typer.Option(help="The branch, made if it is not there.")] = None,
    private: Annotated[
        Optional[bool],
        typer.Option(
            "--private/--public", help="Of a repository that is made; by default as the account says."
        ),
    ] = None,
    tag: Annotated[Optional[str], typer.Option(help="A name for the commit.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "",
) -> None:
    """Upload packages to the Hub, in one commit."""
    from ..package.sharing import push as run

    *given, repo = packages
    if not given:
        raise ConfigError("push", expected="packages and a repository", found=repo)
    address = run(given, repo, folder=folder, revision=revision, private=private, tag=tag, message=message)
    typer.echo(f"{repo}: {address}")


@app.command(cls=OnceCommand)
def pull(
    where: Annotated[
        str,
        typer.Argument(metavar="REPO", help="user/name, user/name@revision, or hf://user/name/folder."),
    ],
    out: Out,
    revision: Annotated[Optional[str], typer.Option(help="A branch, tag or commit.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Fetch packages from the Hub, every byte of them checked."""
    from ..package.sharing import pull as run

    for path in run(where, out, revision=revision, overwrite=overwrite):
        typer.echo(f"{path}: intact")


@app.command(cls=OnceCommand)
def diagnose(
    base: Base,
    tuned: Tuned,
    rename: Rename = [],  # noqa: B006
    cast_base: CastBase = False,
    dequantize: Dequantize = False,
    as_json: AsJson = False,
) -> None:
    """Will DARE work here, and at which p?"""
    from ..reports import package_tables as report
    from ..studies.diagnosis import diagnose as run

    diagnosis = run(base, tuned, rename=pairs("rename", rename), cast_base=cast_base, dequantize=dequantize)
    show(report.diagnosis_json(diagnosis) if as_json else report.diagnosis_table(diagnosis))


@app.command(cls=OnceCommand)
def dequantize(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A causal language model.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Write a GGUF as a checkpoint in bfloat16, with its tokenizer: a base for packages."""
    from ..weights.files.gguf_files import dequantize as run

    expect_models()
    size = run(file, out, overwrite=overwrite)
    typer.echo(f"{out}: {size['parameters']:,} parameters in bfloat16, {size['bytes']:,} bytes")


def _settle_process() -> None:
    """Settings for a process that lives for one command: together they halve the time of a small one.

    BLAS starts threads that spin, though runs are spread over threads already; the garbage collector walks
    what the imports made, again and again; and glibc hands freed buffers back to the kernel, which then has
    to find fresh pages.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def command() -> NoReturn:
    """The process of `dare-train`: settled for one command, and gone when it is done, without tearing down
    the interpreter.
    """
    if first_word() != "run":  # what somebody else's command inherits stays as it is
        _settle_process()
        leave_cleanly()
    code = code_of(main())
    with suppress(OSError):  # whoever read it is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main() -> int:
    """Run the command line in `sys.argv`; returns the exit code."""
    settle_streams()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when it is imported
    try:
        asked_for()
        app(prog_name="dare-train")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except (DareError, OSError) as error:
        if debugging():
            raise
        print(f"dare-train: {printable(str(error))}", file=sys.stderr)
        return exit_code(error)
    return 0

"""The studies as commands: arguments only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

import typer

from ..config import check_count
from ..errors import CheckpointError, ConfigError, brief, printable
from .given_once import OnceCommand
from .terminal import Base, Out, expect_models, progress_bar

if TYPE_CHECKING:
    import torch

    from ..evaluation.measurements import Evaluate
    from ..evaluation.texts import Texts
    from ..reports.writing import Found

app = typer.Typer()

_Number = TypeVar("_Number", int, float)
_DTYPES = ("auto", "float32", "bfloat16", "float16")

Model = Annotated[str, typer.Argument(metavar="TUNED", help="Folder or Hub id of the fine-tuned model.")]
Models = Annotated[
    list[str],
    typer.Argument(metavar="TUNED...", help="Folders or Hub ids of fine-tuned models of that base."),
]
Eval = Annotated[
    Optional[str],
    typer.Option(
        "--eval",
        help="MODULE:FUNCTION, called with the model; returns a number, or several by name. Or "
        "lm_eval:TASK,TASK: tasks of lm-evaluation-harness, by name or as YAML files.",
    ),
]
Data = Annotated[
    Optional[Path], typer.Option("--data", help="Texts to evaluate on: .jsonl, .json, .csv or .txt.")
]
Columns = Annotated[
    list[str],
    typer.Option(
        "--column", help="NAME=COLUMN: what the columns text, label and prompt are called in --data."
    ),
]
MaxLength = Annotated[int, typer.Option("--max-length", help="Tokens that count of a text.")]
Examples = Annotated[Optional[int], typer.Option("--examples", help="Only the first so many texts.")]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="To compute in: auto (that of the files), float32, bfloat16 or float16."),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the code that came with the model, if it asks for it."),
]
Wandb = Annotated[Optional[str], typer.Option("--wandb", help="Log to this wandb project.")]
Seeds = Annotated[int, typer.Option("--seeds", help="Masks at each rate.")]
FirstSeed = Annotated[int, typer.Option("--first-seed", help="Seed of the first mask.")]


@app.command(cls=OnceCommand)
def sweep(
    base: Base,
    tuned: Models,
    out: Out,
    evaluate: Eval = None,
    data: Data = None,
    p: Annotated[
        Optional[str],
        typer.Option("--p", help="Drop rates, such as 0.5,0.9; twelve from 0 to 0.99 by default."),
    ] = None,
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    variants: Annotated[
        str, typer.Option(help="What to compare: dare, drop_only, magnitude, weights, norm, q.")
    ] = "dare,drop_only,magnitude,weights",
    column: Columns = [],  # noqa: B006
    max_length: MaxLength = 128,
    examples: Examples = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    wandb: Wandb = None,
) -> None:
    """How much can be dropped: a metric against the drop rate, into OUT. Goes on where it was when it runs
    again.
    """
    from ..evaluation.measurements import alone_in
    from ..studies.sweep import SWEEP_RATES, Sweep, planned
    from ..studies.sweep import sweep as run

    _check_inputs(evaluate, data, column, dtype, max_length, examples)
    rates = _numbers("--p", p, float) if p is not None else SWEEP_RATES
    names = variants.split(",")
    planned(rates, seeds, first_seed, names)
    labels = _labels(tuned)
    sweeps = dict[str, Sweep]()
    with alone_in(out):
        for label, folder in zip(labels, tuned, strict=True):
            model = _loaded(folder, dtype, trust_remote_code)
            metric, texts = _metric(
                model, folder, evaluate, data, column, max_length, examples, trust_remote_code
            )
            place = out / label if len(tuned) > 1 else out
            with progress_bar(f"sweeping {label}", of_bytes=False) as progress:
                sweeps[label] = run(
                    model, base, metric, out=place, p=rates, seeds=seeds, first_seed=first_seed,
                    variants=names, tuned=folder if dtype == "auto" else None,
                    batches=texts.batches if texts is not None else None, progress=progress,
                    setup=_depends(evaluate, data, column, max_length, examples, dtype, metric),
                )  # fmt: skip
            sweeps[label] = replace(
                sweeps[label], setup={**_named(base, folder, data), **sweeps[label].setup}
            )
            _publish(sweeps[label], f"How much can be dropped of {label}", place, wandb, quiet=len(tuned) > 1)
        if len(tuned) > 1:
            _publish(sweeps, "When it breaks", out, wandb)


@app.command(cls=OnceCommand)
def inside(
    base: Base,
    tuned: Model,
    out: Out,
    data: Annotated[
        Path, typer.Option("--data", help="Texts for the model to read: .jsonl, .json, .csv or .txt.")
    ],
    p: Annotated[str, typer.Option("--p", help="Drop rates.")] = "0.5,0.9,0.99",
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    masks: Annotated[
        int, typer.Option(help="How many masks the mean error of layer outputs is taken over.")
    ] = 64,
    tokens: Annotated[int, typer.Option(help="How many tokens the figures are about.")] = 2048,
    column: Columns = [],  # noqa: B006
    max_length: MaxLength = 128,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    wandb: Wandb = None,
) -> None:
    """What happens inside: embeddings and layer outputs after dropping, against what is calculated, into
    OUT.
    """
    from ..evaluation.measurements import alone_in
    from ..studies.inside import inside as run

    _check_inputs(None, data, column, dtype, max_length)
    rates = _numbers("--p", p, float)
    with alone_in(out):
        model = _loaded(tuned, dtype, trust_remote_code)
        texts = _texts(model, tuned, data, column, max_length, None, trust_remote_code, labels=False)
        with progress_bar(f"looking into {_labels([tuned])[0]}", of_bytes=False) as progress:
            result = run(
                model, base, texts.batches, p=rates, seeds=seeds, first_seed=first_seed, masks=masks,
                tokens=tokens, progress=progress,
                setup={**_named(base, tuned, data), **_depends(None, data, column, max_length, None, dtype)},
            )  # fmt: skip
        _publish(result, f"What happens inside {_labels([tuned])[0]}", out, wandb)


@app.command(cls=OnceCommand)
def compare(
    base: Base,
    tuned: Model,
    out: Out,
    evaluate: Eval = None,
    data: Data = None,
    p: Annotated[
        Optional[str], typer.Option("--p", help="Drop rates; six from 0.5 to 0.99 by default.")
    ] = None,
    rank: Annotated[
        Optional[str], typer.Option("--rank", help="Ranks of truncated SVDs, such as 1,4,16.")
    ] = None,
    adapter: Annotated[
        list[str], typer.Option("--adapter", help="Folder of a LoRA adapter trained for the same task.")
    ] = [],  # noqa: B006
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    column: Columns = [],  # noqa: B006
    max_length: MaxLength = 128,
    examples: Examples = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    wandb: Wandb = None,
) -> None:
    """Quality against bytes: DARE's packages, low rank, 1 bit, magnitude pruning and LoRA, into OUT. Goes on
    where it was.
    """
    from ..evaluation.measurements import alone_in
    from ..studies.comparison import RANKS, RATES
    from ..studies.comparison import compare as run

    _check_inputs(evaluate, data, column, dtype, max_length, examples)
    rates = _numbers("--p", p, float) if p is not None else RATES
    ranks = _numbers("--rank", rank, int) if rank is not None else RANKS
    with alone_in(out):
        model = _loaded(tuned, dtype, trust_remote_code)
        metric, _ = _metric(model, tuned, evaluate, data, column, max_length, examples, trust_remote_code)
        with progress_bar("comparing", of_bytes=False) as progress:
            result = run(
                model, base, tuned, metric, out=out, p=rates, ranks=ranks, seeds=seeds, first_seed=first_seed,
                adapters=adapter,
                setup=_depends(evaluate, data, column, max_length, examples, dtype, metric),
                progress=progress,
            )  # fmt: skip
        result = replace(result, setup={**_named(base, tuned, data), **result.setup})
        _publish(result, f"What the delta of {_labels([tuned])[0]} is worth in bytes", out, wandb)


def _check_inputs(
    evaluate: str | None,
    data: Path | None,
    columns: Sequence[str],
    dtype: str,
    max_length: int,
    examples: int | None = None,
) -> None:
    """What can be seen to be wrong before a model is loaded."""
    from ..evaluation.harness_text import HarnessText, harness_version, is_harness

    if evaluate is None and data is None:
        raise ConfigError("--eval", expected="MODULE:FUNCTION, or a file of texts as --data", found="neither")
    if data is not None and not data.is_file():
        raise CheckpointError(str(data), expected="a file of texts", found="no such file")
    if is_harness(evaluate):
        HarnessText.of(evaluate)
        harness_version()
    check_count("--max-length", max_length)
    if examples is not None:
        check_count("--examples", examples)
    if dtype not in _DTYPES:
        raise ConfigError("--dtype", expected=", ".join(_DTYPES), found=dtype)
    for pair in columns:
        name, _, column = pair.partition("=")
        if name not in ("text", "label", "prompt") or not column:
            raise ConfigError(
                "--column", expected="text=, label= or prompt= and the name of a column", found=pair
            )


def _loaded(folder: str, dtype: str, trusted: bool) -> torch.nn.Module:
    expect_models()
    from ..evaluation.model_loading import load_model

    return load_model(folder, dtype, trust_remote_code=trusted)


def _metric(
    model: torch.nn.Module,
    folder: str,
    evaluate: str | None,
    data: Path | None,
    columns: Sequence[str],
    max_length: int,
    limit: int | None,
    trusted: bool,
) -> tuple[Evaluate, Texts | None]:
    """What is measured, and the texts, if there are any."""
    from ..evaluation.harness_text import is_harness
    from ..evaluation.lm_harness import HarnessTasks
    from ..evaluation.model_loading import load_tokenizer
    from ..merging.search import metric_of

    texts = _texts(model, folder, data, columns, max_length, limit, trusted) if data is not None else None
    if is_harness(evaluate):
        tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
        return HarnessTasks(evaluate, tokenizer, limit=limit), texts
    if evaluate is not None:
        return metric_of(evaluate), texts
    assert texts is not None
    return texts, texts


def _texts(
    model: torch.nn.Module,
    folder: str,
    data: Path,
    columns: Sequence[str],
    max_length: int,
    limit: int | None,
    trusted: bool,
    *,
    labels: bool = True,
) -> Texts:
    from ..evaluation.model_loading import load_tokenizer
    from ..evaluation.texts import load_texts

    named = dict(pair.split("=", 1) for pair in columns)
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    return load_texts(
        model, tokenizer, data, columns=named, max_length=max_length, limit=limit, labels=labels
    )


def _named(base: str, model: str, data: Path | None) -> dict[str, str]:
    """What models and data are called here."""
    return {"base_model": base, "model": model, **({"data": str(data)} if data is not None else {})}


def _depends(
    evaluate: str | None,
    data: Path | None,
    columns: Sequence[str],
    max_length: int,
    examples: int | None,
    dtype: str,
    metric: Evaluate | None = None,
) -> dict[str, Any]:
    """What the figures depend on besides the weights, wherever it lies."""
    from ..evaluation.lm_harness import HarnessTasks

    setup: dict[str, Any] = {"eval": evaluate, "columns": sorted(columns) or None, "examples": examples}
    if data is not None:
        setup["data_sha256"] = hashlib.sha256(data.read_bytes()).hexdigest()
    if isinstance(metric, HarnessTasks):
        setup |= metric.setup
    return {name: value for name, value in setup.items() if value is not None} | {
        "max_length": max_length,
        "dtype": dtype,
    }


def _publish(result: Found, title: str, out: Path, project: str | None, *, quiet: bool = False) -> None:
    """Files, wandb, and unless `quiet` the tables on the terminal."""
    from ..evaluation.wandb_run import studying
    from ..reports.writing import study_of, write_study

    study = study_of(result, title)
    with studying(project):
        page = write_study(study, out)
    if not quiet:
        typer.echo("\n".join(map(printable, study.markdown().split("\n"))))
    typer.echo(f"{page}", err=True)


def _labels(folders: Sequence[str]) -> list[str]:
    """The folders' own names, numbered where two would have the same."""
    names = [Path(folder).name or folder for folder in folders]
    return [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names)]


def _numbers(option: str, text: str, kind: Callable[[str], _Number]) -> list[_Number]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        expected = f"{'whole ' * (kind is int)}numbers with commas between them"
        raise ConfigError(option, expected=expected, found=brief(text)) from error

"""What `dare-train merge` is told, option by option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="BASE MODEL... | CONFIG.yml", help="Packages and checkpoints; or a configuration."
    ),
]
Method = Annotated[Optional[str], typer.Option(help="task_arithmetic by default.")]
Weight = Annotated[
    Optional[list[float]], typer.Option("--weight", help="Factor of each model, in order; 1 by default.")
]
DropRate = Annotated[
    Optional[list[float]],
    typer.Option("--p", help="Drop rate of DARE before the method: one, or one for each model."),
]
Settings = Annotated[
    list[str], typer.Option("--set", help="NAME=VALUE of the method, such as density=0.2 or lambda=0.5.")
]
Rescale = Annotated[Optional[str], typer.Option(help="paper: 1/(1-p). norm: mergekit's. q: DAREx's. none.")]
Seed = Annotated[int, typer.Option(help="Selects the masks.")]
OutDtype = Annotated[Optional[str], typer.Option(help="BF16, F16, F32 or F64; the base's by default.")]
Dtype = Annotated[
    Optional[str], typer.Option(help="base: the result has the base's dtypes, rounded by draws.")
]
RoundingOption = Annotated[
    Optional[str], typer.Option(help="Of the result: nearest (default), or stochastic.")
]
TokenizerOption = Annotated[Optional[str], typer.Option(help="Whose: base, union, or a model.")]
Exclude = Annotated[list[str], typer.Option(help="Name pattern of tensors to leave as in the base.")]
Take = Annotated[list[str], typer.Option(help="PATTERN=MODEL: take these tensors from that model.")]
Fisher = Annotated[
    list[str], typer.Option(help="Fisher statistics of each model; those beside it by default.")
]
Gram = Annotated[list[str], typer.Option(help="Gram matrices of each model; those beside it by default.")]
AsPackage = Annotated[bool, typer.Option("--package", help="Write a delta package instead of a checkpoint.")]
Search = Annotated[
    Optional[str], typer.Option(help="Settings to search: NAME=LOW:HIGH:STEP or NAME=A,B; more may follow.")
]
Evaluate = Annotated[
    Optional[str],
    typer.Option(
        "--eval",
        help="MODULE:FUNCTION that scores a merged folder; or lm_eval:TASK,TASK, tasks of "
        "lm-evaluation-harness.",
    ),
]
Trials = Annotated[
    Optional[int], typer.Option(help="Let Optuna choose this many, instead of the whole grid.")
]
Minimize = Annotated[bool, typer.Option("--minimize", help="The smallest score is the best.")]
Wandb = Annotated[Optional[str], typer.Option(help="Log the search to this wandb project.")]
EveryTensor = Annotated[bool, typer.Option("--tensors", help="A row for each tensor.")]
Device = Annotated[
    Optional[str], typer.Option(help="Where to work it out, such as cuda; by default on the CPU.")
]
AllowUnchanged = Annotated[
    bool, typer.Option("--allow-unchanged", help="Write a result in which nothing was merged.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse what a configuration says and no merge here uses.")
]
IntermediateDir = Annotated[
    Optional[Path],
    typer.Option(help="Where a file of several merges puts those with a name; OUT-parts by default."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but what is noted, and the result.")]

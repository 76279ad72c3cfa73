"""What was found, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from .trial import STEPS, Record

VERDICTS = ("right", "wrong", "refused", "not possible")
_HEAD = """\
# Architectures

Which of the architectures of transformers {transformers} a package knows, tried with PEFT {peft} and
torch {torch}: a tiny model of each class, its default configuration made small, noise in the place of
training. `scripts/architectures --table docs/architectures.md` made this page; records of what it tried
are kept in a folder, so that it goes on where it was stopped, and `--shard I/N` cuts the work in parts.
The tests try the 40 most used.

Results are compared bit for bit with the files that `save_pretrained` writes of the tuned model, and with
those of the model that PEFT merges, whose factors are chosen such that float32 holds their products exactly.

* **snapshot**: the package of a live model is the one of its files.
* **extract and apply**: a package at p = 0 makes the tuned files.
* **apply_ and revert**: the same in a live model, which is then saved, and back.
* **merge**: the average of two packages is that of their models, loads with no tensor missing, and ties
  what the base ties.
* **LoRA live**, **LoRA from its folder**: adapters on all linear layers, and on stacked experts, give
  PEFT's merged model.

*Not possible*: transformers or PEFT cannot do it either.

"""


def summary(records: Sequence[Record]) -> str:
    """Counts by step."""
    built = [record for record in records if record.steps]
    types = len({record.model_type for record in records})
    lines = [
        f"{len(records)} classes of {types} model types, {len(built)} of them built.",
        "",
        f"| step | {' | '.join(VERDICTS)} |",
        f"|---|{'---|' * len(VERDICTS)}",
    ]
    for step in STEPS:
        counts = Counter(record.steps[step].verdict for record in built)
        lines.append(f"| {step} | {' | '.join(str(counts[verdict]) for verdict in VERDICTS)} |")
    return "\n".join(lines) + "\n"


def table(records: Sequence[Record], untried: Sequence[str] = ()) -> str:
    """The page: counts, then what is not right and why, then what was not built, then all names."""
    parts = [_HEAD.format(**_versions()), summary(records), "\n## What is not right\n"]
    parts += [f"* {line}\n" for line in _not_right(records, ("wrong", "refused"))] or ["Nothing.\n"]
    parts.append("\n## What transformers or PEFT cannot do either\n\n")
    parts += [f"* {line}\n" for line in _not_right(records, ("not possible",))]
    parts.append("\n## What was not built\n\n")
    parts += [f"* {record.name}: {_plain(record.unbuilt)}\n" for record in records if record.unbuilt]
    parts.append("\n## What was tried\n\n")
    for kind in sorted({record.kind for record in records}):
        names = ", ".join(record.name for record in records if record.kind == kind and record.steps)
        parts.append(f"**{kind}**: {names}\n\n")
    if untried:
        parts.append(f"## What was not tried yet\n\n{', '.join(untried)}\n")
    return "".join(parts).rstrip() + "\n"


def _not_right(records: Iterable[Record], verdicts: Sequence[str]) -> Iterator[str]:
    """A line for each reason, with all classes that have it."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for step, (verdict, why) in record.steps.items():
            if verdict in verdicts:
                reasons.setdefault((f"{step}, {verdict}", _plain(why)), []).append(record.name)
    for (what, why), names in sorted(reasons.items()):
        yield f"{what}: {', '.join(names)}: {why}"


def _plain(text: str) -> str:
    """A reason without the folder that it happened in."""
    words = (word for word in text.replace("|", "/").split() if not word.startswith("/tmp"))
    return " ".join(words)


def _versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    return {
        "peft": peft.__version__,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
    }

"""Whether lm-evaluation-harness judges a chat model's choices as the recipes do: what
`scripts/harness agree MODEL DATA` runs.

Both ask in the model's chat template and choose the answer of the least loss per character. The recipes' loss
is also that of the tokens which end an answer, which the harness does not know of.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chat_answers
import torch
from choice_questions import Choice, choice_questions

from dare_train import HarnessTasks, load_model
from dare_train.evaluation.model_loading import load_tokenizer

NAMES = ("arc_easy", "openbookqa")
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One task's questions, which answers the recipes and the harness chose, and the harness's figure."""

    name: str
    questions: list[Choice]
    recipes: list[int]
    harness: list[int]
    acc_norm: float

    def __str__(self) -> str:
        answers = [question["answer"] for question in self.questions]
        right = sum(map(int.__eq__, self.recipes, answers)) / len(answers)
        same = sum(map(int.__eq__, self.recipes, self.harness))
        told = f"{same} of {len(answers)} choices are the same"
        return f"{self.name}: acc_norm {self.acc_norm:.4f}, the recipes' {right:.4f}; {told}"


def judged(name: str, model: Any, tokenizer: Any, data: Path, limit: int) -> Judged:
    questions = choice_questions(name, data, limit)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, f"{name}.yaml")
        path.write_text(TASK.format(name=name, file=(data / name / "test.jsonl").resolve()))
        tasks = HarnessTasks(f"lm_eval:{path}?limit={limit}&apply_chat_template=true", tokenizer)
        acc_norm = tasks(model)[f"{name}/acc_norm"]
    logs: dict[int, dict[int, float]] = defaultdict(dict)
    for asked in tasks._tasks["tasks"][name].instances:
        logs[asked.doc_id][asked.idx] = asked.resps[0][0] / len(questions[asked.doc_id]["choices"][asked.idx])
    harness = [max(found, key=found.__getitem__) for _, found in sorted(logs.items())]
    recipes = chat_answers.choices(model, tokenizer, questions)
    return Judged(name=name, questions=questions, recipes=recipes, harness=harness, acc_norm=acc_norm)


def main() -> None:
    folder, data, *most = sys.argv[1:]
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    for name in NAMES:
        print(judged(name, model, tokenizer, Path(data), int(most[0]) if most else 60), flush=True)


if __name__ == "__main__":
    main()

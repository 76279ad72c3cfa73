"""Whether lm-evaluation-harness judges a chat model's choices as the recipes do: what
`scripts/harness agree MODEL DATA` runs.

Both ask in the model's chat template and choose the answer of the least loss per character. To the recipes'
loss the tokens belong that end an answer, of which the harness knows nothing. So it is asked twice: by a
plain task, and by one whose choices have that end, which is not counted among their characters.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
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
doc_to_target: answer
metric_list:
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
PLAIN = "doc_to_choice: choices\n"
ENDED = "doc_to_choice: !function functions.ended\nprocess_results: !function functions.per_character\n"
FUNCTIONS = """
def ended(doc):
    return [choice + {end!r} for choice in doc["choices"]]

def per_character(doc, results):
    each = [log / len(choice) for (log, _), choice in zip(results, doc["choices"])]
    return {{"acc_norm": float(each.index(max(each)) == doc["answer"])}}
"""


def main() -> None:
    folder, data, *most = sys.argv[1:]
    limit = int(most[0]) if most else 60
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    for name in NAMES:
        questions = choice_questions(name, Path(data), limit)
        answers = [question["answer"] for question in questions]
        recipes = chat_answers.choices(model, tokenizer, questions)
        right = sum(map(int.__eq__, recipes, answers)) / len(answers)
        print(f"{name}, {len(answers)} questions: the recipes' {right:.4f}", flush=True)
        for kind, more in {"plain": PLAIN, "ended": ENDED}.items():
            task = TASK.format(name=name, file=Path(data, name, "test.jsonl").resolve()) + more
            acc_norm, chosen = of_harness(model, tokenizer, questions, name, task)
            same = sum(map(int.__eq__, recipes, chosen))
            print(f"    {kind}: acc_norm {acc_norm:.4f}, {same} choices are the recipes'", flush=True)


def of_harness(
    model: Any, tokenizer: Any, questions: Sequence[Choice], name: str, task: str
) -> tuple[float, list[int]]:
    """A task's `acc_norm`, and which answers were chosen."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "task.yaml")
        path.write_text(task)
        Path(place, "functions.py").write_text(FUNCTIONS.format(end=end_of_answer(tokenizer)))
        tasks = HarnessTasks(f"lm_eval:{path}?limit={len(questions)}&apply_chat_template=true", tokenizer)
        acc_norm = tasks(model)[f"{name}/acc_norm"]
    logs: dict[int, dict[int, float]] = defaultdict(dict)
    for asked in tasks._tasks["tasks"][name].instances:
        logs[asked.doc_id][asked.idx] = asked.resps[0][0] / len(questions[asked.doc_id]["choices"][asked.idx])
    return acc_norm, [max(found, key=found.__getitem__) for _, found in sorted(logs.items())]


def end_of_answer(tokenizer: Any) -> str:
    """What the chat template puts after an answer."""
    asked = [{"role": "user", "content": "question"}]
    before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    told = [*asked, {"role": "assistant", "content": "answer"}]
    whole: str = tokenizer.apply_chat_template(told, tokenize=False)
    return whole.removeprefix(f"{before}answer")


if __name__ == "__main__":
    main()

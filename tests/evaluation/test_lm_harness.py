"""Tasks of lm-evaluation-harness in local files, as what studies and searches measure by.

They run where the harness is installed: `scripts/harness`.
"""

from __future__ import annotations

import json
import random
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import dare_train
from harness_tasks import by_definition, needs_harness, questions, save_task, theirs
from tiny import refusal
from training import classifier, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer
from worded_models import save_llama

from dare_train import HarnessTasks
from dare_train.errors import CheckpointError, ConfigError, DareError
from dare_train.evaluation.lm_harness import Score, folder_score

pytestmark = [needs_harness, theirs]

FUNCTION = "process_results: !function functions.{}\n"
CODE = "unsafe_code: true\n"
ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}w1 {{ m.content }} w2 {% else %}{{ m.content }} w3 w4"
    "{% endif %}{% endfor %}"
)
LESS = "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: false\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "base", torch.float32, tied=False)


def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def refused(action: Any, kind: type[DareError], *texts: str) -> None:
    before = generators()
    with pytest.raises(DareError) as caught:
        action()
    refusal(caught.value, kind, *texts)
    assert generators() == before


def test_metrics_are_those_of_the_definition(base: Path, tmp_path: Path) -> None:
    path = save_task(tmp_path / "tasks")
    model, tokenizer = loaded(base)
    model.train()
    tokenizer.pad_token = None
    before = generators()
    found = HarnessTasks(f"lm_eval:{path}", tokenizer)(model)
    assert generators() == before
    assert model.training
    assert tokenizer.pad_token is None
    expected = by_definition(model, tokenizer, questions(30, 1))
    assert found == {f"quiz/{name}": pytest.approx(value) for name, value in expected.items()}


def test_metrics_are_those_of_the_harness(base: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    path = save_task(tmp_path / "tasks", more="num_fewshot: 2\n")
    model, tokenizer = loaded(base)
    ours = HarnessTasks(f"lm_eval:{path}?limit=20", tokenizer)(model)
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=[str(path)],
        limit=20,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    assert ours == {f"quiz/{name}": theirs["results"]["quiz"][f"{name},none"] for name in ("acc", "acc_norm")}


def test_several_tasks_and_their_mean(base: Path, tmp_path: Path) -> None:
    paths = [save_task(tmp_path / "tasks", name, seed=seed) for seed, name in enumerate(("one", "two"))]
    model, tokenizer = loaded(base)
    text = f"lm_eval:{paths[0]},{paths[1]}"
    tasks = HarnessTasks(text, tokenizer)
    found = tasks(model)
    assert [*found] == ["one/acc", "one/acc_norm", "two/acc", "two/acc_norm"]
    assert tasks.scores(model, tokenizer) == [
        Score(name=f"{name}/acc_norm", value=found[f"{name}/acc_norm"], more_is_better=True)
        for name in ("one", "two")
    ]
    mean = (found["one/acc_norm"] + found["two/acc_norm"]) / 2
    assert folder_score(text)(str(base)) == pytest.approx(mean)


def test_a_group_gives_what_it_puts_together(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups are told by name; here the harness knows those of a folder."""
    from lm_eval import tasks as known

    manager = known.TaskManager
    monkeypatch.setattr(known, "TaskManager", lambda **_: manager(None, tmp_path / "tasks", False))
    paths = [save_task(tmp_path / "tasks", name, seed=seed) for seed, name in enumerate(("one", "two"))]
    group = tmp_path / "tasks/both.yaml"
    group.write_text("group: both\ntask: [one, two]\naggregate_metric_list:\n  - metric: acc\n")
    (tmp_path / "tasks/loose.yaml").write_text("group: loose\ntask: [one, two]\n")
    model, tokenizer = loaded(base)
    parts = HarnessTasks(f"lm_eval:{paths[0]},{paths[1]}", tokenizer)(model)
    assert HarnessTasks("lm_eval:loose", tokenizer)(model) == parts
    both = HarnessTasks("lm_eval:both", tokenizer)
    assert both(model) == {"both/acc": pytest.approx((parts["one/acc"] + parts["two/acc"]) / 2)}
    assert [score.more_is_better for score in both.scores(model, tokenizer)] == [True]
    refused(lambda: HarnessTasks("lm_eval:both,one"), ConfigError, "each task once", "one twice")
    refused(lambda: HarnessTasks("lm_eval:xyzzy"), ConfigError, "none of that name", "lm_eval ls tasks")
    refused(lambda: HarnessTasks(f"lm_eval:{group}"), ConfigError, "one of a group", "name its tasks' files")
    save_task(tmp_path / "tasks", "code", more=f"{CODE}tag: risky\n{FUNCTION.format('not_there')}")
    for name in ("code", "risky"):
        refused(lambda: HarnessTasks(f"lm_eval:{name}"), ConfigError, "code", "set HF_ALLOW_CODE_EVAL=1")  # noqa: B023


def test_only_the_first_examples(base: Path, tmp_path: Path) -> None:
    path = save_task(tmp_path / "tasks")
    model, tokenizer = loaded(base)
    expected = by_definition(model, tokenizer, questions(30, 1)[:7])
    for tasks in (
        HarnessTasks(f"lm_eval:{path}?limit=7&batch_size=2", tokenizer),
        HarnessTasks(f"lm_eval:{path}", tokenizer, limit=7),
    ):
        assert tasks(model)["quiz/acc"] == pytest.approx(expected["acc"])
    refused(lambda: HarnessTasks(f"lm_eval:{path}?limit=7", limit=8), ConfigError, "one limit", "7 and 8")
    refused(lambda: HarnessTasks(f"lm_eval:{path}", limit=0), ConfigError, "one limit, above 0", "found 0")


def test_a_setup_is_what_is_asked_wherever_it_lies(tmp_path: Path) -> None:
    here = HarnessTasks(f"lm_eval:{save_task(tmp_path / 'here')}").setup
    assert here["lm_eval"].count(".") == 2
    assert here != HarnessTasks(f"lm_eval:{save_task(tmp_path / 'other', seed=2)}").setup
    first = HarnessTasks(f"lm_eval:{tmp_path / 'here/quiz.yaml'}?limit=3").setup
    assert first != here
    save_task(tmp_path / "here", count=40)
    assert HarnessTasks(f"lm_eval:{tmp_path / 'here/quiz.yaml'}?limit=3").setup == first


def test_chat_models_are_asked_in_their_template(base: Path, tmp_path: Path) -> None:
    path = save_task(tmp_path / "tasks")
    model, tokenizer = loaded(base)
    asked = HarnessTasks(f"lm_eval:{path}?apply_chat_template=true", tokenizer)
    refused(lambda: asked(model), CheckpointError, "tasks that can be measured", "chat_template")
    tokenizer.chat_template = "{% for m in messages %}w1 w2 {{ m.content }} w3 {% endfor %}"
    told = [
        {**row, "question": f"w1 w2 {row['question']} w3"}
        for row in questions(30, 1)
    ]  # fmt: skip
    expected = by_definition(model, tokenizer, told)
    found = HarnessTasks(f"lm_eval:{path}?apply_chat_template=true", tokenizer)(model)
    assert found == {f"quiz/{name}": pytest.approx(value) for name, value in expected.items()}


def test_chat_models_choose_as_in_the_recipes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("recipes", "scripts"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    agreement, answers = (import_module(name) for name in ("agree_with_harness", "chat_answers"))
    model, tokenizer = loaded(base)
    tokenizer.chat_template = TEMPLATE
    assert agreement.end_of_answer(tokenizer) == " w3 w4"
    file = save_task(tmp_path / "tasks").with_suffix(".jsonl")
    chosen = {}
    for kind in ("PLAIN", "ENDED"):
        task = agreement.TASK.format(name="quiz", file=file) + getattr(agreement, kind)
        acc_norm, chosen[kind] = agreement.of_harness(model, tokenizer, questions(30, 1), "quiz", task)
        right = [row["answer"] == one for row, one in zip(questions(30, 1), chosen[kind], strict=True)]
        assert acc_norm == pytest.approx(sum(right) / 30)
    assert chosen["ENDED"] == answers.choices(model, tokenizer, questions(30, 1))
    assert chosen["ENDED"] != chosen["PLAIN"]


def test_tasks_that_cannot_be_had(tmp_path: Path) -> None:
    refused(lambda: HarnessTasks("lm_eval:arc_esy"), ConfigError, "arc_esy", "none of that name", "arc_easy?")
    path = save_task(tmp_path / "tasks")
    again = save_task(tmp_path / "tasks", file="again.yaml")
    refused(lambda: HarnessTasks(f"lm_eval:{path},{again}"), ConfigError, "each task once", "quiz twice")
    path.with_suffix(".jsonl").unlink()
    refused(lambda: HarnessTasks(f"lm_eval:{path}"), CheckpointError, "expected a task with its data")
    path.write_text("nothing: here\n")
    refused(lambda: HarnessTasks(f"lm_eval:{path}"), CheckpointError, "expected a task with its data")


@pytest.mark.parametrize(
    ("function", "kind", "texts"),
    [
        ("nothing", ConfigError, ("lm_eval:quiz", "finite numbers", "found none")),
        ("no_number", ConfigError, ("lm_eval:quiz", "finite numbers", "nan")),
        ("fails", CheckpointError, ("tasks that can be measured", "RuntimeError: no")),
    ],
)
def test_tasks_that_give_no_number(
    base: Path, tmp_path: Path, function: str, kind: type[DareError], texts: tuple[str, ...]
) -> None:
    path = save_task(tmp_path / "tasks", more=FUNCTION.format(function))
    model, tokenizer = loaded(base)
    model.train()
    tasks = HarnessTasks(f"lm_eval:{path}", tokenizer)
    refused(lambda: tasks(model), kind, *texts)
    assert model.training


def test_models_that_cannot_be_asked(base: Path, tmp_path: Path) -> None:
    path = save_task(tmp_path / "tasks")
    model, tokenizer = loaded(base)
    refused(lambda: HarnessTasks(f"lm_eval:{path}")(model), ConfigError, "tokenizer", "found none")
    other = classifier(save_base(tmp_path / "encoder"))
    tasks = HarnessTasks(f"lm_eval:{path}", tokenizer)
    refused(lambda: tasks(other), ConfigError, "a language model", "BertForSequenceClassification")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    refused(lambda: folder_score(f"lm_eval:{path}")(str(base)), CheckpointError, "a tokenizer beside")


def test_what_a_model_writes_is_run_only_where_that_is_allowed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_task(tmp_path / "tasks", more=CODE)
    refused(lambda: HarnessTasks(f"lm_eval:{path}"), ConfigError, "quiz", "set HF_ALLOW_CODE_EVAL=1")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    model, tokenizer = loaded(base)
    assert HarnessTasks(f"lm_eval:{path}", tokenizer)(model)


def test_a_search_goes_the_tasks_way(base: Path, tmp_path: Path) -> None:
    path = save_task(tmp_path / "tasks")
    refused(
        lambda: folder_score(f"lm_eval:{path}", minimize=True)(str(base)),
        ConfigError, "quiz/acc_norm", "less is better", "leave --minimize out",
    )  # fmt: skip
    worse = tmp_path / "tasks/worse.yaml"
    worse.write_text(path.read_text().partition("metric_list")[0] + LESS)
    refused(lambda: folder_score(f"lm_eval:{worse}")(str(base)), ConfigError, "quiz/acc", "pass --minimize")
    assert folder_score(f"lm_eval:{worse}", minimize=True)(str(base)) >= 0


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    shutil.copytree(base, tmp_path / "tuned")
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_studies_measure_by_tasks(base: Path, tuned: Path, tmp_path: Path) -> None:
    path = save_task(tmp_path / "tasks", count=12)
    metric = HarnessTasks(f"lm_eval:{path}", AutoTokenizer.from_pretrained(base))
    expected = {
        name: pytest.approx(value)
        for name, value in metric(AutoModelForCausalLM.from_pretrained(tuned)).items()
    }
    words = ("--eval", "lm_eval:tasks/quiz.yaml", "--p", "0.5", "--seeds", 1)
    sweeping = ("sweep", "base", "tuned", "--out", "sweep", *words, "--variants", "dare")
    done = dare_train(*sweeping, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, *points = map(json.loads, (tmp_path / "sweep/sweep.jsonl").read_text().splitlines())
    assert head["setup"] == {
        "eval": "lm_eval:tasks/quiz.yaml", "max_length": 128, "dtype": "auto", **metric.setup
    }  # fmt: skip
    assert {point["p"]: point["metrics"] for point in points}[0.0] == expected
    assert (tmp_path / "sweep/sweep-quiz-acc_norm.png").is_file()
    done = dare_train("compare", "base", "tuned", "--out", "compare", *words, "--rank", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, *points = map(json.loads, (tmp_path / "compare/compare.jsonl").read_text().splitlines())
    (dense,) = (point["metrics"] for point in points if point["variant"] == "dense")
    assert {name: value for name, value in dense.items() if name != "bits"} == expected
    save_task(tmp_path / "tasks", count=13)
    done = dare_train(*sweeping, cwd=tmp_path)
    assert done.returncode == 1
    assert "expected measurements with tasks_sha256" in done.stderr.splitlines()[-1]


def test_a_search_is_scored_by_tasks(base: Path, tuned: Path, tmp_path: Path) -> None:
    path = save_task(tmp_path / "tasks", count=12)
    searching = ("merge", "base", "tuned", "--out", "merged", "--search", "weight=0:1:1", "--eval")
    done = dare_train(*searching, "lm_eval:tasks/quiz.yaml?limit=10", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    score = folder_score(f"lm_eval:{path}?limit=10")
    assert all(f"{score(str(folder)):.4g}"[:5] in done.stdout for folder in (base, tuned)), done.stdout
    done = dare_train(*searching, "lm_eval:tasks/none.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "no such file" in done.stderr

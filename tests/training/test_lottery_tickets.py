"""Lottery tickets: each level trains fewer elements from where they were, and a search that was killed goes
on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from task_sequences import Stopped, task, trained
from tiny import refusal
from training import classifier, save_base, weights_print
from transformers import Trainer

from dare_train import TicketSearch, applied, apply, write_report
from dare_train.errors import CheckpointError, ConfigError
from dare_train.evaluation.model_loading import load_model
from dare_train.reports.document import Chart
from dare_train.reports.tickets_report import tickets_study
from dare_train.training.lottery_tickets import Tickets
from dare_train.training.subnetwork import Masks, by_size, shuffled


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tickets")
    classifier(save_base(folder / "encoder", layers=1)).save_pretrained(folder / "base")
    return str(folder / "base")


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Tickets:
    """A search of one level to its end, for all tests."""
    return TicketSearch(base, task(1), out=tmp_path_factory.mktemp("whole"), levels=1, every=2).run()


def test_each_level_keeps_the_largest_of_the_one_before(base: str, tmp_path: Path) -> None:
    search = TicketSearch(base, task(1), out=tmp_path / "out", levels=2, share=0.6, every=3)
    found = search.run()
    assert [(level.kind, level.number) for level in found.levels] == [
        ("ticket", 0),
        ("ticket", 1),
        ("random", 1),
        ("ticket", 2),
        ("random", 2),
    ]
    assert [level.density for level in found.of("ticket")] == pytest.approx([1, 0.4, 0.16], abs=2e-3)
    assert [level.density for level in found.of("random")] == pytest.approx([1, 0.4, 0.16], abs=2e-2)
    start = load_file(Path(base) / "model.safetensors")
    states = []
    for level in found.levels:
        apply(base, level.package, tmp_path / f"{level.kind}-{level.number}")
        states.append(load_file(tmp_path / f"{level.kind}-{level.number}" / "model.safetensors"))
        with applied(model := load_model(base), level.package):
            assert task(1).evaluate(model) == level.metrics
        assert [*level.curve] == [3, 6]
        assert level.metrics["loss"] < task(1).evaluate(load_model(base))["loss"]
    masks = by_size(base, tmp_path / "ticket-0", density=0.4, scope="model")
    for name, mask in search.masks(1).items():
        assert torch.equal(torch.from_numpy(mask), torch.from_numpy(masks[name]))
        assert not ((states[1][name] != start[name]).numpy() & ~mask).any()
    assert search.masks(2).overlap(search.masks(1) & search.masks(2)).iou == 1.0


def test_rewinding_starts_from_an_early_step(base: str, whole: Tickets, tmp_path: Path) -> None:
    rewound = TicketSearch(base, task(1), out=tmp_path / "rewound", levels=1, beside=(), rewind=2).run()
    assert rewound.levels[0].metrics == whole.levels[0].metrics
    assert rewound.levels[1].metrics["loss"] < whole.levels[1].metrics["loss"], (
        "two more steps were trained in all"
    )


def test_ablations_of_a_ticket(base: str, tmp_path: Path) -> None:
    other = TicketSearch(base, task(0), out=tmp_path / "other", levels=1, beside=(), rewind=2)
    other.run()
    search = TicketSearch(
        base,
        task(1),
        out=tmp_path / "out",
        levels=1,
        rewind=2,
        beside=("shuffled", "reinitialised"),
        transfer=other,
    )
    found = search.run()
    assert [level.kind for level in found.levels] == [
        "ticket",
        "ticket",
        "shuffled",
        "reinitialised",
        "transferred",
    ]
    masks = {level.kind: Masks.of_package(level.package) for level in found.levels[1:]}
    assert masks["transferred"].overlap(other.masks(1)).iou == 1.0
    assert masks["reinitialised"].overlap(masks["ticket"]).iou == 1.0
    assert masks["shuffled"].overlap(shuffled(masks["ticket"])).iou == 1.0
    assert masks["transferred"].overlap(masks["ticket"]).iou < 1.0
    assert len({level.metrics["loss"] for level in found.levels}) == 5
    assert found.setup["transferred_from"] == "task-0"
    assert [curve.label for curve in tickets_study(found).charts[0].curves] == [
        "ticket: the largest |δ|, rewound",
        "as many in each tensor, at random",
        "the ticket's, from shuffled values",
        "another task's ticket",
    ]


def test_reinitialised_elements_begin_with_each_others_values(base: str, tmp_path: Path) -> None:
    """Nothing is trained: what a package changes is the order."""
    still = replace(
        task(1), trainer=lambda model, out, callbacks: standing(task(1).trainer(model, out, callbacks))
    )
    search = TicketSearch(base, still, out=tmp_path / "out", levels=1, beside=("reinitialised",))
    package = search.run().levels[-1].package
    start, state = load_model(base).state_dict(), load_model(base)
    with applied(state, package):
        moved = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    name = "bert.embeddings.word_embeddings.weight"
    kept = torch.from_numpy(Masks.of_package(package)[name])
    assert not torch.equal(moved[name], start[name])
    assert torch.equal(moved[name][~kept], start[name][~kept])
    assert torch.equal(moved[name][kept].sort().values, start[name][kept].sort().values)


def standing(trainer: Trainer) -> Trainer:
    trainer.args.learning_rate = 0.0
    return trainer


def test_a_search_that_was_killed_goes_on(base: str, whole: Tickets, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        TicketSearch(base, task(1, Stopped(5)), out=tmp_path / "killed", levels=1).run()
    trained.clear()
    again = TicketSearch(base, task(1), out=tmp_path / "killed", levels=1).run()
    assert trained == ["task 1"] * 3
    without_curves = tuple(replace(level, curve={}) for level in whole.levels)
    assert again.as_json() == replace(whole, levels=without_curves).as_json()
    prints = []
    for found in (whole, again):
        model = load_model(base)
        with applied(model, found.levels[1].package):
            prints.append(weights_print(model))
    assert prints[0] == prints[1]
    trained.clear()
    TicketSearch(base, task(1), out=tmp_path / "killed", levels=1).run()
    assert trained == []


def test_another_search_in_the_same_folder_is_refused(base: str, tmp_path: Path) -> None:
    TicketSearch(base, task(1), out=tmp_path / "out", levels=1, beside=()).run()
    with pytest.raises(CheckpointError) as caught:
        TicketSearch(base, task(1), out=tmp_path / "out", levels=1, share=0.7).run()
    refusal(
        caught.value,
        CheckpointError,
        "search.json: expected measurements with share 0.7, found some with share 0.5; choose another folder",
    )
    trained.clear()
    assert (
        len(TicketSearch(base, task(1), out=tmp_path / "out", levels=2, beside=("random",)).run().levels) == 5
    )
    assert trained == ["task 1"] * 3, "one level more, and two beside them"


def test_the_report_draws_the_classic_figure(whole: Tickets, tmp_path: Path) -> None:
    study = tickets_study(whole)
    assert [curve.label for curve in study.charts[0].curves] == [
        "ticket: the largest |δ|, rewound",
        "as many at random",
    ]
    assert [len(curve.x) for curve in study.charts[0].curves] == [2, 2]
    assert [row[0] for row in study.tables[0].rows] == [
        "all",
        "ticket: the largest |δ|, rewound",
        "as many at random",
    ]
    assert write_report(whole, tmp_path / "report").name == "tickets.html"
    assert (tmp_path / "report" / "tickets-training.png").exists()


def test_searches_from_several_seeds_make_bands(base: str, whole: Tickets, tmp_path: Path) -> None:
    one = whole
    two = TicketSearch(base, task(2), out=tmp_path / "two", levels=1, every=2, seed=1).run()
    with pytest.raises(ConfigError) as caught:
        tickets_study([one, two])
    refusal(
        caught.value,
        ConfigError,
        "searches: expected searches that differ in their seeds only: task task-1, found task-2",
    )
    two = replace(two, setup={**two.setup, "task": "task-1"})
    study = tickets_study([one, two])
    assert study.setup["seeds"] == [0, 1]
    assert [len(search["levels"]) for search in study.data["searches"]] == [3, 3]
    quality, soon = study.charts[0], study.charts[1]
    assert isinstance(quality, Chart)
    assert isinstance(soon, Chart)
    values = [found.levels[1].metrics[found.metric] for found in (one, two)]
    assert quality.curves[0].y[1] == pytest.approx(sum(values) / 2)
    assert quality.curves[0].half[1] == pytest.approx(12.706 * abs(values[0] - values[1]) / 2, rel=1e-3), (
        "Student's t of two values"
    )
    assert all(2 <= step <= 6 for curve in soon.curves for step in curve.y)
    assert (write_report([one, two], tmp_path / "report").parent / "tickets-step.png").exists()
    with pytest.raises(ConfigError, match="expected at least one, found none"):
        tickets_study([])


def test_what_means_nothing_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        TicketSearch(base, task(1), out=tmp_path, share=1.0)
    refusal(
        caught.value,
        ConfigError,
        "share: expected a number in (0, 1), found 1.0",
    )
    for options, text in (
        (dict(levels=1.5), "levels: expected at least 1, found 1.5"),
        (dict(rewind=-1), "rewind: expected at least 0, found -1"),
        (dict(every=0), "every: expected at least 1, found 0"),
        (dict(seed=-1), "seed: expected an integer in [0, 2**64), found -1"),
        (dict(scope="modell"), "scope: expected one of tensor, model, found 'modell'"),
        (dict(transfer="other"), "transfer: expected another TicketSearch, found 'other'"),
    ):
        with pytest.raises(ConfigError) as caught:
            TicketSearch(base, task(1), out=tmp_path, **options)
        refusal(caught.value, ConfigError, text)
    with pytest.raises(ConfigError) as caught:
        TicketSearch(base, task(1), out=tmp_path, levels=20)
    refusal(
        caught.value,
        ConfigError,
        "levels: expected a density of at least 2⁻¹⁶ in the end, found 20 of share 0.5",
    )
    with pytest.raises(ConfigError) as caught:
        TicketSearch(base, task(1), out=tmp_path, beside=("transferred",))
    refusal(
        caught.value,
        ConfigError,
        "beside: expected some of random, shuffled, reinitialised, found ['transferred']",
    )

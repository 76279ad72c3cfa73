"""What configurations of base and models say of how weights are used, and what a result's says then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_models import save_model

from dare_train import merge
from dare_train.merging.merge_report import MergeReport

PLAIN = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def merged(place: Path, base: dict[str, Any], *models: dict[str, Any]) -> tuple[MergeReport, dict[str, Any]]:
    """A merge of models with these settings, its report and its configuration."""
    labels = base.get("id2label")
    rows = len(labels) if isinstance(labels, dict) else 4
    named = {"base": base, **dict(zip("abc", models, strict=False))}
    folders = [
        save_model({"w": torch.full((rows,), float(number))}, place / name, {**PLAIN, **config})
        for number, (name, config) in enumerate(named.items())
    ]
    report = merge(folders[0], folders[1:], place / "out")
    return report, json.loads((place / "out/config.json").read_text())


@pytest.mark.parametrize(
    ("base", "model", "expected"),
    [
        ({"rope_theta": 10000.0}, {"rope_theta": 1e6}, {"rope_theta": 1e6}),
        ({}, {"rope_theta": 1e6}, {"rope_theta": 1e6}),
        ({"rope_theta": 1e6}, {}, {"rope_theta": None}),
        ({}, {"rope_scaling": LINEAR}, {"rope_scaling": LINEAR}),
        (
            {"rope_theta": 5.0},
            {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}},
            {"rope_theta": None, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}},
        ),
        ({"num_attention_heads": 2}, {"num_attention_heads": 4}, {"num_attention_heads": 4}),
        ({"sliding_window": 8}, {"sliding_window": 16}, {"sliding_window": 16}),
        ({"id2label": {"0": "no"}}, {"id2label": {"0": "yes"}}, {"id2label": {"0": "yes"}}),
    ],
    ids=str,
)
def test_what_all_models_say_is_said_and_told(
    base: dict[str, Any], model: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    report, config = merged(tmp_path, base, model, model)
    assert {name: config.get(name) for name in expected} == expected
    (note,) = report.notes
    assert note.startswith("config.json: ")
    assert note.endswith(f"in {tmp_path / 'a'}, as in the result")


@pytest.mark.parametrize(
    ("base", "model"),
    [
        ({"rope_theta": 10000.0}, {}),
        ({}, {"rope_theta": 10000.0}),
        ({"rope_theta": 7.0}, {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_parameters": {"rope_theta": 10000.0, **LINEAR}},
        ),
        ({"rope_scaling": None}, {}),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, {"rope_theta": 5.0}),
        ({"sliding_window": 8}, {}),
        ({"id2label": {"0": "LABEL_0"}}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}),
        ({"use_cache": True, "transformers_version": "4"}, {"use_cache": False, "transformers_version": "5"}),
    ],
    ids=str,
)
def test_what_means_the_same_is_left(base: dict[str, Any], model: dict[str, Any], tmp_path: Path) -> None:
    report, config = merged(tmp_path, base, model)
    assert report.notes == ()
    assert config == {**PLAIN, **base}


def test_labels_in_another_order_are_told(tmp_path: Path) -> None:
    labels = [{"id2label": dict(zip("01", order, strict=True))} for order in (("no", "yes"), ("yes", "no"))]
    report, config = merged(tmp_path, labels[0], *labels)
    assert config["id2label"] == labels[0]["id2label"]
    (note,) = report.notes
    assert note == (
        "config.json: id2label is {'0': 'no', '1': 'yes'} in the base, and {'0': 'yes', '1': 'no'} in "
        f"{tmp_path / 'b'}: check what the result says"
    )


def test_labels_of_a_head_that_is_not_merged_are_the_bases(tmp_path: Path) -> None:
    own, other = ({"id2label": {"0": names[0], "1": names[1], "2": "z"}} for names in ("ab", "ba"))
    folders = [
        save_model(
            {"w": torch.ones(4) * n, "score": torch.ones(3) * n}, tmp_path / str(n), {**PLAIN, **config}
        )
        for n, config in enumerate((own, other))
    ]
    report = merge(folders[0], folders[1:], tmp_path / "out", exclude=["score"])
    assert report.notes == ()
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == own["id2label"]


def test_names_of_labels_that_the_base_has_not_are_the_models(tmp_path: Path) -> None:
    named = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    report, config = merged(tmp_path, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, named, named)
    assert config == {**PLAIN, **named}
    assert report.notes == ()


@pytest.mark.parametrize("strange", [["x"], {"a": {"b": 1}}, "x", 7, {"type": ["x"]}], ids=str)
def test_strange_settings_are_compared_as_they_are(strange: Any, tmp_path: Path) -> None:
    merged(
        tmp_path, {"rope_theta": strange, "id2label": strange}, {"rope_scaling": strange, "head_dim": strange}
    )

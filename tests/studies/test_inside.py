"""The look inside: what it measures is what the definitions say, and the model comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import dare_train
from studying import Words, tuned_model
from tiny import refusal
from training import examples, save_base, weights_print
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from dare_train import applied, extract, inside, write_report
from dare_train.errors import ConfigError
from dare_train.reports.inside_report import inside_study

KEY = "bert.encoder.layer.0.attention.self.key.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def batches() -> list[dict[str, torch.Tensor]]:
    rows = examples(16)
    ids = torch.tensor([row["input_ids"] for row in rows])
    mask = torch.ones_like(ids)
    mask[:8, 5:] = 0
    return [{"input_ids": ids[half], "attention_mask": mask[half]} for half in (slice(0, 8), slice(8, 16))]


OPTIONS: dict[str, Any] = dict(p=[0.5, 0.9, 0.95], seeds=3, masks=16)


def test_embeddings_are_those_of_the_model_with_a_package(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base)
    before = weights_print(model)
    found = inside(model, base, batches(), **OPTIONS)
    assert weights_print(model) == before == found.tuned
    whole = tuned_model(base, seed=0, by=0.0)
    start = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("classifier")}
    for variant, rescale in (("dare", "paper"), ("drop_only", "none")):
        package = extract(start, model, tmp_path / variant, p=0.9, seed=1, rescale=rescale, values="exact")
        with torch.no_grad():
            dense = [model(**batch, output_hidden_states=True).hidden_states for batch in batches()]
            for own, other in zip(whole.parameters(), model.parameters(), strict=True):
                own.copy_(other) if own.shape[0] == 3 else None
            with applied(whole, package):
                dropped = [whole(**batch, output_hidden_states=True).hidden_states for batch in batches()]
        for layer in range(3):
            pairs = [
                torch.cosine_similarity(
                    one[layer][b["attention_mask"].bool()], two[layer][b["attention_mask"].bool()], dim=-1
                )
                for one, two, b in zip(dense, dropped, batches(), strict=True)
            ]
            assert found.similarity[variant][0.9][1][layer] == pytest.approx(
                float(torch.cat(pairs).mean()), abs=1e-5
            )


def test_layer_errors_are_as_calculated(base: Path) -> None:
    found = inside(tuned_model(base), base, batches(), **OPTIONS)
    assert len(found.layers) == 2 * 6 + 1
    ratios = [layer.ratio(p) for layer in found.layers for p in (0.5, 0.9)]
    assert 0.8 < np.median(ratios) < 1.25
    assert all(0.5 < ratio < 2 for ratio in ratios)
    layer = next(one for one in found.layers if one.name == KEY)
    model = tuned_model(base)
    delta = (model.state_dict()[KEY] - tuned_model(base, by=0.0).state_dict()[KEY]).double()
    seen: list[torch.Tensor] = []
    module = model.get_submodule(KEY.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    hook.remove()
    rows = torch.cat(
        [part[batch["attention_mask"].bool()] for part, batch in zip(seen, batches(), strict=True)]
    ).double()
    norm = float((rows @ module.weight.detach().double().T).square().sum())
    expected = (9 * float((rows.square() @ delta.square().T).sum()) / norm) ** 0.5
    assert layer.calculated[0.9] == pytest.approx(expected, rel=1e-4)


def test_the_mean_over_masks_approaches_the_layer_with_rescale_only(base: Path) -> None:
    found = inside(tuned_model(base), base, batches(), **{**OPTIONS, "masks": 64})
    assert found.mean_p == 0.9
    assert [*found.mean_error["dare"]] == [1, 2, 4, 8, 16, 32, 64]
    for n, expected in found.expected_mean_error.items():
        assert found.mean_error["dare"][n] == pytest.approx(expected, rel=0.2)
    assert found.expected_mean_error[16] == pytest.approx(found.expected_mean_error[1] / 4)
    floor = found.mean_error["drop_only"]
    assert floor[64] == pytest.approx(floor[1], rel=0.1)
    assert floor[64] > 2 * found.mean_error["dare"][64]


def test_layers_that_files_hold_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's: masks go by the order in files, inputs by the layer."""
    set_seed(5)
    config = GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model, generator = (
        GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval(),
        torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    found = inside(model, tmp_path / "base", batches(), p=[0.9], seeds=4, masks=2)
    assert found.layers[0].name.split(".")[-3:] == ["attn", "c_attn", "weight"]
    assert all(0.5 < layer.ratio(0.9) < 2 for layer in found.layers)


def test_the_report_says_what_was_found(base: Path, tmp_path: Path) -> None:
    found = inside(tuned_model(base), base, batches(), **OPTIONS)
    study = inside_study(found)
    drawn = ("similarity", "similarity-by-layer", "errors", "bias", "magnitudes", "magnitudes-by-layer")
    assert [chart.name for chart in study.charts] == [f"inside-{name}" for name in drawn]
    assert study.charts[2].ticks[::6] == ("0.attention.self.query", "1.attention.self.query", "pooler.dense")
    assert study.findings[0].startswith("At p = 0.9 the last embeddings have a cosine similarity")
    assert "times p/(1 - p)·Σδ²x² in the median of 13 layers" in study.findings[1]
    again = inside(tuned_model(base), base, batches(), **OPTIONS)
    write_report(found, tmp_path / "one")
    write_report(again, tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 3 + 6
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(p=[0.0]), "p: expected a drop rate above 0, found [0.0]"),
        (dict(masks=0), "masks: expected 1 to 10,000, found 0"),
        (dict(masks=10**30), "masks: expected 1 to 10,000, found 1000000000"),
        (dict(seeds=10_001), "seeds: expected 1 to 10,000, found 10001"),
        (dict(first_seed=-1), "first_seed: expected an integer in [0, 2**64), found -1"),
        (dict(tokens=0), "tokens: expected at least 1, found 0"),
        (dict(batches=[]), "batches: expected at least one, found none"),
        (dict(batches=[{"labels": 3}]), "batches: expected tensors [batch, seq], found ['labels']"),
    ],
)
def test_what_means_nothing_is_refused(base: Path, options: dict[str, Any], text: str) -> None:
    given = {"batches": batches(), **options}
    with pytest.raises(ConfigError) as caught:
        inside(tuned_model(base), base, **given)
    refusal(caught.value, ConfigError, text)


def test_the_command(base: Path, tmp_path: Path) -> None:
    tuned_model(base).save_pretrained(tmp_path / "tuned")
    (tmp_path / "texts.txt").write_text("w1 w2 w3\nw4 w5\nw6 w7 w8 w9\n")
    words = [
        "base",
        "tuned",
        "--data",
        "texts.txt",
        "--p",
        "0.9",
        "--seeds",
        "2",
        "--masks",
        "2",
        "--out",
        "out",
    ]
    done = dare_train("inside", *words, cwd=tmp_path)
    expected = "dare-train: tuned: expected a tokenizer beside the model, found none that loads; "
    assert (done.returncode, done.stderr.splitlines()[-1].startswith(expected)) == (1, True), done.stderr
    Words.save(tmp_path / "tuned")
    done = dare_train("inside", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "# What happens inside tuned\n" in done.stdout
    assert (tmp_path / "out/inside.html").exists()

"""Options of mergekit's in a pasted command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Done, dare_train
from quantised_models import LLAMA, save_model
from safetensors.torch import load_file

from dare_train.cli.mergekit_flags import translated
from dare_train.errors import ConfigError

NAME = "model.layers.0.mlp.up_proj.weight"

PASTED = "--copy-tokenizer --allow-crimes --out-shard-size 1B --lazy-unpickle --lora-merge-cache ./c --quiet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a")):
        state = {NAME: torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))}
        save_model(state, tmp_path / name, LLAMA)
    recipe = {"merge_method": "dare_linear", "base_model": "base", "models": [{"model": "a"}]}
    (tmp_path / "c.yml").write_text(json.dumps({**recipe, "parameters": {"density": 0.5}}))
    (tmp_path / "seeded.yml").write_text(json.dumps({**recipe, "parameters": {"density": 0.5}, "seed": 3}))
    return tmp_path


def run(folder: Path, words: str) -> Done:
    return dare_train("merge", *words.split(), cwd=folder)


def test_a_pasted_command_runs_and_tells(folder: Path) -> None:
    done = run(folder, f"c.yml --out out {PASTED}")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if " is ignored: " in line]
    assert told == [
        "dare-train: --copy-tokenizer is ignored: the tokenizer comes along anyway",
        "dare-train: --allow-crimes is ignored: models that do not fit together are refused, "
        "with it and without",
        "dare-train: --out-shard-size is ignored: the result's files are as large as the base's",
        "dare-train: --lazy-unpickle is ignored: weights are read run by run, of safetensors alone",
        "dare-train: --lora-merge-cache is ignored: adapters are merged while they are read",
    ]
    assert len(done.stdout.splitlines()) == 2  # --quiet: no table


def test_a_random_seed_is_the_seed(folder: Path) -> None:
    for out, words in (("three", "--random-seed 3"), ("also", "--seed 3"), ("zero", "")):
        assert run(folder, f"c.yml --out {out} {words}").returncode == 0
    assert run(folder, "seeded.yml --out said --random-seed=3").returncode == 0
    three, also, zero, said = (
        load_file(folder / out / "model.safetensors")[NAME] for out in ("three", "also", "zero", "said")
    )
    assert torch.equal(three, also)
    assert torch.equal(three, said)
    assert not torch.equal(three, zero)
    done = run(folder, "seeded.yml --out other --random-seed 4")
    assert done.returncode == 2
    assert "seed: expected one: 4 is given, found 3; leave --seed out" in done.stderr


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("c.yml --cuda", "c.yml --device cuda"),
        ("c.yml --gpu-rich", "c.yml --device cuda"),
        ("c.yml --random-seed=5", "c.yml --seed 5"),
        ("c.yml -I parts --out-path out", "c.yml --intermediate-dir parts --out out"),
        ("c.yml --out-shard-size=5B --out x", "c.yml --out x"),
        ("c.yml -j 8 -v --no-allow-crimes --write-threads 2 --no-cuda", "c.yml"),
        ("c.yml --lora-merge-dtype", "c.yml"),
        ("a b --method ties --set lambda=1", "a b --method ties --set lambda=1"),
        ("a -- --cuda", "a -- --cuda"),
    ],
)
def test_what_is_meant_in_our_words(words: str, meant: str) -> None:
    assert translated(words.split()).words == meant.split()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--unsafe-truncate-embeddings",
            "expected rows told by their tokens, found that option",
        ),
        (
            "--no-copy-tokenizer",
            "expected a result with its tokenizer, found that option; leave",
        ),
        ("--no-write-model-card", "expected a result with its card"),
        ("--no-safe-serialization", "expected safetensors"),
        ("--transformers-cache=x", "expected HF_HUB_CACHE=FOLDER before the command"),
        ("--lazy", "expected results made anew"),
    ],
)
def test_what_would_change_the_result_is_refused(flag: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag.partition('=')[0]}: {message}"):
        translated(["c.yml", flag])


def test_what_nobody_knows_is_no_option(folder: Path) -> None:
    done = run(folder, "c.yml --out out --alow-crimes")
    assert done.returncode == 2
    assert "--alow-crimes" in done.stderr
    done = run(folder, "c.yml --out out --no-copy-tokenizer")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("dare-train: --no-copy-tokenizer: expected a result with its tokenizer")

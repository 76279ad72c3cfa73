"""What a merge leaves on disk: files that load, that run again, and that are there completely or not at
all.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merging import config_of, edit_config, files_of, llama, save, state_of, tuned, write_state
from rich.console import Console
from tiny import refusal
from transformers import AutoModelForCausalLM, AutoTokenizer

from dare_train import apply, extract, merge
from dare_train.errors import ConfigError, DareError, OutputExists, StorageError
from dare_train.merging.config import mergekit
from dare_train.merging.config.task import MergeTask, task_of
from dare_train.merging.merge import run
from dare_train.weights.files.checkpoint import Checkpoint
from dare_train.weights.fingerprint import Fingerprint, model_fingerprint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
RECORD = ["dare_merge.json", "dare_merge.yml"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base with a tokenizer, and two models; the second added a token."""
    place, base = tmp_path_factory.mktemp("models"), llama()
    two = save(tuned(base, 2, rows=6), place / "two", "x")
    return save(base, place / "base", tokenizer=True), save(tuned(base, 1), place / "one"), two


def print_of(folder: Path) -> str:
    """The fingerprint of what lies on disk, as docs/format.md has it."""
    weights = Checkpoint.open(folder)
    return model_fingerprint(
        (name, info.dtype.code, info.shape, Fingerprint.of(weights.read(name, 0, info.numel)))
        for name, info in sorted(weights.tensors.items())
    )


def same_files(one: Path, other: Path, *besides: str) -> bool:
    ours, theirs = files_of(one), files_of(other)
    assert ours.keys() == theirs.keys()
    return sorted(name for name in ours if ours[name] != theirs[name]) == sorted(besides)


# Weights


def test_a_sharded_result_is_the_same_model(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders[0])
    save(base, tmp_path / "base", tokenizer=True, max_shard_size="2KB")
    merge(folders[0], folders[1:], tmp_path / "whole")
    merge(tmp_path / "base", folders[1:], tmp_path / "cut")
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    assert (
        index["weight_map"]
        == json.loads((tmp_path / "base/model.safetensors.index.json").read_text())["weight_map"]
    )
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in cut.values())
    assert print_of(tmp_path / "whole") == print_of(tmp_path / "cut")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in cut.items())
    assert not (tmp_path / "whole/model.safetensors.index.json").exists()


def test_what_the_base_lacks_goes_into_the_last_file(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders[0])
    save(base.model, tmp_path / "bare", max_shard_size="2KB")
    merge(tmp_path / "bare", [folders[1]], tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    own = json.loads((tmp_path / "bare/model.safetensors.index.json").read_text())["weight_map"]
    assert index == {**{f"model.{name}": file for name, file in own.items()}, HEAD: max(own.values())}
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight, state_of(folders[1])[HEAD]
    )


# The record


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dare": dict(method="dare_ties", p=[0.5, 0.25], weights=[0.7, 0.4], seed=3, lambda_=0.5, rescale="norm"),
    "choices": dict(exclude=["*.mlp.*"], take={"lm_head*": 0, "*embed*": 0, "*norm*": 1}, tokenizer="base"),
    "dtype": dict(out_dtype="BF16", cast_base=True, rename={"nothing": "something"}, tokenizer="union"),
    "trimmed": dict(method="ties", density=[0.2, 0.5]),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_recipe_runs_again_to_the_same_bytes(
    folders: tuple[Path, Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    report = merge(folders[0], folders[1:], tmp_path / "out", **options)
    recipe, notes = mergekit.read(tmp_path / "out/dare_merge.yml")
    assert notes == []
    assert recipe.digest() == report.recipe.digest()
    again = run(MergeTask.of(recipe), tmp_path / "again")
    assert again.fingerprint == report.fingerprint == print_of(tmp_path / "out")
    assert same_files(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_every_file_is_the_same_in_another_process(
    folders: tuple[Path, Path, Path], tmp_path: Path, hash_seed: str
) -> None:
    """Whatever order its sets and dictionaries of texts have."""
    options = dict(method="dare_ties", p=0.5)
    merge(folders[0], folders[1:], tmp_path / "out", **options)
    names = [str(folder) for folder in folders]
    code = (
        f"from dare_train import merge; merge({names[0]!r}, {names[1:]!r}, "
        f"{str(tmp_path / 'again')!r}, **{options!r})"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert same_files(tmp_path / "out", tmp_path / "again")


def test_the_record_says_everything(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    report = merge(folders[0], folders[1:], tmp_path / "out", take={HEAD: 1}, exclude="*.mlp.*")
    record = json.loads((tmp_path / "out/dare_merge.json").read_text())
    assert record["recipe"] == (tmp_path / "out/dare_merge.yml").read_text()
    assert record["models"] == [str(folder) for folder in folders[1:]] == list(report.labels)
    assert (record["notes"], record["fingerprint"]) == ([], print_of(tmp_path / "out"))
    rows = {row["name"]: row for row in record["tensors"]}
    assert rows.keys() == state_of(tmp_path / "out").keys()
    gate, norm = "model.layers.0.mlp.gate_proj.weight", "model.norm.weight"
    assert rows[gate] == dict(name=gate, dtype="F32", shape=[12, 8], how="copied", note="excluded")
    assert rows[norm] == dict(name=norm, dtype="F32", shape=[8], how="merged", models=[0, 1])
    assert rows[HEAD] == dict(name=HEAD, dtype="F32", shape=[6, 8], how="carried", models=[1], note="taken")
    assert rows[EMBEDDING] == dict(
        name=EMBEDDING, dtype="F32", shape=[6, 8], how="merged", models=[0, 1], added_rows=1
    )
    assert report.counts() == {"merged": 14, "copied": 6, "carried": 1}


def test_a_table_shows_every_tensor_if_asked_and_names_as_they_are(tmp_path: Path) -> None:
    """Square brackets are markup to the library that draws it."""
    base = {f"layer[{number}][/b].w": torch.full((3,), float(number)) for number in range(3)}
    models = [
        write_state({name: tensor + 1 for name, tensor in base.items()}, tmp_path / name)
        for name in ("one[bold]", "two[")
    ]
    task = task_of(write_state(base, tmp_path / "base"), models, exclude="layer[[]1*", take={"layer[[]2*": 0})
    report = run(task, tmp_path / "out", notes=["a [red]note"])
    for every, texts in ((False, ["copied", "taken"]), (True, list(base))):
        console = Console(file=StringIO(), width=200)
        console.print(report.table(every_tensor=every))
        drawn = console.file.getvalue()  # type: ignore[attr-defined]
        assert "task_arithmetic: 1 merged, 1 copied, 1 carried tensors" in drawn
        assert all(text in drawn for text in (*texts, "one[bold]", "excluded", "a [red]note"))


def test_the_card_names_what_is_on_the_hub(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, folder in (("base", folders[0]), ("one", folders[1])):
        cached = tmp_path / f"hub/models--someone--{name}"
        (cached / "snapshots").mkdir(parents=True)
        (cached / "snapshots/abc").symlink_to(folder)
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    merge("someone/base", ["someone/one", folders[2]], tmp_path / "out", method="ties")
    card = (tmp_path / "out/README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers", "tags": ["merge", "dare_train"],
        "base_model": ["someone/base", "someone/one"], "base_model_relation": "merge",
    }  # fmt: skip
    assert "# A merge by ties" in text
    assert "from 2 models on `base`" in text
    assert "dare-train merge dare_merge.yml --out model" in text
    merge(*[folders[0], folders[1:], tmp_path / "local"])
    local = yaml.safe_load((tmp_path / "local/README.md").read_text().split("---\n")[1])
    assert local == {"library_name": "transformers", "tags": ["merge", "dare_train"]}


# Companions


def test_files_of_the_base_come_along_and_stale_ones_do_not(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    merge(folders[0], [folders[1]], tmp_path / "base", method="ties")
    for name, text in {
        "LICENSE": "free",
        "chat_template.jinja": "{{ x }}",
        "trainer_state.json": "{}",
        "training.log": "",
    }.items():
        (tmp_path / "base" / name).write_text(text)
    stale = files_of(tmp_path / "base")
    merge(tmp_path / "base", [folders[1]], tmp_path / "out", weights=[0.5])
    fresh = files_of(tmp_path / "out")
    assert stale.keys() - fresh.keys() == {"trainer_state.json", "training.log"}
    assert fresh.keys() <= stale.keys()
    assert {name for name in fresh if fresh[name] != stale[name]} == {
        "model.safetensors",
        "README.md",
        *RECORD,
    }
    assert "base_model: " + str(tmp_path / "base") in fresh["dare_merge.yml"].decode()
    merge(tmp_path / "base", [folders[1]], tmp_path / "package", package=True, weights=[0.5])
    assert (
        json.loads((tmp_path / "package/dare_merge.json").read_text())["recipe"]
        == json.loads(fresh["dare_merge.json"])["recipe"]
    )


def test_a_model_in_memory_gets_its_files_from_the_first_that_has_any(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders[0])
    merge(base, [tuned(base, 3), folders[1]], tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(folders[1])
    assert same_loaded(tmp_path / "out")
    merge(base, [tuned(base, 3)], tmp_path / "nothing")
    assert sorted(files_of(tmp_path / "nothing")) == ["README.md", *RECORD, "model.safetensors"]


def same_loaded(folder: Path) -> bool:
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.equal(loaded[name], tensor) for name, tensor in state_of(folder).items())


STRAY = {
    "modeling_evil.py": "raise SystemExit",
    "chat_template.jinja": "{{ evil }}",
    "generation_config.json": '{"evil": 1}',
    "special_tokens_map.json": '{"eos_token": "evil"}',
    "LICENSE": "evil",
    "dare_merge.yml": "evil",
}


def test_of_a_package_only_the_files_that_it_lists_count(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Others may lie in its folder, and nobody compares their bytes: when it brings the head, when it
    brings tokens, and when it says whether its head is tied.
    """
    bare = save(AutoModelForCausalLM.from_pretrained(folders[0]).model, tmp_path / "bare", tokenizer=True)
    edit_config(bare, tie_word_embeddings=None)
    for base, model in ((bare, folders[1]), (folders[0], folders[2]), (folders[0], folders[1])):
        place = tmp_path / f"{model.name} on {base.name}"
        package = extract(base, model, place / "package", p=0).path
        listed = files_of(package)
        merge(base, [package], place / "clean")
        for name, text in {**STRAY, "tokenizer.json": "evil", "config.json": "evil"}.items():
            if name not in listed:
                (package / name).write_text(text)
        assert len(files_of(package)) > len(listed) + 5
        merge(base, [package], place / "out")
        assert same_files(place / "out", place / "clean")
        assert not any(b"evil" in content for content in files_of(place / "out").values())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configuration_says_the_results_dtype(
    folders: tuple[Path, Path, Path], tmp_path: Path, key: str
) -> None:
    base = write_state(state_of(folders[0]), tmp_path / "base", config_of(folders[0]))
    edit_config(base, **{"dtype": None, key: "float32"})
    merge(base, [folders[1]], tmp_path / "out", out_dtype="BF16")
    assert config_of(tmp_path / "out") == {**config_of(base), key: "bfloat16"}
    assert {tensor.dtype for tensor in state_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    expected = state_of(base)[EMBEDDING].double() + 0.5 * (
        state_of(folders[1])[EMBEDDING].double() - state_of(base)[EMBEDDING].double()
    )
    merge(base, [folders[1]], tmp_path / "half", out_dtype="F16", weights=[0.5])
    torch.testing.assert_close(state_of(tmp_path / "half")[EMBEDDING], expected.half(), rtol=2**-11, atol=0)


def test_parts_of_a_configuration_are_told_too(tmp_path: Path) -> None:
    """Models with several parts say what their language model is under a key of its own."""
    text = {"vocab_size": 4, "tie_word_embeddings": True, "dtype": "float32", "hidden_size": 2}
    config = {
        "text_config": text,
        "vision_config": {"dtype": "float32", "vocab_size": 9},
        "dtype": "float32",
        "tie_word_embeddings": True,
    }
    base = {"language.embed_tokens.weight": torch.randn(4, 2, generator=torch.Generator().manual_seed(1))}
    grown = {"language.embed_tokens.weight": torch.randn(5, 2), "lm_head.weight": torch.randn(5, 2)}
    folder = write_state(base, tmp_path / "base", config)
    merge(folder, [grown], tmp_path / "out", out_dtype="BF16")
    found = config_of(tmp_path / "out")
    assert found == {
        "text_config": {"vocab_size": 5, "tie_word_embeddings": False, "dtype": "bfloat16", "hidden_size": 2},
        "vision_config": {"dtype": "bfloat16", "vocab_size": 9}, "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip


# A place that is taken, or not to be taken


def test_what_is_there_is_kept_unless_told_otherwise(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    merge(folders[0], [folders[1]], out)
    (out / "mine").write_text("kept")
    before = files_of(out)
    for package in (False, True):
        with pytest.raises(DareError) as caught:
            merge(folders[0], [folders[1]], out, weights=[0.5], package=package)
        refusal(
            caught.value,
            OutputExists,
            str(out),
            "expected a path that does not exist yet",
            "overwrite=True (--overwrite)",
        )
    assert files_of(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    merge(folders[0], [folders[1]], out, weights=[0.5], overwrite=True)
    assert files_of(out).keys() == before.keys() - {"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["base", "model", "package"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_read_is_never_written_over(tmp_path: Path, place: str, packed: bool) -> None:
    base, model = {"w": torch.ones(9)}, {"w": torch.zeros(9)}
    given = {"base": write_state(base, tmp_path / "base"), "model": write_state(model, tmp_path / "model")}
    given["package"] = extract(given["base"], given["model"], tmp_path / "package", p=0).path
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match="out: expected another folder than those that are read"):
        merge(given["base"], [given["model"], given["package"]], given[place], overwrite=True, package=packed)
    assert files_of(tmp_path) == before


# A disk that is full

_LIMITED = """
import json, resource, sys
from pathlib import Path
from dare_train import merge

limit, package, base, *models, place = sys.argv[1:]
# Writes beyond it fail, as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    merge(base, models, Path(place) / "out", package=package == "True")
    outcome = "done"
except BaseException as error:
    outcome = f"{type(error).__name__}: {error}"
print(json.dumps([outcome, sorted(path.name for path in Path(place).iterdir())]))
"""


@pytest.mark.parametrize("package", [False, True])
@pytest.mark.parametrize("full", ["at once", "near the end", "never"])
def test_a_disk_that_fills_up_is_named_and_nothing_is_left(tmp_path: Path, package: bool, full: str) -> None:
    base = {f"{number}.w": torch.full((64,), float(number)) for number in range(40)}
    models = [
        write_state({name: tensor + by for name, tensor in base.items()}, tmp_path / f"{by}") for by in (1, 2)
    ]
    folder = write_state(base, tmp_path / "base")
    merge(folder, models, tmp_path / "whole", package=package)
    largest = max(map(len, files_of(tmp_path / "whole").values()))
    limit = {"at once": 10, "near the end": largest - 1, "never": 1 << 20}[full]
    (tmp_path / "place").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [
        sys.executable,
        "-c",
        _LIMITED,
        *map(str, (limit, package, folder, *models, tmp_path / "place")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said, left = json.loads(done.stdout)
    if full == "never":
        assert (said, left) == ("done", ["out"])
        assert same_files(tmp_path / "place/out", tmp_path / "whole")
    else:
        assert said.startswith("StorageError: "), said
        assert "found File too large" in said
        assert "nothing was left behind; free some space and run again" in said
        assert left == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", [0, 1, 9])
def test_a_write_that_fails_leaves_nothing(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int
) -> None:
    place, honest, calls = tmp_path / "place", os.pwrite, []
    place.mkdir()

    def failing(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > call:
            raise OSError(code, os.strerror(code))
        return honest(*arguments)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(StorageError) as caught:
        merge(folders[0], folders[1:], place / "new" / "out")
    assert f"{place / 'new' / 'out'}: found {os.strerror(code)}" in str(caught.value)
    assert len(calls) > call
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["config.json", "dare_merge.json", "dare_merge.yml", "README.md", "tokenizer.json", "merge-journal.0"],
)
def test_a_small_file_that_fails_leaves_nothing(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place, failed = tmp_path / "place", []
    (place / "out").mkdir(parents=True)
    (place / "out/mine").write_text("kept")
    honest = Path.open

    def failing(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.name == name and place in path.parents and mode != "r" and "r" not in mode:
            failed.append(path)
            raise OSError(errno.ENOSPC, "full")
        return honest(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(StorageError, match="No space left"):
        merge(folders[0], folders[1:], place / "out", overwrite=True)
    assert failed
    assert files_of(place) == {"out/mine": b"kept"}


# As a package

PACKED: dict[str, dict[str, Any]] = {
    "tokens": {},
    "dare": dict(method="dare_ties", p=0.1),
    "taken": dict(take={HEAD: 1, "*norm*": 0}),
    "excluded": dict(exclude=["*.mlp.*"], tokenizer="base"),
}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_a_package_gives_the_merges_bits(
    folders: tuple[Path, Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    report = merge(folders[0], folders[1:], tmp_path / "out", **options)
    packed = merge(folders[0], folders[1:], tmp_path / "package", package=True, **options)
    assert packed.fingerprint == report.fingerprint
    assert packed.counts() == report.counts()
    assert apply(folders[0], tmp_path / "package", tmp_path / "applied") == report.fingerprint
    ours, theirs = files_of(tmp_path / "applied"), files_of(tmp_path / "out")
    assert theirs.keys() - ours.keys() == {"README.md", "dare_merge.yml"}
    assert [name for name in ours if ours[name] != theirs[name]] == ["dare_merge.json"]
    record = json.loads(ours["dare_merge.json"])
    assert (record["recipe"], len(record["tensors"])) == (
        theirs["dare_merge.yml"].decode(),
        len(state_of(tmp_path / "out")),
    )
    assert same_loaded(tmp_path / "applied")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "applied").get_vocab()
    assert tokens == AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_a_package_of_two_packages_costs_what_they_kept(tmp_path: Path) -> None:
    base = {"w": torch.linspace(-1, 1, 1 << 17).bfloat16()}
    folder = write_state(base, tmp_path / "base")
    models = [{"w": (base["w"].float() * (1 + by)).bfloat16()} for by in (0.01, 0.02)]
    packages = [
        extract(folder, model, tmp_path / f"p{seed}", p=0.9, seed=seed) for seed, model in enumerate(models)
    ]
    merge(folder, packages, tmp_path / "package", package=True)
    assert 5 * sum(map(len, files_of(tmp_path / "package").values())) < base["w"].nbytes
    expected = merge(folder, packages, tmp_path / "out").fingerprint
    assert apply(folder, tmp_path / "package", tmp_path / "applied") == expected
    assert apply(folder, packages, tmp_path / "side by side") == expected


@pytest.mark.parametrize("cast", [False, True])
def test_a_package_of_a_rounded_base(tmp_path: Path, cast: bool) -> None:
    base = {"w": torch.linspace(-1, 1, 99)}
    folder, model = write_state(base, tmp_path / "base"), {"w": (base["w"] * 1.25).bfloat16()}
    report = merge(folder, [model], tmp_path / "out", cast_base=cast, weights=[0.5])
    merge(folder, [model], tmp_path / "package", cast_base=cast, weights=[0.5], package=True)
    assert apply(folder, tmp_path / "package", tmp_path / "applied", cast_base=cast) == report.fingerprint


def test_an_untied_result_is_a_package_of_its_tied_base(tmp_path: Path) -> None:
    tied, untied = llama(tied=True), llama()
    folders = save(tied, tmp_path / "base"), save(tuned(untied, 1), tmp_path / "one")
    report = merge(folders[0], [folders[1]], tmp_path / "out")
    merge(folders[0], [folders[1]], tmp_path / "package", package=True)
    assert apply(folders[0], tmp_path / "package", tmp_path / "applied") == report.fingerprint
    assert config_of(tmp_path / "applied") == config_of(tmp_path / "out")
    assert same_loaded(tmp_path / "applied")

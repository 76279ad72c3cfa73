"""The `dare-train` command as a person meets it: output, exit codes, one line for each error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import base_state, moved, save

from dare_train import DeltaPackage


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dare_train", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save(base_state(), tmp_path / "base"), save(moved(base_state()), tmp_path / "tuned")


@pytest.fixture
def package(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    done = run("extract", *pair, "--out", tmp_path / "package", "--p", "0.5", "--seed", "3")
    assert done.returncode == 0, done.stderr
    return tmp_path / "package"


def test_extract_says_how_small_it_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("extract", *pair, "--out", tmp_path / "package")
    assert done.returncode == 0
    assert f"{tmp_path / 'package'}: " in done.stdout
    assert "bits per parameter" in done.stdout


def test_extract_passes_every_option_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    options = [
        "--p",
        "a.*=0.25",
        "--p",
        "0.75",
        "--seed",
        9,
        "--rescale",
        "none",
        "--values",
        "rounded",
        "--whole",
        "b.*",
        "--exclude",
        "z*",
    ]
    assert run("extract", *pair, "--out", tmp_path / "package", *options).returncode == 0
    manifest = DeltaPackage.open(tmp_path / "package").manifest
    by_name = {record.name: record for record in manifest.tensors}
    assert (manifest.seed, manifest.rescale, by_name["a.weight"].p, by_name["a.weight"].values) == (
        9,
        "none",
        0.25,
        "rounded",
    )
    assert by_name["b.weight"].kind == "whole"


def test_apply_verifies_and_writes(pair: tuple[Path, Path], package: Path, tmp_path: Path) -> None:
    done = run("apply", pair[0], package, "--out", tmp_path / "result")
    assert done.returncode == 0, done.stderr
    assert DeltaPackage.open(package).manifest.result[:12] in done.stdout
    assert (tmp_path / "result/model.safetensors").exists()


def test_apply_takes_weights(pair: tuple[Path, Path], package: Path, tmp_path: Path) -> None:
    done = run(
        "apply", pair[0], package, package, "--weight", "0.5", "--weight", "0.5", "--out", tmp_path / "result"
    )
    assert done.returncode == 0, done.stderr


def test_inspect_shows_a_table(package: Path) -> None:
    done = run("inspect", package)
    assert done.returncode == 0
    for text in ("bits per parameter", "a.weight", "p = 0.5, exact", "as in base", "seed 3"):
        assert text in done.stdout


def test_inspect_gives_json(package: Path) -> None:
    data = json.loads(run("inspect", package, "--json").stdout)
    assert data["parameters"] == sum(entry["elements"] for entry in data["per_tensor"]) == 654
    assert data["bytes"] == sum(path.stat().st_size for path in package.iterdir())


def test_inspect_draws(package: Path, tmp_path: Path) -> None:
    done = run("inspect", package, "--plot", tmp_path / "figure.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["a.svg", "a.PDF", "a.jpg", "a.webp", "a"])
def test_a_picture_is_of_the_kind_that_its_name_says(package: Path, tmp_path: Path, name: str) -> None:
    assert run("inspect", package, "--plot", tmp_path / name).returncode == 0
    begins = {"svg": b"<?xml", "PDF": b"%PDF", "jpg": b"\xff\xd8", "webp": b"RIFF", "a": b"\x89PNG"}
    assert (tmp_path / name).read_bytes().startswith(begins[name.split(".")[-1]])


@pytest.mark.parametrize("name", ["a.json", "dare_config.json", "a.0,5", "", "a.raw"])
def test_another_kind_of_picture_is_refused_before_anything_is_said(package: Path, name: str) -> None:
    done = run("inspect", package, "--plot", package / name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--plot: expected a file that ends in .png, .svg, .pdf," in done.stderr
    assert run("verify", package).returncode == 0


def test_kernels_of_no_name_are_refused_by_every_command(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "trition")
    done = run("verify", package)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "dare-train: DARE_TRAIN_KERNELS: expected one of torch, cpu, cuda, found 'trition'\n"
    )


def test_verify_with_and_without_a_base(pair: tuple[Path, Path], package: Path) -> None:
    assert "intact" in run("verify", package).stdout
    done = run("verify", package, "--base", pair[0])
    assert done.returncode == 0
    assert "and gives" in done.stdout


def test_a_base_in_another_dtype_is_rounded_and_one_line_says_so(tmp_path: Path) -> None:
    narrow = base_state()
    wide = {name: t.float() if t.is_floating_point() else t for name, t in narrow.items()}
    base, tuned = save(wide, tmp_path / "base"), save(moved(narrow), tmp_path / "tuned")
    assert run("extract", base, tuned, "--cast-base", "--out", tmp_path / "package").returncode == 0
    apply, verify = ("apply", base, tmp_path / "package"), ("verify", tmp_path / "package", "--base", base)
    line = f"{base}: rounded from F32 to BF16 (2 tensors), as the package needs it\n"
    for command, options, code, text in (
        (apply, ("--out", tmp_path / "one"), 0, line),
        (apply, ("--out", tmp_path / "two", "--cast-base"), 0, ""),
        (apply, ("--out", tmp_path / "three", "--no-cast-base"), 1, "--cast-base) rounds it first\n"),
        (verify, (), 0, line),
        (verify, ("--no-cast-base",), 1, "--cast-base) rounds it first\n"),
    ):
        done = run(*command, *options)
        assert done.returncode == code
        assert done.stderr.endswith(text)
        assert done.stderr.count("\n") == (text != "")


def test_diagnose_answers_plainly(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "DARE will not work here" in run("diagnose", *pair).stdout
    slightly = save(
        {
            name: value * 1.0078125 if value.is_floating_point() else value
            for name, value in base_state().items()
        },
        tmp_path / "slight",
    )
    assert "is safe" in run("diagnose", pair[0], slightly).stdout
    assert json.loads(run("diagnose", pair[0], slightly, "--json").stdout)["safe_drop_rate"] == 0.99


def test_data_errors_exit_with_1_and_one_line(pair: tuple[Path, Path], package: Path, tmp_path: Path) -> None:
    done = run("apply", pair[1], package, "--out", tmp_path / "result")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"dare-train: {pair[1]}: a.weight: expected fingerprint")
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["extract", "a", "b", "--out", "c", "--seed", "1", "--seed", "2"],
            "--seed: expected once, found 2 times",
        ),
        (["extract", "only-one"], "tuned"),
        (
            ["extract", "a", "b", "--out", "c", "--p", "much"],
            "--p: expected a number, or PATTERN=NUMBER, found much",
        ),
        (["extract", "a", "b", "--out", "c", "--p", "1.5"], "p: expected a number in [0, 1), found 1.5"),
        (["extract", "a", "b", "--out", "c", "--values", "int3"], "values: expected one of"),
        (["nothing"], "nothing"),
        (["extract", "a", "b", "--out", "c", "--unknown"], "--unknown"),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], text: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_an_existing_folder_is_not_overwritten_by_default(pair: tuple[Path, Path], package: Path) -> None:
    done = run("extract", *pair, "--out", package)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert run("extract", *pair, "--out", package, "--overwrite").returncode == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in run("--debug", "inspect", tmp_path / "nothing").stderr
    assert "Traceback" not in run("inspect", tmp_path / "nothing").stderr


def test_version_is_the_packages() -> None:
    import dare_train

    assert run("--version").stdout == f"dare_train {dare_train.__version__}\n"


def test_kernels_say_when_they_compile(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARE_TRAIN_CACHE", str(tmp_path / "cache"))
    first = run("extract", *pair, "--out", tmp_path / "one")
    second = run("extract", *pair, "--out", tmp_path / "two")
    assert first.stderr.count("compiling CPU kernels") == 1
    assert second.stderr == ""


def test_results_equal_those_of_the_library(pair: tuple[Path, Path], package: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run("apply", pair[0], package, "--out", tmp_path / "result")
    result, base = load_file(tmp_path / "result/model.safetensors"), base_state()
    changed = torch.count_nonzero(result["a.weight"] != base["a.weight"])
    assert changed == DeltaPackage.open(package).records["a.weight"].changed

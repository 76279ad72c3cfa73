"""The promises of the layout: floors, cheap imports, and nothing that hides randomness or swallows errors."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import dare_train

PACKAGE = Path(dare_train.__file__).parent

MERGE = [
    {f"merge.{name}" for name in floor.split()}
    for floor in (
        "checks parameters inputs vocabulary elements combinations matrices order walk devices",
        "recipe methods rows drops naming",
        "matching deltas configuration task",
        "growth report tensors mergekit",
        "on_device",
        "merged",
        "journal companions",
        "driver",
        "search",
        "arguments",
    )
]
"""The floors of the folder `merge`, from the lowest."""

STUDY = [
    {f"study.{name}" for name in floor.split()}
    for floor in (
        "seat variants",
        "points",
        "sweep inside comparison",
        "sweep_report inside_report comparison_report continual_report tickets_report masks_report rates_report",
        "reporting",
    )
]
"""The floors of the folder `study` that measure; those that draw lie below."""

FLOORS = [
    {"errors", "_version"},
    {"dtypes", "config", "record", "study.document", "study.loading", "study.texts"},
    {"ranks", "offloaded", "study.drawing", "study.page"},
    {"terminal", "parallel", "weights", "publish", "kernels.compiler", "kernels.reference"},
    {"kernels.staging"},
    {"kernels.compiled", "kernels.rows", "kernels.dense", "ownership", "engines", "lowrank"},
    {"kernels.philox", "kernels.blocks", "kernels.plain", "lora", "filenames"},
    {"kernels.fingerprints"},
    {"kernels.cpu", "kernels.sums", "kernels.cuda", "kernels.pack", "kernels.unpack"},
    {"kernels.choice"},
    {"masks", "fingerprint", "checkpoint", "shards", "stats", "law"},
    {"codec", "statistics_file", "layers", "tuning"},
    {"manifest"},
    {"manifest_reader"},
    {"package", "card"},
    {"segments"},
    {"plan", "adapter_config"},
    {"assembly", "adapters"},
    {"resolve", "diagnose", "capture"},
    {"packing", "decoding"},
    {"gather"},
    {"extract", "apply", "device", "origin"},
    {"inplace"},
    {"snapshot", "report", "rescaling", "cache"} | MERGE[0],
    {"tracking"} | MERGE[1],
    {"callback", "statistics"} | MERGE[2],
    *MERGE[3:8],
    MERGE[8] | {"study.publish"},
    MERGE[9] | STUDY[0],
    *STUDY[1:3],
    {"continual", "rates", "subnetwork"},
    {"tickets"},
    *STUDY[3:],
    {"study.commands"},
    {"cli"},
    {"__main__"},
]
"""A module imports from lower floors only. Imports inside functions count too, except those that LAZY names."""

LAZY = {("package", "apply")}
"""`DeltaPackage.verify(base)` rehearses an application: a convenience that points up, resolved when it is called."""

FRAMEWORKS = {"torch", "triton", "transformers", "accelerate", "deepspeed", "wandb", "numba", "matplotlib"}


def modules() -> dict[str, Path]:
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in found.items() if not name.endswith("__init__")}


def imports(name: str, path: Path) -> set[str]:
    """Modules of this package that a module imports, anywhere in its text."""
    parents = name.split(".")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = parents[: len(parents) - node.level]
            base = [*start, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
    return found & modules().keys()


def upward_edges(floors: list[set[str]], edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    level = {name: number for number, floor in enumerate(floors) for name in floor}
    return sorted((name, other) for name, others in edges.items() for other in others if level[other] >= level[name])


def test_every_module_has_a_floor() -> None:
    assert set().union(*FLOORS) == modules().keys()


def test_modules_import_from_lower_floors_only() -> None:
    edges = {name: imports(name, path) for name, path in modules().items()}
    assert sum(map(len, edges.values())) > 60, "the imports were not found"
    assert set(upward_edges(FLOORS, edges)) == LAZY


def test_an_upward_import_would_be_found() -> None:
    assert upward_edges([{"low"}, {"high"}], {"low": {"high"}, "high": {"low"}}) == [("low", "high")]


def loaded_by(code: str) -> set[str]:
    listing = f"{code}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    return {module for module in done.stdout.split() if "." not in module}


def test_the_pinned_triton_is_the_one_that_the_pinned_torch_requires() -> None:
    """PyPI's torch for Linux is built for CUDA and takes one version of Triton: with another in constraints.txt nothing can be set up
    there. Builds for CPUs, as here perhaps, do not say so: look it up when raising one of them."""
    lines = (PACKAGE.parent / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split(";")[0].split("==") for line in lines if "==" in line)
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")
    required = [one for one in metadata.requires("torch") or () if one.startswith("triton")]
    assert all(f"triton=={pinned['triton']}" in one for one in required)


def test_importing_the_package_loads_no_framework() -> None:
    assert not loaded_by("import dare_train; dare_train.__all__; dir(dare_train)") & (FRAMEWORKS | {"numpy", "rich", "typer"})


def test_help_loads_no_framework() -> None:
    code = "import sys; sys.argv = ['dare-train', '--help']\nfrom dare_train.cli import main\nmain()"
    assert not loaded_by(code) & (FRAMEWORKS | {"numpy", "zstandard", "huggingface_hub"})


def test_checkpoints_need_no_torch() -> None:
    assert not loaded_by("import dare_train; dare_train.extract; dare_train.apply") & FRAMEWORKS


def test_a_framework_would_be_noticed() -> None:
    assert "torch" in loaded_by("import dare_train; dare_train.DareCallback")


def test_functions_stay_functions_when_their_modules_are_imported() -> None:
    check = "assert callable(dare_train.apply) and callable(dare_train.extract)"
    code = f"import dare_train\nfrom dare_train import apply_\nimport dare_train.extract\n{check}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dare_train.nothing  # noqa: B018


def test_public_names_resolve() -> None:
    assert all(getattr(dare_train, name) is not None for name in dare_train.__all__)


@pytest.mark.parametrize("forbidden", ["np.random.seed", "torch.manual_seed", "random.seed", "np.random.rand", "pickle", "eval(", "exec("])
def test_no_global_randomness_and_nothing_executed(forbidden: str) -> None:
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    assert len(sources) > 25
    assert [path.name for path, text in sources.items() if forbidden in text] == []

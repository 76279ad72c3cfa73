"""The promises of the layout: rooms in order, cheap imports, and nothing that hides randomness."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata

import pytest
from rooms import PACKAGE, arrows_up, between_rooms, circle, edges, floors, imported, modules, room_of

import dare_train

ROOMS = [
    ["_version", "errors", "integrations.on_path"],
    ["config", "dtypes", "hub", "reading"],
    ["parallel"],
    ["kernels"],
    ["weights"],
    ["weights.files", "weights.live"],
    ["weights.lora", "package"],
    ["evaluation", "extracting", "applying", "merging.methods"],
    ["snapshots", "merging.models", "merging.statistics"],
    ["merging.config", "adapters", "integrations"],
    ["merging"],
    ["training", "studies"],
    ["reports"],
    ["cli"],
    ["__main__"],
]
"""The rooms, floor by floor from the lowest: folders, and the files that lie in none. Imports lead down."""

PUBLIC_FACE = "dare_train"
"""Names resolve there when they are asked for. A room that asks does as its users do: only in a function."""

ASK_THE_PUBLIC_FACE = {"package.reader"}
"""`DeltaPackage.verify` is `dare_train.verify` under the name that users know."""

FRAMEWORKS = {
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "deepspeed",
    "wandb",
    "numba",
    "matplotlib",
    "lightning",
}


def test_every_room_has_a_floor() -> None:
    assert {room for floor in ROOMS for room in floor} == {room_of(name) for name in modules()}
    assert sum(map(len, ROOMS)) <= 30
    assert len(ROOMS) <= 15


def test_the_ground_floor_is_small() -> None:
    assert len([name for name in modules() if "." not in name]) + 1 <= 8, "files directly in dare_train/"


def test_rooms_import_from_lower_rooms_only() -> None:
    arrows = between_rooms(edges())
    assert len(arrows) > 60, "the imports were not found"
    assert arrows_up(ROOMS, arrows) == []


def test_floors_are_as_few_as_can_be() -> None:
    assert len(ROOMS) == len(floors(between_rooms(edges()), {room_of(name) for name in modules()}))


def test_an_arrow_up_would_be_found() -> None:
    rooms = [["low"], ["high"]]
    assert arrows_up(rooms, {("low", "high"), ("high", "low")}) == [("low", "high")]


def test_there_is_no_circle() -> None:
    assert circle(edges()) == []


def test_a_circle_would_be_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_rooms_ask_the_public_face_in_functions_only() -> None:
    public = {*dare_train.__all__} - {"__version__"} - modules().keys()
    asking = set()
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        parents = name.split(".")[:-1]
        if public & {*imported(tree, parents)}:
            asking.add(name)
            top = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
            assert not public & {*imported(ast.Module(list(top), []), parents)}
    assert asking == ASK_THE_PUBLIC_FACE


def test_names_of_files_are_unique() -> None:
    names = [name.rpartition(".")[2] for name in modules()]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_every_room_says_what_belongs_there() -> None:
    folders = sorted({path.parent for path in modules().values()} - {PACKAGE})
    assert len(folders) > 10
    for folder in folders:
        lines = (folder / "README.md").read_text().strip().splitlines()
        assert 3 <= len(lines) <= 14, f"{folder.name}/README.md has {len(lines)} lines"


def loaded_by(code: str) -> set[str]:
    return {module for module in all_loaded_by(code) if "." not in module}


def all_loaded_by(code: str) -> set[str]:
    listing = f"{code}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


def test_the_pinned_triton_is_the_one_that_the_pinned_torch_requires() -> None:
    """PyPI's torch for Linux is built for CUDA and takes one version of Triton: with another in
    constraints.txt nothing can be set up there. Builds for CPUs, as here perhaps, do not say so: look it up
    when raising one of them."""
    lines = (PACKAGE.parent / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split(";")[0].split("==") for line in lines if "==" in line)
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")
    required = [one for one in metadata.requires("torch") or () if one.startswith("triton")]
    assert all(f"triton=={pinned['triton']}" in one for one in required)


def test_importing_the_package_loads_no_framework() -> None:
    code = "import dare_train; dare_train.__all__; dir(dare_train)"
    assert not loaded_by(code) & (FRAMEWORKS | {"numpy", "rich", "typer"})


def test_help_loads_no_framework() -> None:
    code = "import sys; sys.argv = ['dare-train', '--help']\nfrom dare_train.cli.main import main\nmain()"
    assert not loaded_by(code) & (FRAMEWORKS | {"numpy", "zstandard", "huggingface_hub"})


@pytest.mark.parametrize("command", ["extract", "apply", "diagnose"])
def test_commands_load_no_other_commands_rooms(command: str) -> None:
    """What a small command imports costs it a millisecond or two for each module."""
    words = [
        "dare-train",
        command,
        "no-base",
        "no-model",
        *([] if command == "diagnose" else ["--out", "out"]),
    ]
    loaded = all_loaded_by(f"import sys; sys.argv = {words}\nfrom dare_train.cli.main import main\nmain()")
    assert "dare_train.weights.files.checkpoint" in loaded, "the command did not begin"
    assert [name for name in loaded if name.startswith("dare_train.merging")] == []


def test_checkpoints_need_no_torch() -> None:
    code = "import dare_train; dare_train.extract; dare_train.apply; dare_train.verify"
    assert not loaded_by(code) & FRAMEWORKS


def test_a_framework_would_be_noticed() -> None:
    assert "torch" in loaded_by("import dare_train; dare_train.DareCallback")


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dare_train.nothing  # noqa: B018


def test_public_names_resolve() -> None:
    assert all(getattr(dare_train, name) is not None for name in dare_train.__all__)


FORBIDDEN = [
    "np.random.seed", "torch.manual_seed", "random.seed", "np.random.rand", "pickle", "eval(", "exec("
]  # fmt: skip


@pytest.mark.parametrize("forbidden", FORBIDDEN)
def test_no_global_randomness_and_nothing_executed(forbidden: str) -> None:
    # mergekit has an option of that name, which is told to mean nothing here.
    sources = {path: path.read_text().replace("lazy-unpickle", "") for path in PACKAGE.rglob("*.py")}
    assert len(sources) > 25
    assert [path.name for path, text in sources.items() if forbidden in text] == []

"""Models whose names do not meet those of their base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantised_models import save_model
from safetensors.torch import load_file

from dare_train import apply, diagnose, extract, merge
from dare_train.errors import TensorMismatch

State = dict[str, torch.Tensor]


def state(seed: int = 0, layers: int = 3) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (7, 4), "model.norm.weight": (4,), "lm_head.weight": (7, 4)}
    for layer in range(layers):
        begin = f"model.layers.{layer}"
        shapes |= {f"{begin}.attn.{which}_proj.weight": (4, 4) for which in "qkv"}
        shapes |= {f"{begin}.ln1.weight": (4,), f"{begin}.ln2.weight": (4,), f"{begin}.up.weight": (6, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


RENAMED: dict[str, tuple[Callable[[str], str], dict[str, str]]] = {
    "norms": (
        lambda name: name.replace(".ln1.", ".input_norm.").replace(".ln2.", ".output_norm."),
        {".input_norm.": ".ln1.", ".output_norm.": ".ln2."},
    ),
    "layers": (
        lambda name: name.replace("model.layers.", "transformer.h."),
        {"transformer.h.": "model.layers."},
    ),
    "a part of each": (lambda name: name.replace("_proj.", "_linear."), {"_linear.": "_proj."}),
    "one in each layer": (lambda name: name.replace(".up.", ".fc1."), {".fc1.": ".up."}),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_other_names_are_refused_and_renamed_when_asked(kind: str, tmp_path: Path) -> None:
    rename, back = RENAMED[kind]
    base, tuned = state(), state(1)
    folder = save_model(base, tmp_path / "base", {})
    other = save_model({rename(name): tensor for name, tensor in tuned.items()}, tmp_path / "other", {})
    for action in (
        lambda: merge(folder, [other], tmp_path / "out"),
        lambda: merge(folder, [other, other], tmp_path / "out", method="ties"),
        lambda: extract(folder, other, tmp_path / "out"),
        lambda: diagnose(folder, other),
    ):
        with pytest.raises(
            TensorMismatch, match=r"expected the names of .*base, found .* --rename .*="
        ) as refused:
            action()
        assert (
            str(refused.value).count(" and model.layers.") + str(refused.value).count(" and transformer.")
            >= 1
        )
    assert not (tmp_path / "out").exists()
    merge(folder, [other], tmp_path / "merged", rename=back)
    apply(folder, extract(folder, other, tmp_path / "package", p=0, rename=back), tmp_path / "applied")
    assert diagnose(folder, other, rename=back).new == ()
    for out in ("merged", "applied"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == base.keys()
        assert all(torch.equal(found[name], tuned[name]) for name in base)


def test_not_one_name_in_common_but_the_same_shapes(tmp_path: Path) -> None:
    other = {f"backbone.{name.replace('.', '_')}.value": tensor for name, tensor in state(1).items()}
    with pytest.raises(TensorMismatch, match="--rename"):
        merge(state(), [other], tmp_path / "out")
    with pytest.raises(TensorMismatch, match="--rename"):
        extract(state(), other, tmp_path / "out")
    with pytest.raises(TensorMismatch, match="not one of them; is this the base"):
        merge(state(), [{"x": torch.ones(3)}], tmp_path / "out")


def test_what_the_remedy_says_works(tmp_path: Path) -> None:
    """Word for word."""
    rename, _ = RENAMED["norms"]
    other = {rename(name): tensor for name, tensor in state(1).items()}
    with pytest.raises(TensorMismatch) as refused:
        merge(state(), [other], tmp_path / "out")
    words = refused.value.remedy.split()
    given = dict(words[place + 1].split("=") for place, word in enumerate(words) if word == "--rename")
    merge(state(), [other], tmp_path / "out", rename=given)
    assert load_file(tmp_path / "out/model.safetensors").keys() == state().keys()


def test_weights_that_are_cut_otherwise_are_refused(tmp_path: Path) -> None:
    """As where one has its experts by number and the other all of them in one tensor."""
    packed = {name: tensor for name, tensor in state(1).items() if "_proj" not in name} | {
        f"model.layers.{layer}.attn.qkv.weight": torch.ones(12, 4) for layer in range(3)
    }
    for action in (
        lambda: merge(state(), [packed], tmp_path / "out"),
        lambda: extract(state(), packed, tmp_path / "out"),
    ):
        with pytest.raises(TensorMismatch, match="are weights cut or packed otherwise, as experts are"):
            action()


def test_what_the_user_has_spoken_of_is_no_question(tmp_path: Path) -> None:
    """New tensors of shapes that the base has, in place of others that are left out."""
    rename, _ = RENAMED["one in each layer"]
    other = {rename(name): tensor for name, tensor in state(1).items()}
    package = extract(state(), other, tmp_path / "package", p=0, whole="*.fc1.*", exclude="*.up.*")
    assert sum(record.kind == "whole" for record in package.manifest.tensors) == 3
    merge(state(), [other], tmp_path / "out", exclude=["*.fc1.*", "*.up.*"])


def test_older_names_of_layer_norms_are_no_renaming(tmp_path: Path) -> None:
    base = {name.replace(".ln1.weight", ".ln1.gamma"): tensor for name, tensor in state().items()}
    package = extract(base, state(1), tmp_path / "package", p=0)
    assert sum(record.kind == "whole" for record in package.manifest.tensors) == 3
    merge(base, [state(1)], tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == base.keys()


def test_another_head_is_no_renaming(tmp_path: Path) -> None:
    """A base with the head of its training, and a model with one for a task."""
    base = state() | {"cls.dense.weight": torch.ones(4, 4), "cls.dense.bias": torch.ones(4)}
    tuned = state(1) | {"pooler.dense.weight": torch.ones(4, 4), "pooler.dense.bias": torch.ones(4)}
    extract(base, tuned, tmp_path / "package")
    merge(base, [tuned], tmp_path / "out")

"""The README's code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from training import classifier, examples, make_trainer, save_base, train

import dare_train

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_four_python_blocks() -> None:
    assert len(BLOCKS) == 4


def test_the_training_block_runs(tmp_path: Path) -> None:
    model = classifier(save_base(tmp_path / "base"))
    names: dict[str, Any] = {
        "model": model,
        "args": make_trainer(model, tmp_path / "out").args,
        "data": examples(),
    }
    exec(BLOCKS[0], names)
    assert (tmp_path / "out/dare/final/dare_config.json").exists()
    assert (tmp_path / "out/dare/step-4/dare_config.json").exists()


def test_the_apply_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base")
    train(classifier(base), tmp_path / "run").save_model(str(tmp_path / "tuned"))
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[1], {"model": classifier(base)})
    assert (tmp_path / "received/config.json").exists()


def test_the_merge_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    classifier(save_base(tmp_path / "encoder")).save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"dare_train": dare_train}
    for seed, name in enumerate(("math-package", "code-package")):
        dare_train.extract(base, moved(base, seed), name, seed=seed)
    classifier(base).save_pretrained("chat-model")
    exec(BLOCKS[2], names)
    assert (tmp_path / "merged/config.json").exists()
    assert names["report"].counts()["merged"] > 0


@pytest.mark.parametrize(
    "text", [BLOCKS[3], re.findall(r"```python\n(.*?)```", (ROOT / "docs/gpu.md").read_text(), re.DOTALL)[0]]
)
def test_the_blocks_about_gpus_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's kernels, which work anywhere."""
    monkeypatch.setenv("DARE_TRAIN_KERNELS", "torch")
    base = tmp_path / "base"
    classifier(save_base(tmp_path / "encoder")).save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("math-package", "chat-package", "code-package")):
        dare_train.extract(base, moved(base, seed), name, seed=seed)
    names: dict[str, Any] = {"dare_train": dare_train, "model": classifier(base)}
    exec(text, names)
    assert names["cache"].packages[-1] in ("math-package", "code-package")
    assert names["cache"].active is None


def moved(base: Path, seed: int) -> torch.nn.Module:
    """A fine-tune of the base: every weight a little off."""
    generator = torch.Generator().manual_seed(seed)
    model = classifier(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def test_the_commands_exist() -> None:
    from dare_train.cli.main import app
    from dare_train.cli.training_commands import app as training

    commands = set(re.findall(r"^dare-train (\w+)", README, re.MULTILINE))
    groups = [group.typer_instance for group in app.registered_groups]
    registered = [command for group in (app, *groups) if group for command in group.registered_commands]
    of_training = {command.callback for command in training.registered_commands}  # used in sentences
    shown = [command.callback for command in registered if command.callback not in of_training]
    assert commands == {command.__name__ for command in shown if command}
    assert all((ROOT / script).exists() for script in re.findall(r"^(scripts/\w+)", README, re.MULTILINE))


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 6
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []

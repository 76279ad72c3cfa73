"""`DareCallback(push_to_hub=)`: packages on a Hub of this machine, pushed behind training, which does not
wait for it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer, hub_of
from training import classifier, make_trainer, save_base

from dare_train import DareCallback, apply
from dare_train.errors import ConfigError, HubError
from dare_train.snapshots import pushing

REPO = "me/run"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("pushing") / "base")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server, hub_of({**server.environment, "HF_HOME": str(tmp_path / "cache")}):
        yield server


def trained(base: Path, out: Path, callback: DareCallback, *, model: Any = None, **arguments: Any) -> Any:
    trainer = make_trainer(model or classifier(base), out, callback, **arguments)
    trainer.train()
    return trainer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def inside(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {
        path.removeprefix(f"{name}/"): file for path, file in files.items() if path.startswith(f"{name}/")
    }


def test_packages_arrive_to_the_byte_and_no_base_does(hub: HubServer, base: Path, tmp_path: Path) -> None:
    model = classifier(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)  # its base has to be kept
    trained(base, tmp_path / "out", DareCallback(p=0.5, push_to_hub=REPO), model=model)
    assert (tmp_path / "out/dare/base").is_dir()
    files = hub.files(REPO)
    assert {name.partition("/")[0] for name in files} == {"README.md", "step-2", "step-4", "final"}
    for name in ("step-2", "step-4", "final"):
        assert inside(files, name) == contents(tmp_path / "out/dare" / name)


def test_a_chain_that_was_pushed_while_it_grew_is_applied_from_the_hub(
    hub: HubServer, base: Path, tmp_path: Path
) -> None:
    callback = DareCallback(p=0.5, push_to_hub=REPO, incremental=True)
    trained(base, tmp_path / "out", callback)
    assert callback.package is not None
    chain = [f"hf://{REPO}/{name}" for name in ("step-2", "step-4", "final")]
    command = [sys.executable, "-m", "dare_train", "apply", base, *chain, "--out", tmp_path / "model"]
    subprocess.run(command, check=True)
    local = [snapshot.package.path for snapshot in callback.packages]
    assert apply(base, local, tmp_path / "here") == callback.package.manifest.result
    weights = "model.safetensors"
    assert (tmp_path / "model" / weights).read_bytes() == (tmp_path / "here" / weights).read_bytes()
    last = [*command[:5], REPO, "--out", tmp_path / "alone"]
    alone = subprocess.run(last, capture_output=True, text=True, check=False)
    assert alone.returncode == 1
    assert len(alone.stderr.splitlines()) == 1


def test_the_card_says_what_was_measured(hub: HubServer, base: Path, tmp_path: Path) -> None:
    callback = DareCallback(p=0.5, push_to_hub=REPO, when="end", evaluate=True)
    trainer = trained(
        base, tmp_path / "out", callback, eval_strategy="epoch", num_train_epochs=1, max_steps=-1
    )
    measured = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    card = hub.files(REPO)["final/README.md"].decode()
    assert f"| eval_loss | {measured['eval_loss']:.6g} |" in card
    assert f"| eval_dare_loss | {measured['eval_dare_loss']:.6g} |" in card
    assert "runtime" not in card


def test_what_the_trainers_arguments_say_of_the_hub_holds(hub: HubServer, base: Path, tmp_path: Path) -> None:
    del os.environ["HF_TOKEN"]
    told = {"hub_token": hub.environment["HF_TOKEN"], "hub_private_repo": True, "hub_revision": "trial"}
    trained(base, tmp_path / "out", DareCallback(p=0.5, push_to_hub=REPO, when="end"), **told)
    assert hub.repositories[REPO].private
    assert hub.files(REPO) == {}
    assert inside(hub.files(REPO, "trial"), "final") == contents(tmp_path / "out/dare/final")


def test_a_refusal_is_tried_again_at_the_end(
    hub: HubServer, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commits: list[str] = []

    def refuse_the_first(method: str, path: str) -> int | None:
        if "/commit/" not in path:
            return None
        commits.append(path)
        return 403 if len(commits) == 1 else None

    hub.refuses = refuse_the_first
    callback = DareCallback(p=0.5, push_to_hub=REPO, when=("save", "end"))
    trained(base, tmp_path / "out", callback)
    assert callback.failures == []
    assert {name.partition("/")[0] for name in hub.files(REPO)} == {"README.md", "step-2", "step-4", "final"}
    assert len(commits) == 4


def test_a_hub_that_goes_on_refusing_is_reported_with_the_command_that_does_it(
    hub: HubServer, base: Path, tmp_path: Path
) -> None:
    hub.refuses = lambda method, path: 403
    callback = DareCallback(p=0.5, push_to_hub=REPO, when="end")
    trainer = trained(base, tmp_path / "out", callback)
    [failure] = callback.failures
    assert isinstance(failure, HubError)
    assert str(failure).startswith("push_to_hub: final did not arrive: me/run: expected a repository that")
    assert "found 403: not today; log in with" in str(failure)
    assert trainer.state.log_history[-1]["dare/failures"] == 1
    hub.refuses = lambda method, path: None
    command = shlex.split(str(failure).rpartition("later: dare-train ")[2])
    for words in (command, ["pull", REPO, "--out", str(tmp_path / "back")]):
        subprocess.run([sys.executable, "-m", "dare_train", *words], check=True)
    assert contents(tmp_path / "back/final") == contents(tmp_path / "out/dare/final")


def test_a_hub_that_does_not_answer_holds_nothing_up(
    hub: HubServer, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "PATIENCE", 1.0)
    hub.answers.clear()
    callback = DareCallback(p=0.5, push_to_hub=REPO)
    began = time.monotonic()
    trained(base, tmp_path / "out", callback)
    assert time.monotonic() - began < 20
    [failure] = callback.failures
    assert str(failure).startswith("push_to_hub: step-2 and 2 more did not arrive: no answer within 1 s")
    assert [snapshot.package.path.name for snapshot in callback.packages] == ["step-2", "step-4", "final"]


def test_what_keep_removed_before_it_was_pushed_is_not_missed(
    hub: HubServer, base: Path, tmp_path: Path
) -> None:
    callback = DareCallback(p=0.5, push_to_hub=REPO, keep=1, when=1)
    trained(base, tmp_path / "out", callback, max_steps=6)
    assert callback.failures == []
    assert {path.name for path in (tmp_path / "out/dare").iterdir()} == {"step-6"}
    assert inside(hub.files(REPO), "step-6") == contents(tmp_path / "out/dare/step-6")


def test_it_is_refused_at_the_start_where_it_cannot_be(
    hub: HubServer, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="expected the id of one on the Hub"):
        DareCallback(push_to_hub="not a repository")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="expected a token of the Hub, found none; log in with"):
        trained(base, tmp_path / "out", DareCallback(p=0.5, push_to_hub=REPO))
    monkeypatch.setenv("HF_TOKEN", "one")
    twice = [DareCallback(p=0.5, push_to_hub=REPO, name=name) for name in ("one", "two")]
    with pytest.raises(
        ConfigError, match=r"a repository for each callback, found me/run for 'one' and 'two'"
    ):
        make_trainer(classifier(base), tmp_path / "out", *twice).train()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="found HF_HUB_OFFLINE; leave push_to_hub away"):
        trained(base, tmp_path / "out", DareCallback(p=0.5, push_to_hub=REPO))
    assert hub.requests == []

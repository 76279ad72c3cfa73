"""Arguments of a `DareCallback` in words: all of them, read as what they are, and refused in one line."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
from tiny import refusal

from dare_train import DareCallback
from dare_train.errors import ConfigError, DareError
from dare_train.integrations.written_options import OPTIONS, check, read


def test_every_argument_can_be_written_down() -> None:
    assert [*OPTIONS] == [*inspect.signature(DareCallback).parameters]


@pytest.mark.parametrize(
    ("written", "options"),
    [
        (["p=0.5"], {"p": 0.5}),
        (["p=*.mlp.*=0.5", "p=0.9"], {"p": {"*.mlp.*": 0.5, "*": 0.9}}),
        (["when=save", "when=100"], {"when": ["save", 100]}),
        (["exclude=*.bias", "exclude=lm_head*"], {"exclude": ["*.bias", "lm_head*"]}),
        (["keep=2", "keep_best=yes", "evaluate=False"], {"keep": 2, "keep_best": True, "evaluate": False}),
        (["base=a=b"], {"base": "a=b"}),
    ],
)
def test_words_become_arguments(written: list[str], options: dict[str, Any]) -> None:
    assert read(written) == options
    check(options)
    DareCallback(**options)


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        (["p"], ["--dare", "NAME=VALUE"]),
        (["keeep=2"], ["--dare keeep", "keep?"]),
        (["zz=2"], ["--dare zz", "one of p, seed"]),
        (["keep=two"], ["--dare keep", "an integer", "two"]),
        (["p=much"], ["--dare p", "a number", "much"]),
        (["p=0.5", "p=0.9"], ["--dare p", "one rate for each pattern"]),
        (["evaluate=perhaps"], ["--dare evaluate", "true or false"]),
        (["name=a", "name=b"], ["--dare name", "one value", "a and b"]),
    ],
)
def test_words_that_cannot_be_read(written: list[str], texts: list[str]) -> None:
    with pytest.raises(DareError) as caught:
        read(written)
    refusal(caught.value, ConfigError, *texts)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"p": 1.5}, "[0, 1)"),
        ({"when": ["never"]}, "when"),
        ({"keep": 1, "incremental": True}, "chain"),
        ({"keep_best": True}, "keep"),
        ({"kernels": "fast"}, "kernels"),
        ({"values": "int2"}, "int8"),
        ({"evaluate": "yes"}, "true or false"),
        ({"base": 3}, "a text"),
        ({"source": "elsewhere"}, "master"),
        ({"wen": "end"}, "when?"),
    ],
)
def test_what_no_callback_takes(options: dict[str, Any], text: str) -> None:
    with pytest.raises(DareError) as caught:
        check(options)
    refusal(caught.value, ConfigError, text)


def test_checking_needs_no_torch() -> None:
    code = (
        "import sys; from dare_train.integrations import running, written_options as w\n"
        "w.check(w.read(['p=0.5', 'when=end'])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

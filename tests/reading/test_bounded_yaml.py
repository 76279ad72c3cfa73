"""YAML of strangers: what it may cost, and that what people write means what it always did."""

from __future__ import annotations

import time

import pytest
import yaml

from dare_train.reading.bounded_yaml import DEEPEST, LARGEST, MOST_NODES, documents

PLAIN = """
merge_method: ties
base_model: ../base   # a comment
shared: &shared {density: 0.5, weight: [0, 1.5, 1e-3]}
models:
  - model: "a"
    parameters: *shared
  - {model: b, parameters: {<<: *shared, weight: 0x10}}
seed: 1_000
when: 2026-01-01
on: yes
nothing: ~
"""


def test_what_people_write_means_what_it_did() -> None:
    assert documents(PLAIN) == [yaml.safe_load(PLAIN)]


def _levels(first: str, above: str) -> str:
    """Nine levels, each ten times the one below."""
    levels = (above.format(", ".join([f"*a{i - 1}"] * 10)) if i else first for i in range(9))
    return "".join(f"a{i}: &a{i} {level}\n" for i, level in enumerate(levels))


_BOMB = _levels("[1, 1, 1]", "[{}]")
_MERGED = _levels("{k: v}", "{{<<: [{}]}}")


@pytest.mark.parametrize(
    ("first", "second", "one"),
    [
        ("0.5", "0.9", False),
        ("0.5", "'0.5'", False),
        ("[1, 2]", "[1, 2]", True),
        ("[1, 2]", "[1, 2, 3]", False),
        ("{a: 1}", "{a: 2}", False),
        ("{a: 1}", "1", False),
        ("ties", "'ties'", True),
    ],
)
def test_a_key_has_one_value(first: str, second: str, one: bool) -> None:
    text = f"models:\n- weight: {first}\n  weight: {second}\n"
    if one:
        assert documents(text) == [yaml.safe_load(text)]
    else:
        with pytest.raises(yaml.YAMLError, match="two values of 'weight'"):
            documents(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_BOMB, f"aliases that stand for more than {MOST_NODES:,} values"),
        (_MERGED, f"aliases that stand for more than {MOST_NODES:,} values"),
        ("&a [*a]", "an alias of what it lies in"),
        ("[" * (DEEPEST + 1), f"more than {DEEPEST} levels"),
        ("- " * LARGEST, "bytes of YAML, more than"),
        ("a: 1\n" * MOST_NODES, f"more than {MOST_NODES:,} values"),
        ("1:" + "59:" * 3000 + "59", "a number of 9,004 characters"),
        ("1" * 101, "a number of 101 characters"),
        ("1." + "1" * 5000, "a number of 5,002 characters"),
        ("!!python/name:os.system x", "a tag, 'tag:yaml.org,2002:python/name:os.system'"),
        ("!!timestamp 99", "a tag"),
        ('"\\U99999999"', "OverflowError"),
        ("2026-99-99", "month must be in"),
    ],
    ids=range(13),
)
def test_what_makes_small_texts_large_is_refused_at_once(text: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises((yaml.YAMLError, ValueError), match=message):
        documents(text)
    assert time.process_time() - began < 10

"""Patterns of a stranger's adapter: matched as `re` does it, in a time that can be told beforehand."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_train.weights.lora.module_patterns import MOST_PATTERNS, MOST_STEPS, ModulePatterns, Refused

_ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a.]", r"\w", r"\d", "^", "$", "[]a]", r"\x61"]
_REPEATS = ["*", "+", "?", "*?", "{2}", "{0,2}", "{1,}", "{,2}", "{0}"]
_PATTERNS = st.recursive(
    st.sampled_from(_ATOMS),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map("|".join)
        | inner.map("({})".format)
        | st.tuples(inner, st.sampled_from(_REPEATS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}")
    ),
    max_leaves=8,
)


@settings(max_examples=600)
@given(_PATTERNS, st.text("ab.1", max_size=8))
def test_matches_are_those_of_re(pattern: str, name: str) -> None:
    found = ModulePatterns({pattern: 1}).value(name, 0)
    assert found == (re.match(rf"(.*\.)?({pattern})$", name) is not None)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "model.layers.0.uq_proj", False),
        (r"layers\.\d+\.mlp", "model.layers.12.mlp", True),
        ("model.layers.0", "modelxlayers.0", True),
        (".*", "anything.at.all", True),
        (r"(?P<which>up|down)_proj", "h.down_proj", True),
    ],
)
def test_patterns_of_published_adapters(pattern: str, name: str, matches: bool) -> None:
    assert ModulePatterns({pattern: 1}).value(name, 0) == matches


def test_the_first_that_matches_counts() -> None:
    assert ModulePatterns({"x": 1, "q": 2, ".*q": 3}).value("a.q", 0) == 2


@pytest.mark.parametrize("pattern", [r"((\w+\.?)+)+\!", r"(a|a)*b", r"(a?){50}a{50}b", r".*.*.*.*.*.*.*x"])
def test_patterns_that_go_back_and_try_again_do_not_here(pattern: str) -> None:
    began = time.process_time()
    assert ModulePatterns({pattern: 1}).value("a" * 200, 0) == 0
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        ({"(": 1}, "no regular expression"),
        ({"(?i)a": 1}, "a group that begins with"),
        ({r"(a)\1": 1}, "in a pattern"),
        ({"(?=a)b": 1}, "a group that begins with"),
        ({r"\bq": 1}, "in a pattern"),
        ({"((a{99}){99}){99}": 1}, "a pattern of more than 2,000 places"),
        ({"a" * 3000: 1}, "a pattern of 3,000 characters"),
        ({f"a{number}": 1 for number in range(MOST_PATTERNS + 1)}, "10,001 patterns"),
    ],
    ids=range(8),
)
def test_what_is_not_understood_is_refused(patterns: dict[str, int], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        ModulePatterns(patterns)


def test_all_matches_of_an_adapter_take_so_many_steps_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dare_train.weights.lora.module_patterns.MOST_STEPS", 5_000)
    patterns = ModulePatterns({"(a|b)*a" + "(a|b)" * 50: 1})
    assert patterns.value("b" * 100, 0) == 0
    assert MOST_STEPS == 5_000_000
    with pytest.raises(Refused, match="patterns that take more than 5,000 steps"):
        patterns.value("ab" * 500, 0)

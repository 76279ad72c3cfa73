"""Hypothesis makes inputs up, and makes those smaller that fail."""

from __future__ import annotations

from changes import VALUES, Change
from command_lines import lines
from good_files import EXPERTS, RECIPE
from hypothesis import strategies as st
from judging import KINDS, Input

_PLACES = st.integers(0, 5000)
_NUMBERS = st.sampled_from(
    [0, 1, -1, 7, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 53, 1 << 62, (1 << 63) - 1, -1 << 63]
)
_VALUES = st.sampled_from(sorted(VALUES))
_TEXTS = st.sampled_from(
    ["[", "{", '"', "\0", "\ud800", "²", "1", "é", "\x1b[2J", "null", ",", "-", "&a ", "*a", ": "]
)
_TIMES = st.sampled_from([1, 1, 1, 2, 70, 3000])
_INSTEAD = st.sampled_from(["pipe", "folder", "link", "round", "empty", "nothing"])


_YAML = {"yaml": RECIPE, "experts": EXPERTS}
"""By kind, a configuration whose words are exchanged."""


def inputs(kind: str) -> st.SearchStrategy[Input]:
    """Inputs of a kind."""
    files = st.sampled_from(KINDS[kind].files)
    changes = _changes(files, sealed=KINDS[kind].sealed)
    made = st.builds(
        Input,
        st.just(kind),
        (st.tuples(changes) | st.lists(changes, min_size=2, max_size=4).map(tuple)),
        sealed=st.booleans() if KINDS[kind].sealed else st.just(False),
        action=st.integers(0, len(KINDS[kind].actions) - 1),
    )
    if kind == "command line":
        text = lines()
    elif kind in _YAML:
        text = _yaml(_YAML[kind])
    else:
        return made
    return made | st.builds(Input, st.just(kind), st.just(()), text=text)


def _changes(files: st.SearchStrategy[str], *, sealed: bool) -> st.SearchStrategy[Change]:
    structure = (
        st.tuples(st.just("set"), files, _PLACES, _VALUES)
        | st.tuples(st.just("drop"), files, _PLACES)
        | st.tuples(st.just("name"), files, _PLACES, _VALUES)
        | st.tuples(st.just("again"), files, _PLACES, st.integers(1, 999))
        | st.tuples(st.just("swap"), files, _PLACES, _PLACES)
    )
    raw = (
        st.tuples(st.just("bit"), files, _PLACES, st.integers(0, 7))
        | st.tuples(st.just("cut"), files, _PLACES)
        | st.tuples(st.just("put"), files, _PLACES, _TEXTS, _TIMES)
        | st.tuples(st.just("u64"), files, _PLACES, _NUMBERS)
        | st.tuples(st.just("kind"), files, _INSTEAD)
    )
    frames = (
        st.tuples(st.just("row"), _PLACES, st.integers(0, 5), _NUMBERS)
        | st.tuples(st.just("frame"), _PLACES, _PLACES, st.integers(0, 7))
        | st.tuples(st.just("recompress"), _PLACES, _PLACES, st.integers(0, 7))
    )
    return structure | raw | frames if sealed else structure | raw


def _yaml(good: str) -> st.SearchStrategy[str]:
    """Configurations whose words are exchanged, and structures of any words."""
    words = st.sampled_from(
        sorted(
            {
                *good.replace(":", " : ").split(),
                "&a",
                "*a",
                "<<: *a",
                "!!set",
                "- ",
                "|",
                "?",
                "1:59:59",
                "2026-01-01",
                ".inf",
                "~",
            }
        )
    )
    lines = st.lists(st.tuples(st.integers(0, 4), st.lists(words, max_size=5)), max_size=12)
    free = lines.map(lambda lines: "\n".join("  " * indent + " ".join(words) for indent, words in lines))
    exchanged = st.tuples(words, words).map(lambda pair: good.replace(*pair))
    value = st.recursive(
        words, lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
    )
    keyed = st.tuples(words, value).map(lambda pair: f"{RECIPE}{pair[0]}: {pair[1]}\n")
    return free | exchanged | keyed

"""Patterns of module names in an adapter's configuration, which are a stranger's regular expressions.

Python's `re` goes back and tries again: a pattern of twenty characters can take it years. Here all ways of
matching are followed at once, a character at a time, so that a match takes as long as name times pattern at
most; and of that only so much is done for one adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

_Value = TypeVar("_Value")

MOST_STATES = 2_000
"""Places in a pattern, with what `{m,n}` repeats written out."""
LONGEST = 2_000
"""Characters of a pattern."""
MOST_PATTERNS = 10_000
"""For one adapter. With ranks found for each module, there are as many as modules."""
MOST_STEPS = 5_000_000
"""For one adapter: some seconds."""

_PLAIN = re.compile(r"(?:[\w\-./:]|\\[.\-])*")
"""A pattern of characters alone, which all are one character long in a name."""
_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[dDwWsSafnrtv]|[^a-zA-Z0-9])", re.S
)
_SET = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.S)
_COUNTS = re.compile(r"\{(\d*)(,?)(\d*)\}")
_BEGIN, _END, _GO = "^", "$", ""


class Refused(Exception):
    """A pattern that is not understood here, or takes too long. Says why."""


class ModulePatterns(Generic[_Value]):
    """Values by patterns, of which the first that matches a name, or its end after a dot, counts: as PEFT
    does it (`peft.utils.other.get_pattern_key`), `(.*\\.)?(PATTERN)$` from the beginning.

    Raises:
        Refused: one is no regular expression, or has more than characters, sets, groups, alternatives,
            repeats, `^` and `$`.
    """

    def __init__(self, values: Mapping[str, _Value]) -> None:
        if len(values) > MOST_PATTERNS:
            raise Refused(f"{len(values):,} patterns, more than {MOST_PATTERNS:,}")
        self._patterns = [(_compiled(pattern), value) for pattern, value in values.items()]
        self._left = MOST_STEPS

    def value(self, module: str, default: _Value) -> _Value:
        """That of a module.

        Raises:
            Refused: it takes too long, or the name has a line break, where `.` and `$` mean something else.
        """
        if self._patterns and "\n" in module:
            raise Refused("a module with a line break in its name")
        for pattern, value in self._patterns:
            matches, steps = pattern.matches(module)
            self._left -= steps
            if self._left < 0:
                raise Refused(f"patterns that take more than {MOST_STEPS:,} steps")
            if matches:
                return value
        return default


@dataclass(frozen=True)
class _Plain:
    """A pattern whose matches have one length."""

    length: int
    expression: re.Pattern[str]

    def matches(self, name: str) -> tuple[bool, int]:
        start = len(name) - self.length
        steps = 1 + self.length // 50
        if start < 0 or (start > 0 and name[start - 1] != "."):
            return False, steps
        return self.expression.fullmatch(name, start) is not None, steps


@dataclass
class _Automaton:
    """States: in each, what lets it go on, and where to. The last one has matched."""

    tests: list[re.Pattern[str] | str] = field(default_factory=list)
    """An expression takes a character; `^`, `$` and the empty text take none."""
    after: list[list[int]] = field(default_factory=list)

    def add(self, test: re.Pattern[str] | str, after: Iterable[int] = ()) -> int:
        if len(self.tests) >= MOST_STATES:
            raise Refused(f"a pattern of more than {MOST_STATES:,} places")
        self.tests.append(test)
        self.after.append([*after])
        return len(self.tests) - 1

    following: dict[tuple[frozenset[int], str], frozenset[int]] = field(default_factory=dict)
    """Where a character leads from some states: names are much alike, and ask for few of these."""

    @cached_property
    def begin(self) -> frozenset[int]:
        return self._reached(frozenset({0}), begin=True)

    def matches(self, name: str) -> tuple[bool, int]:
        here = self.begin
        steps = 5 + len(name) // 10
        for char in name:
            known = self.following.get((here, char))
            if known is None:
                known = self.following[here, char] = self._after(here, char)
                steps += 3 * (len(here) + len(known))
            if not known:
                return False, steps
            here = known
        return len(self.tests) - 1 in self._reached(here, begin=not name, end=True), steps

    def _after(self, states: frozenset[int], char: str) -> frozenset[int]:
        taken = [
            following
            for state in states
            if isinstance(test := self.tests[state], re.Pattern) and test.match(char)
            for following in self.after[state]
        ]
        return self._reached(frozenset(taken))

    def _reached(self, states: frozenset[int], *, begin: bool = False, end: bool = False) -> frozenset[int]:
        """These, and those that they lead to without a character, at a name's ends or within it."""
        open_now = {_GO: True, _BEGIN: begin, _END: end}
        reached = set(states)
        left = [*reached]
        while left:
            state = left.pop()
            test = self.tests[state]
            if isinstance(test, str) and open_now[test]:
                new = [each for each in self.after[state] if each not in reached]
                reached.update(new)
                left += new
        return frozenset(reached)


def _compiled(pattern: str) -> _Plain | _Automaton:
    if len(pattern) > LONGEST:
        raise Refused(f"a pattern of {len(pattern):,} characters, more than {LONGEST:,}")
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as problem:
        raise Refused("no regular expression") from problem
    if _PLAIN.fullmatch(pattern):
        return _Plain(len(pattern) - pattern.count("\\"), expression)
    reader = _Reader(f"(?:(?:.*\\.)?(?:{pattern})$)")
    automaton = _Automaton()
    start = automaton.add(_GO)
    try:
        end = reader.alternatives(automaton, start)
    except RecursionError as problem:
        raise Refused("groups nested too deep") from problem
    if reader.left:
        raise Refused(f"a pattern that goes on with {reader.left[:20]!r}")
    automaton.after[end].append(automaton.add(_GO))
    return automaton


class _Reader:
    """Reads a pattern from its beginning, and adds what it says to an automaton: each method begins after a
    state and returns the one that it ends with.
    """

    def __init__(self, pattern: str) -> None:
        self.left = pattern

    def alternatives(self, to: _Automaton, start: int) -> int:
        end = to.add(_GO)
        while True:
            to.after[self._sequence(to, start)].append(end)
            if not self._skips("|"):
                return end

    def _sequence(self, to: _Automaton, start: int) -> int:
        while self.left and self.left[0] not in "|)":
            entry = to.add(_GO)  # a state of its own: repeats come back to it
            to.after[start].append(entry)
            pattern, end = self.left, self._atom(to, entry)
            start = self._repeated(pattern, to, entry, end)
        return start

    def _atom(self, to: _Automaton, start: int) -> int:
        if self.left[0] == "(":
            group = re.match(r"\((\?:|\?P<\w+>|(?!\?))", self.left)
            if group is None:
                raise Refused(f"a group that begins with {self.left[:4]!r}")
            self.left = self.left[group.end() :]
            inner = to.add(_GO)
            to.after[start].append(inner)
            end = self.alternatives(to, inner)
            self._skips(")")
            return end
        if self.left[0] in "^$":
            test: re.Pattern[str] | str = self.left[0]
            self.left = self.left[1:]
        else:
            test = self._character()
        state = to.add(test)
        to.after[start].append(state)
        end = to.add(_GO)
        to.after[state].append(end)
        return end

    def _character(self) -> re.Pattern[str]:
        special = {"\\": _ESCAPE, "[": _SET}.get(self.left[0])
        found = special.match(self.left) if special else None
        if special and found is None:
            raise Refused(f"{self.left[:2]!r} in a pattern")
        text = found[0] if found else self.left[0]
        self.left = self.left[len(text) :]
        return re.compile(text if found or text == "." else re.escape(text))

    def _repeated(self, pattern: str, to: _Automaton, start: int, end: int) -> int:
        """What follows an atom that was read once: the atom again as often as a repeat says."""
        counts = self._counts()
        if counts is None:
            return end
        fewest, most = counts
        self._skips("?")  # as few as possible: what matches stays the same
        rest, entry = self.left, start
        ends = [start] if fewest == 0 else []
        for number in range(2, max(fewest, most or 1) + 1):
            if number > fewest:
                ends.append(end)
            entry, self.left = end, pattern
            end = self._atom(to, entry)
        self.left = rest
        if most is None:
            to.after[end].append(entry)
        out = to.add(_GO)
        for each in (*ends, *([] if most == 0 else [end])):
            to.after[each].append(out)
        return out

    def _counts(self) -> tuple[int, int | None] | None:
        """The fewest and the most repeats, if a repeat follows; None for the most is without end."""
        known: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self.left and self.left[0] in known:
            counts = known[self.left[0]]
            self.left = self.left[1:]
        else:
            found = _COUNTS.match(self.left)
            if found is None or (found[0] in ("{}", "{,}") and not found[2]):
                return None
            fewest = min(int(found[1] or 0), MOST_STATES + 1)
            most = min(int(found[3]), MOST_STATES + 1) if found[3] else None
            counts = (fewest, most if found[2] else fewest)
            self.left = self.left[found.end() :]
        if self.left.startswith("+"):
            raise Refused("a repeat that gives nothing back")
        return counts

    def _skips(self, text: str) -> bool:
        skips = self.left.startswith(text)
        self.left = self.left[len(text) :] if skips else self.left
        return skips

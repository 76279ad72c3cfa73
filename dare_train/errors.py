"""Every error this package raises on purpose, as one tree.

    DareError                       catch this to catch them all
    ├── ConfigError                 an argument is wrong or two arguments conflict     (exit code 2)
    ├── OutputExists                the place to write to is taken                     (exit code 2)
    ├── StorageError                the disk did not take what was written             (exit code 1)
    ├── DeviceMemoryError           a device has too little memory; nothing was changed (exit code 1)
    ├── HubError                    the Hub refused, or cannot be reached          (exit code 1)
    ├── RankError                   another process of the job failed, or is gone      (that one's exit code)
    └── DataError                   the data said no                                   (exit code 1)
        ├── CheckpointError         a checkpoint cannot be read
        ├── TensorMismatch          a tensor is missing, extra, or has another shape
        ├── BaseMismatch            this is not the base the package was made from
        │   └── DtypeMismatch       ... but it may be the same base in another dtype
        ├── ChainError              packages in an order that does not fit
        ├── NonFiniteDelta          a delta holds NaN or infinity
        ├── PackageError            a package is incomplete, corrupt or malformed
        ├── ResultMismatch          applying did not arrive at the recorded bits
        └── SnapshotError           a snapshot could not be taken or written

Each message is one line: the thing, what was expected, what was found, what to do.
"""

from __future__ import annotations

import reprlib
from typing import Any


class DareError(Exception):
    """Base class. `name` is the tensor, file or argument at fault; the other parts complete the sentence."""

    exit_code = 1

    def __init__(self, name: str, *, expected: object = None, found: object = None, remedy: str = "") -> None:
        self.name = name
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        facts = [f"expected {_said(self.expected)}"] if self.expected is not None else []
        facts += [f"found {_said(self.found)}"] if self.found is not None else []
        sentence = f"{self.name}: {', '.join(facts)}" if facts else self.name
        return _one_line(f"{sentence}; {self.remedy}" if self.remedy else sentence)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.name, self.expected, self.found, self.remedy), vars(self)


def printable(text: str, longest: int = 10_000) -> str:
    """A text of a stranger's, for people: nothing in it breaks the line, gives the terminal orders, turns the
    writing round, or goes on without end. What is longer than `longest` is cut in the middle.
    """
    text = _cut(text, longest)
    if text.isascii() and text.isprintable():
        return text
    return _cut("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text), longest)


def brief(value: object, longest: int = 80) -> str:
    """A value of a stranger's as a literal, for people: of containers the beginning, of texts the ends."""
    return printable(_Brief(longest).repr(value), longest)


class _Brief(reprlib.Repr):
    def __init__(self, longest: int) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 6
        self.maxstring = self.maxother = longest

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 200 else "a huge number"

    def repr_str(self, x: str, level: int) -> str:
        return repr(_cut(x, self.maxstring))

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """In the order of the file: its keys may be of kinds that do not compare."""
        if not level:
            return "{...}" if x else "{}"
        shown = [
            f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in [*x][: self.maxdict]
        ]
        return "{" + ", ".join([*shown, "..."] if len(x) > self.maxdict else shown) + "}"


def _said(value: object) -> str:
    return value if isinstance(value, str) else brief(value, 300)


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end - 3]} … {text[len(text) - end :]}"


def _one_line(text: str) -> str:
    return printable(text, 900)


def _rebuild(kind: type[DareError], name: str, expected: object, found: object, remedy: str) -> DareError:
    return kind(name, expected=expected, found=found, remedy=remedy)


class ConfigError(DareError, ValueError):
    exit_code = 2


class OutputExists(DareError, FileExistsError):
    exit_code = 2


class StorageError(DareError, OSError):
    pass


class DeviceMemoryError(DareError, MemoryError):
    pass


class HubError(DareError):
    pass


class RankError(DareError):
    """`exit_code` is that of the failure on the other rank."""

    def __init__(
        self,
        name: str,
        *,
        expected: object = None,
        found: object = None,
        remedy: str = "",
        exit_code: int = 1,
    ) -> None:
        super().__init__(name, expected=expected, found=found, remedy=remedy)
        self.exit_code = exit_code


class DataError(DareError):
    pass


class CheckpointError(DataError):
    pass


class TensorMismatch(DataError):
    pass


class BaseMismatch(DataError):
    pass


class DtypeMismatch(BaseMismatch):
    pass


class ChainError(DataError):
    pass


class NonFiniteDelta(DataError):
    pass


class PackageError(DataError):
    pass


class ResultMismatch(DataError):
    pass


class SnapshotError(DataError):
    pass

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
        facts = [f"expected {self.expected}"] if self.expected is not None else []
        facts += [f"found {self.found}"] if self.found is not None else []
        sentence = f"{self.name}: {', '.join(facts)}" if facts else self.name
        return _one_line(f"{sentence}; {self.remedy}" if self.remedy else sentence)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.name, self.expected, self.found, self.remedy), vars(self)


def printable(text: str) -> str:
    """Names come from strangers' files: nothing in them may break the line, the terminal or the log."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _one_line(text: str) -> str:
    clean = printable(text)
    return clean if len(clean) <= 900 else f"{clean[:600]} … {clean[-200:]}"


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

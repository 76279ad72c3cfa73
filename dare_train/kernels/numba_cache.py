"""Kernels as machine code: Numba makes it once per machine, later processes load it without Numba.

Importing Numba and restoring its functions takes longer than all else that a small command does. So what it
compiled is kept as object files, one for each kernel and types of arguments, named by everything that they
depend on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import printable
from .code_folder import CodeFolder, Unsafe

Scalar = np.generic | int
Native = Callable[..., int]

_SCALARS: dict[str, Any] = {
    "u1": ctypes.c_uint8, "u2": ctypes.c_uint16, "u4": ctypes.c_uint32, "u8": ctypes.c_uint64,
    "i8": ctypes.c_int64, "f4": ctypes.c_float, "f8": ctypes.c_double,
}  # fmt: skip
_ARRAY = [
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
]
"""A one-dimensional array as Numba takes it: owner, parent, elements, bytes per element, data, shape,
strides."""

_lock = threading.Lock()


class Part:
    """A function that kernels call; it becomes a part of their machine code."""

    def __init__(self, function: Callable[..., Any]) -> None:
        assert isinstance(function, FunctionType)
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        """What it computes, in Python; within a kernel it is compiled."""
        return self.function(*arguments)

    def parts(self) -> dict[str, Part]:
        """The parts that it calls, by the names it calls them."""
        called = {name: self.function.__globals__.get(name) for name in self.function.__code__.co_names}
        return {name: part for name, part in called.items() if isinstance(part, Part)}


class Kernel(Part):
    """A function of contiguous arrays and scalars that runs as machine code, without the interpreter's lock.

    It is compiled separately for each combination of argument types: arrays and numpy scalars by dtype, `int`
    as int64. It may neither allocate nor raise, and returns nothing, or an int64 if it is annotated with `->
    int`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._natives: dict[tuple[str, ...], Native] = {}

    def __call__(self, *arguments: NDArray[Any] | Scalar) -> int:
        """Run it on contiguous one-dimensional arrays and scalars."""
        kinds: list[str] = []
        flat: list[Any] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                kinds.append(_type_of(argument))
                size = argument.size
                width = argument.itemsize
                flat += (None, None, size, width, _address(argument), size, width)
            elif isinstance(argument, int):
                kinds.append("i8")
                flat.append(argument)
            else:
                kinds.append(argument.dtype.str[1:])
                flat.append(argument.item())
        types = tuple(kinds)
        return (self._natives.get(types) or self._load(types))(*flat)

    def _load(self, types: tuple[str, ...]) -> Native:
        with _lock:
            if types not in self._natives:
                symbol = "_".join([self.function.__name__.strip("_"), *types])
                address = _machine().address(symbol, lambda: self._compile(types, symbol))
                flat: list[Any] = [
                    kind for code in types for kind in (_ARRAY if code[0] == "p" else [_SCALARS[code]])
                ]
                self._natives[types] = ctypes.CFUNCTYPE(ctypes.c_int64, *flat)(address)
        return self._natives[types]

    def _compile(self, types: tuple[str, ...], symbol: str) -> bytes:
        _announce()
        from .numba_compile import object_code

        return object_code(self, types, symbol)


def kernel(function: Callable[..., Any]) -> Kernel:
    """Make a `Kernel` of a function."""
    return Kernel(function)


def inlined(function: Callable[..., Any]) -> Part:
    """Make a `Part` of a function: its callers' loops see through it, so that they are vectorised."""
    return Part(function)


_ARRAYS = {char: f"p{np.dtype(char).str[1:]}" for char in "?bBhHiIlLqQefd"}


def _type_of(array: NDArray[Any]) -> str:
    """For instance "pu2" of an array of uint16."""
    if not array.flags.c_contiguous or array.ndim != 1:
        raise ValueError(
            "kernels take contiguous arrays of one dimension, found shape "
            f"{array.shape}, strides {array.strides}"
        )
    return _ARRAYS[array.dtype.char]


def _address(array: NDArray[Any]) -> int:
    """Of its first element; `array.ctypes.data` takes three times as long."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # it is read-only, or empty
        return array.ctypes.data


class _Machine:
    """Holds this process's machine code and the folder of object files that it came from."""

    def __init__(self) -> None:
        import llvmlite
        from llvmlite import binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        triple = llvm.get_process_triple()
        cpu = llvm.get_host_cpu_name()
        features = llvm.get_host_cpu_features().flatten()
        sources = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
        depends_on = "\0".join([llvmlite.__version__, triple, cpu, features, *sources])
        key = hashlib.sha256(depends_on.encode()).hexdigest()[:16]
        root = _cache_folder()
        self._kept = None if root is None else CodeFolder(root, key)
        self._llvm = llvm
        machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, jit=True)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(f'target triple = "{triple}"'), machine)

    def address(self, symbol: str, compile: Callable[[], bytes]) -> int:
        """Where the code of a symbol lies, compiled unless an earlier process did."""
        code = self._read(f"{symbol}.o")
        if code is None:
            code = compile()
            self._keep(f"{symbol}.o", code)
        self._engine.add_object_file(self._llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        return int(self._engine.get_function_address(symbol))

    def _read(self, name: str) -> bytes | None:
        try:
            return None if self._kept is None else self._kept.read(name)
        except (Unsafe, OSError) as error:
            self._do_without(error)
            return None

    def _keep(self, name: str, code: bytes) -> None:
        try:
            if self._kept is not None:
                self._kept.keep(name, code)
        except (Unsafe, OSError) as error:
            self._do_without(error)

    def _do_without(self, error: Exception) -> None:
        self._kept = None
        _not_kept(str(error))


@functools.cache
def _machine() -> _Machine:
    return _Machine()


def _cache_folder() -> Path | None:
    """None where there is no place for one: a container's user may have no home."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(os.environ.get("DARE_TRAIN_CACHE") or Path(home) / "dare_train").expanduser()
    except RuntimeError:
        _not_kept("there is no home folder")
        return None


def _not_kept(reason: str) -> None:
    _say(
        f"cannot keep compiled kernels ({printable(reason)}); every process compiles them. Set "
        "DARE_TRAIN_CACHE to a folder that only you can write."
    )


@functools.cache
def _announce() -> None:
    _say("compiling CPU kernels, once on this machine (a few seconds) ...")


@functools.cache
def _say(sentence: str) -> None:
    print(f"dare_train: {sentence}", file=sys.stderr)

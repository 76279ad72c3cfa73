"""What Numba does for `compiled`: object code of a kernel for given types of arguments. Imported only to
compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Protocol

import llvmlite.binding as llvm
import numpy as np
from numba import cfunc, config, from_dtype, njit, types

_OPTIONS = {"error_model": "numpy"}
"""Division by zero gives what numpy gives: kernels do not raise."""


class Part(Protocol):
    """A function and the parts it calls, by the names it calls them."""

    function: FunctionType

    def parts(self) -> dict[str, Any]: ...


def object_code(kernel: Part, argument_types: tuple[str, ...], symbol: str) -> bytes:
    """An object file with one function of that name, which needs nothing that is not in it.

    Raises RuntimeError if the kernel allocates or raises.
    """
    result = types.int64 if "return" in kernel.function.__annotations__ else types.void
    with _wide_vectors():
        entry = cfunc(result(*map(_numba_type, argument_types)), **_OPTIONS)(_resolved(kernel))
    module = llvm.parse_assembly(entry.inspect_llvm())
    for value in [*module.functions, *module.global_variables]:
        if value.name == entry.native_name:
            value.name = symbol
        elif not value.is_declaration:
            value.linkage = "internal"
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_features(), opt=3, jit=True
    )
    _drop_error_paths(module, machine)
    needed = [
        function.name
        for function in module.functions
        if function.is_declaration and not function.name.startswith("llvm.")
    ]
    if needed:
        raise RuntimeError(f"the kernel {symbol} allocates or may raise: it calls {', '.join(needed)}")
    code: bytes = machine.emit_object(module)
    return code


def _features() -> str:
    """What the processor has; with the wish for vectors of 512 bits where these do not slow it down: from
    Intel's Ice Lake on.

    LLVM does without them on all of Intel's. They make masks and fingerprints half again as fast there.
    """
    features: str = llvm.get_host_cpu_features().flatten()
    return f"{features},-prefer-256-bit" if "+avx512vbmi2" in features.split(",") else features


@contextmanager
def _wide_vectors() -> Iterator[None]:
    """As if NUMBA_CPU_FEATURES were set, unless it is. Numba looks once, before it first compiles anything in
    a process.
    """
    before = config.CPU_FEATURES
    config.CPU_FEATURES = _features() if before is None else before
    try:
        yield
    finally:
        config.CPU_FEATURES = before


def _numba_type(code: str) -> types.Type:
    if code.startswith("p"):
        return types.Array(from_dtype(np.dtype(code[1:])), 1, "C")
    return from_dtype(np.dtype(code))


def _resolved(part: Part) -> FunctionType:
    """The function with the parts that it calls in the form that Numba compiles."""
    function = part.function
    compilable = {
        name: njit(_resolved(called), forceinline=True, **_OPTIONS) for name, called in part.parts().items()
    }
    return FunctionType(function.__code__, {**function.__globals__, **compilable}, function.__name__)


def _drop_error_paths(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Remove what Numba added in case a function raises: none does, which the optimiser proves by itself."""
    passes = llvm.create_new_module_pass_manager()
    add: list[Callable[[], None]] = [
        passes.add_ipsccp_pass,
        passes.add_simplify_cfg_pass,
        passes.add_global_dead_code_eliminate_pass,
    ]
    for step in add:
        step()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3)))

"""Triton's interpreter without what it does in vain, which is most of what it does with blocks of this size.

Imported where there is no GPU, before a test starts kernels; made for the Triton of constraints.txt, whose
private names it uses. What kernels compute, and what is checked while they do, stays as it is: results are
the same words, and the same errors are raised.

* Each call of one jitted function from another looks through all of `triton.language` for operations to
  replace by the interpreter's own. They are found once here, and replaced once in each launch.
* Each sum and product of integers is computed a second time, in 64 bits, and compared with what the type
  holds: for an assertion that is made with `debug=True` alone, which the interpreter never is.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_OPERATIONS = {
    place: [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]
    for place in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
}
"""By where they are, while none is replaced."""


def _replace_operations(place: Any, builder: Any, scope: Any) -> None:
    for name in _OPERATIONS[place]:
        member = getattr(place, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(place, name, member, builder, scope)


_replace_language = interpreter._patch_lang
_done: set[int] = set()
"""Whose globals have seen the interpreter's operations in the launch that runs."""


class _Launch(interpreter._LangPatchScope):
    """What the outermost function undoes at the end."""

    def restore(self) -> None:
        _done.clear()
        super().restore()


def _replace_language_once(function: FunctionType) -> Any:
    outermost, module = not _done, id(function.__globals__)
    if module in _done:
        return interpreter._LangPatchScope()
    scope = _replace_language(function)
    _done.add(module)
    if outermost:
        launch = _Launch()
        launch._changes = scope._changes
        return launch
    return scope


def _hasten() -> None:
    options = interpreter.interpreter_builder.options
    assert not options.debug, "overflows are looked for after all"
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    interpreter._patch_builtin = _replace_operations
    interpreter._patch_lang = _replace_language_once


_hasten()

"""A quicker interpreter of Triton, which gives the same results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any


def speed_up() -> None:
    """Takes out of Triton's interpreter what it does for nothing: half of the time that the interpreted tests take.

    - It replaces the language's functions by its own before a kernel runs and puts them back after it. At each call of
      another `triton.jit` function it goes through all of them again, and finds them replaced.
    - After each integer operation it works out whether that overflowed, and drops the answer: that would be an
      assertion, which is for debugging alone. As compiled kernels do not ask either, it is not asked.
    - It makes its table of types anew each time it looks one up.

    Does nothing where there is no Triton, or one of other insides.
    """
    try:
        import triton.language as tl  # noqa: PLC0415  (not on every platform)
        from triton.runtime import interpreter  # noqa: PLC0415
    except ModuleNotFoundError:
        return
    if hasattr(interpreter, "_LangPatchScope"):
        _patch_the_language_once(interpreter, tl)
    if hasattr(interpreter, "interpreter_builder"):
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if hasattr(interpreter, "_get_np_dtype"):
        _keep_the_types(interpreter, tl)


def _patch_the_language_once(interpreter: Any, tl: Any) -> None:
    patch: Callable[[Any], Any] = interpreter._patch_lang

    def patch_where_needed(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_where_needed


def _keep_the_types(interpreter: Any, tl: Any) -> None:
    look_up: Callable[[Any], Any] = interpreter._get_np_dtype
    of_a_number = functools.cache(look_up)

    def numpy_type(of: Any) -> Any:
        scalar = of.element_ty if isinstance(of, tl.block_type) else of
        return look_up(scalar) if isinstance(scalar, tl.pointer_type) else of_a_number(scalar)

    interpreter._get_np_dtype = numpy_type

"""A quicker start of Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def patch_the_language_once() -> None:
    """Has the interpreter look through Triton's language once for a kernel, not again for each function it calls.

    It replaces the language's functions by its own before a kernel runs and puts them back after it. At each call of
    another `triton.jit` function it goes through all of them again, finds them replaced, and has taken a quarter of
    the time that the interpreted tests take. Does nothing where there is no Triton, or one of other insides.
    """
    try:
        import triton.language as tl  # noqa: PLC0415  (not on every platform)
        from triton.runtime import interpreter  # noqa: PLC0415
    except ModuleNotFoundError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch: Callable[[Any], Any] = interpreter._patch_lang

    def patch_where_needed(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_where_needed

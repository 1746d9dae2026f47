"""Triton's interpreter without the work that it repeats, which is half of its time.

A kernel's call of another `@triton.jit` function, `tl.sum` for one, replaces all of `triton.language` again, though it
stays replaced until the kernel's last program ends. What numpy calls a type is found through a table that is built for
each question. And sums and products of int32 are computed in int64 too, for an assertion that is off. Results are the
same to the bit (tests/tools/test_interpreter.py). In a version of Triton that has other parts nothing is changed.
"""

import dataclasses
import functools

from triton import language as tl
from triton.runtime import interpreter


class _ReplacedOnce:
    """`_patch_lang`, which does nothing for a module that is replaced already."""

    def __init__(self, replace):
        self.replace = replace
        self.replaced: set[str] = set()  # while a kernel runs
        self.modules_of: dict[object, frozenset[str]] = {}

    def __call__(self, fn):
        if (modules := self.modules_of.get(fn)) is None:
            values = fn.__globals__.values()
            modules = frozenset(m.__name__ for m in (tl, tl.core) if any(value is m for value in values))
            self.modules_of[fn] = modules
        if modules and modules <= self.replaced:
            return interpreter._LangPatchScope()  # nothing to put back
        scope = self.replace(fn)
        if not self.replaced:
            scope.restore = self._restores(scope.restore)
        self.replaced |= modules
        return scope

    def _restores(self, restore):
        def restores():
            self.replaced.clear()
            restore()

        return restores


def _np_dtype(of, known: dict):
    @functools.wraps(of)
    def np_dtype(type):
        scalar = type.scalar.name
        if scalar not in known:
            known[scalar] = of(type)
        return known[scalar]

    return np_dtype


def without_repeated_work() -> None:
    """Make it so for this process."""
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _ReplacedOnce(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _np_dtype(interpreter._get_np_dtype, {})
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if dataclasses.is_dataclass(options) and not options.debug and hasattr(options, "sanitize_overflow"):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)

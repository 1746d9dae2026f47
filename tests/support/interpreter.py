"""Triton's interpreter without the work that it repeats, which is three quarters of its time.

A kernel's call of another `@triton.jit` function, `tl.sum` for one, replaces all of `triton.language` again, though it
stays replaced until the kernel's last program ends. What numpy calls a type is found through a table that is built for
each question. And sums and products of int32 are computed in int64 too, for an assertion that is off.

Of Triton 3.7 more is left out. Each block has a type of its own and its shape as new constants, with all checks of a
shape; types are the same objects here where they are equal. Operands are cast to the type that they have. And a kernel
looks through all modules for the operations to replace. Results are the same to the bit
(tests/tools/test_interpreter.py). In a version of Triton that has other parts nothing is changed.
"""

import dataclasses
import functools
import inspect

import numpy as np
import triton
from triton import language as tl
from triton.language import core
from triton.runtime import interpreter

REPLACED: list[tuple[object, str, object]] = []  # an object, the name of its part, and the part before


def _replace(of: object, name: str, by: object) -> None:
    REPLACED.append((of, name, getattr(of, name)))
    setattr(of, name, by)


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


class _Alike:
    """What follows from types: once for all that are alike. Each key is of ids, and its values hold what has them."""

    def __init__(self):
        self.made: dict[object, tuple] = {}

    def keep(self, key: object, *made: object) -> None:
        if len(self.made) > 20_000:  # pointers' types are made anew for each launch
            self.made.clear()
        self.made[key] = made


def _types_once(alike: _Alike) -> None:
    """Types of blocks, and what the tensors of a type have in common: none of it is changed after it is made."""
    block, make_type, make_tensor = core.block_type, core.block_type.__init__, core.tensor.__init__
    to_ir, with_element_ty = block.to_ir, block.with_element_ty
    made = alike.made

    def key(element_ty, shape):
        sizes = [s.value if type(s) is core.constexpr else s for s in shape]
        return (id(element_ty), *[s if type(s) is int else None for s in sizes])

    def new_type(cls, *args, **options):
        if cls is block and len(args) == 2 and type(args[1]) in (list, core.tuple):
            known = made.get(key(*args))
            if known is not None:
                return known[0]
        return object.__new__(cls)

    def init_type(self, element_ty, shape):
        if "numel" not in self.__dict__:
            make_type(self, element_ty, shape)
            if type(self) is block:
                alike.keep(key(element_ty, self.shape), self)

    def type_to_ir(self, builder):
        if builder is not interpreter.interpreter_builder:
            return to_ir(self, builder)
        known = made.get(("ir", id(self)))
        if known is None:
            known = to_ir(self, builder), self
            alike.keep(("ir", id(self)), *known)
        return known[0]

    def of_element_type(self, scalar_ty):
        return self if scalar_ty is self.element_ty else with_element_ty(self, scalar_ty)

    def init_tensor(self, handle, type):
        known = made.get(id(type))
        if known is None:
            make_tensor(self, handle, type)
            common = {name: value for name, value in self.__dict__.items() if name != "handle"}
            if common.get("type") is type:
                alike.keep(id(type), common)
            return
        self.__dict__.update(known[0])
        self.handle = handle

    _replace(block, "__new__", new_type)
    _replace(block, "__init__", init_type)
    _replace(block, "to_ir", type_to_ir)
    _replace(block, "with_element_ty", of_element_type)
    _replace(core.tensor, "__init__", init_tensor)


def _unwraps_at_once(unwrap):
    constexpr, others = core.constexpr, (core.tensor, int, bool, float, str, type(None))

    @functools.wraps(unwrap)
    def unwrap_if_constexpr(o):
        kind = type(o)
        if kind is constexpr:
            return o.value
        return o if kind in others else unwrap(o)

    return unwrap_if_constexpr


class _Semantic:
    """What an operation makes of its operands, without the steps that change nothing for types that are alike."""

    def __init__(self, semantic, alike: _Alike):
        self.semantic, self.builder, self.alike = semantic, semantic.builder, alike
        self.check, self.broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
        self.constant = semantic.scalar_constant
        self.signed = {id(t): t for t in (tl.int32, tl.int64)}
        self.wide = {id(t): t for t in (tl.float32, tl.float64)}
        self.narrow = {id(t): t for t in (tl.float16, tl.bfloat16)}
        self.of_numpy = {id(getattr(tl, name)): getattr(np, name) for name in ("int32", "int64", "float32", "float64")}

    def install(self) -> None:
        _replace(self.semantic, "binary_op_type_checking_impl", self.checked)
        _replace(self.semantic, "broadcast_impl_value", self.broadcasted)
        _replace(self.semantic, "scalar_constant", self.scalar)

    def scalar(self, value, dtype):
        of_numpy = self.of_numpy.get(id(dtype))
        if of_numpy is None:
            return self.constant(value, dtype)
        return core.tensor(interpreter.TensorHandle(np.array([value or 0], dtype=of_numpy), dtype), dtype)

    def broadcasted(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a is b:
            return lhs, rhs
        known = self.alike.made.get((id(a), id(b)))
        if known is None:
            both = self.broadcast(lhs, rhs)
            if not a.is_block() or not b.is_block() or len(a.shape) == len(b.shape):
                self.alike.keep((id(a), id(b)), both[0].type, both[1].type, a, b)
            return both
        return self.of_type(lhs, known[0]), self.of_type(rhs, known[1])

    def of_type(self, tensor, type):
        if tensor.type is type:
            return tensor
        if tensor.type.is_block():
            return core.tensor(self.builder.create_broadcast(tensor.handle, type.shape.values), type)
        return core.tensor(self.builder.create_splat(type.to_ir(self.builder), tensor.handle), type)

    def checked(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        if type(lhs) is core.tensor:
            kind = id(lhs.dtype)
            is_kept = kind in self.signed or kind in self.wide or (kind in self.narrow and not div_or_mod)
            if type(rhs) is core.tensor:
                if lhs.dtype is rhs.dtype and is_kept:
                    return self.broadcasted(lhs, rhs)
                if allow_lhs_ptr and lhs.dtype.is_ptr() and id(rhs.dtype) in self.signed:
                    return self.broadcasted(lhs, rhs)
            elif is_kept and arithmetic_check and self.fits(rhs, kind):
                return self.broadcasted(lhs, self.scalar(rhs, lhs.dtype))
        return self.check(lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def fits(self, number, kind: int) -> bool:
        """Whether a number beside a tensor of this type becomes one of the type."""
        if kind not in self.signed:
            return type(number) is float or (type(number) is int and -(2**31) <= number < 2**31)
        limit = 1 << self.signed[kind].int_bitwidth - 1
        return type(number) is int and -limit <= number < limit


def _patch_builtin():
    """The function of this name, which looks through a module or class for its operations once."""
    checks = core.builtin(lambda: None).__code__
    operations: dict[object, list] = {}

    def replacing(member):
        # without a check of what the interpreter gives it
        fn = member.__wrapped__ if getattr(member, "__code__", None) is checks else member

        def run(*args, **options):
            options["_semantic"] = interpreter.interpreter_semantic
            return fn(*args, **options)

        return run

    def patch_builtin(pkg, builder, scope):
        if pkg not in operations:
            members = [(name, member) for name, member in inspect.getmembers(pkg) if core.is_builtin(member)]
            operations[pkg] = [(name, member, replacing(member)) for name, member in members]
        for name, member, run in operations[pkg]:
            if getattr(pkg, name) is member:
                scope.set_attr(pkg, name, run)

    return patch_builtin


def _create_splat(self, ret_ty, arg):
    shape, dtype = tuple(ret_ty.shape), interpreter._get_np_dtype(arg.dtype)
    data = arg.data[0] if isinstance(arg.dtype, core.block_type) else arg.data
    return interpreter.TensorHandle(np.full(shape, data, dtype=dtype), arg.dtype.scalar)


def _init_handle(self, data, dtype, attr=None):
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    if type(dtype) is not core.dtype or data.itemsize * 8 > dtype.primitive_bitwidth:
        self.__post_init__()


def _numbers_of_one(patch):
    """numpy 2.4 takes no array of one number for a number, as Triton 3.6 does."""

    @functools.wraps(patch)
    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch_tensor


def without_repeated_work() -> None:
    """Make it so for this process, once."""
    if REPLACED:
        return
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        _replace(interpreter, "_patch_lang", _ReplacedOnce(interpreter._patch_lang))
    if hasattr(interpreter, "_get_np_dtype"):
        _replace(interpreter, "_get_np_dtype", _np_dtype(interpreter._get_np_dtype, {}))
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if dataclasses.is_dataclass(options) and not options.debug and hasattr(options, "sanitize_overflow"):
        _replace(builder, "options", dataclasses.replace(options, sanitize_overflow=False))
    if triton.__version__.startswith("3.6."):
        _replace(interpreter, "_patch_lang_tensor", _numbers_of_one(interpreter._patch_lang_tensor))
    if not triton.__version__.startswith("3.7."):
        return
    alike = _Alike()
    _types_once(alike)
    _Semantic(interpreter.interpreter_semantic, alike).install()
    _replace(core, "_unwrap_if_constexpr", _unwraps_at_once(core._unwrap_if_constexpr))
    _replace(interpreter, "_patch_builtin", _patch_builtin())
    _replace(interpreter.InterpreterBuilder, "create_splat", _create_splat)
    _replace(interpreter.TensorHandle, "__init__", _init_handle)

"""Short vectors of float32 for compiled functions, and how functions are compiled.

A compiler that cannot tell whether two arrays overlap leaves loops over a handful of labels scalar. Here
vectors are values: ``load`` makes one, ``+ - * /`` and the functions below work on all its lanes,
``store`` writes it back, and the compiler maps it to whatever the processor has.

A vector's width has to be known when a function is compiled. It travels as a ``Width``, a tuple
made by ``width``, of which only the length counts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

Width: TypeAlias = tuple[int, ...]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Emit: TypeAlias = Callable[..., ir.Value]
_Operation: TypeAlias = Callable[..., Any]

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)


def jit(function: _Function) -> _Function:
    """Compile on first call, without the GIL, and keep the result on disk where that is possible.

    Numba looks for a place when a function is decorated, first beside the source, then in the
    user's cache folder, and raises where neither can be written. A slow start is better than none.
    """
    try:
        compiled = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        compiled = numba.njit(nogil=True)(function)
    return cast(_Function, compiled)


def width(lanes: int) -> Width:
    """Return the ``Width`` of vectors with that many lanes, a power of two."""
    return (0,) * lanes


class Vector(types.Type):  # type: ignore[misc]
    """Numba's view of a vector: a type with a number of lanes."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Vector({lanes})")


@register_model(Vector)  # type: ignore[misc]
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:  # noqa: ANN401
        super().__init__(manager, vector, _floats(vector.lanes))


def _floats(lanes: int) -> ir.VectorType:
    return ir.VectorType(_FLOAT, lanes)


def _ints(lanes: int) -> ir.VectorType:
    return ir.VectorType(_INT, lanes)


def _constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> ir.Value:  # noqa: ANN401
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


# --- memory


@intrinsic
def load(_typing: Any, array: Any, start: Any, like: Any) -> Any:  # noqa: ANN401
    """Return ``array[start : start + len(like)]`` as a vector; ``array`` is flat."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:  # noqa: ANN401
        address = _address(context, builder, signature.args[0], args[0], args[1])
        pointer = builder.bitcast(address, _floats(like.count).as_pointer())
        return builder.load(pointer, align=4)

    return Vector(like.count)(array, types.int64, like), emit


@intrinsic
def store(_typing: Any, array: Any, start: Any, vector: Any) -> Any:  # noqa: ANN401
    """Write a vector to ``array[start : start + lanes]``; ``array`` is flat."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:  # noqa: ANN401
        address = _address(context, builder, signature.args[0], args[0], args[1])
        pointer = builder.bitcast(address, _floats(vector.lanes).as_pointer())
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, vector), emit


@intrinsic
def load_strided(_typing: Any, array: Any, start: Any, stride: Any, like: Any) -> Any:  # noqa: ANN401
    """Return ``array[start], array[start + stride], ...`` as a vector; ``array`` is flat."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:  # noqa: ANN401
        vector = ir.Constant(_floats(like.count), ir.Undefined)
        index = args[1]
        for lane in range(like.count):
            value = builder.load(_address(context, builder, signature.args[0], args[0], index))
            vector = builder.insert_element(vector, value, _INT(lane))
            index = builder.add(index, args[2])
        return vector

    return Vector(like.count)(array, types.int64, types.int64, like), emit


@intrinsic
def store_strided(_typing: Any, array: Any, start: Any, stride: Any, vector: Any) -> Any:  # noqa: ANN401
    """Write a vector to ``array[start], array[start + stride], ...``; ``array`` is flat."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> ir.Value:  # noqa: ANN401
        index = args[1]
        for lane in range(vector.lanes):
            address = _address(context, builder, signature.args[0], args[0], index)
            builder.store(builder.extract_element(args[3], _INT(lane)), address)
            index = builder.add(index, args[2])
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64, vector), emit


@intrinsic
def fill(_typing: Any, value: Any, like: Any) -> Any:  # noqa: ANN401
    """Return a vector with ``value`` in all lanes."""

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> ir.Value:  # noqa: ANN401
        undefined = ir.Constant(_floats(like.count), ir.Undefined)
        first = builder.insert_element(undefined, args[0], _INT(0))
        return builder.shuffle_vector(first, undefined, _constant(_ints(like.count), 0))

    return Vector(like.count)(types.float32, like), emit


# --- arithmetic


def _unary(body: _Emit) -> _Operation:
    @intrinsic
    def operation(_typing: Any, a: Any) -> Any:  # noqa: ANN401
        def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> ir.Value:  # noqa: ANN401
            return body(builder, *args)

        return a(a), emit

    return cast(_Operation, operation)


def _binary(body: _Emit) -> _Operation:
    @intrinsic
    def operation(_typing: Any, a: Any, b: Any) -> Any:  # noqa: ANN401
        def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> ir.Value:  # noqa: ANN401
            return body(builder, *args)

        return a(a, b), emit

    return cast(_Operation, operation)


def _ternary(body: _Emit) -> _Operation:
    @intrinsic
    def operation(_typing: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ANN401
        def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> ir.Value:  # noqa: ANN401
            return body(builder, *args)

        return a(a, b, c), emit

    return cast(_Operation, operation)


def _multiply_add(builder: Any, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:  # noqa: ANN401
    return builder.fadd(builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])


def _round(builder: Any, a: ir.Value) -> ir.Value:  # noqa: ANN401
    signature = ir.FunctionType(a.type, [a.type])
    name = f"llvm.rint.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [a])


def _maximum(builder: Any, a: ir.Value, b: ir.Value) -> ir.Value:  # noqa: ANN401
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _less(builder: Any, a: ir.Value, b: ir.Value) -> ir.Value:  # noqa: ANN401
    return builder.uitofp(builder.fcmp_ordered("<", a, b), a.type)


def _where_equal(builder: Any, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:  # noqa: ANN401
    return builder.select(builder.fcmp_ordered("==", a, b), c, _constant(a.type, 0.0))


def _exp(builder: Any, a: ir.Value) -> ir.Value:  # noqa: ANN401
    # exp(a) = 2^n exp(r), |r| <= ln(2)/2: n goes to the exponent's bits, exp(r) is a polynomial.
    # ln 2 is split so that n times its first part is exact (Cody and Waite 1980).
    kind, whole = a.type, _ints(a.type.count)
    n = _round(builder, builder.fmul(a, _constant(kind, 1.4426950216293335)))
    r = _multiply_add(builder, n, _constant(kind, -0.693359375), a)
    r = _multiply_add(builder, n, _constant(kind, 2.1219444170128554e-4), r)
    value = _constant(kind, 1 / 720)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        value = _multiply_add(builder, value, r, _constant(kind, coefficient))
    exponent = builder.add(builder.fptosi(n, whole), _constant(whole, 127))
    power = builder.bitcast(builder.shl(exponent, _constant(whole, 23)), kind)
    negligible = builder.fcmp_ordered("<", a, _constant(kind, -50.0))
    return builder.select(negligible, _constant(kind, 0.0), builder.fmul(value, power))


fma = _ternary(_multiply_add)
"""a * b + c, rounded once or twice, as the processor likes."""
rint = _unary(_round)
"""Nearest whole number, halves to even."""
exp = _unary(_exp)
"""e^a for a <= 0, relative error below 3e-7; exactly 0 below -50, so that no denormals arise."""
maximum = _binary(_maximum)
less = _binary(_less)
"""1 where a < b, else 0."""
where_equal = _ternary(_where_equal)
"""c where a == b, else 0."""


def _make_operator(symbol: _Operation, body: _Emit) -> None:
    operation = _binary(body)

    @overload(symbol, strict=False)
    def implementation(a: Any, b: Any) -> _Operation | None:  # noqa: ANN401
        if isinstance(a, Vector) and a == b:
            return lambda a, b: operation(a, b)
        return None


_make_operator(operator.add, lambda builder, a, b: builder.fadd(a, b))
_make_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_make_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_make_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))

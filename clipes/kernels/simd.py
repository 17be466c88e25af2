"""Short vectors of float32 for compiled functions, and how functions are compiled.

A compiler that cannot tell whether two arrays overlap leaves loops over a handful of labels scalar.
Here vectors are values: ``load`` makes one, ``+ - * /`` and the functions below work on all its
lanes, ``store`` writes it back, and the compiler maps it to whatever the processor has.

A vector's width has to be known when a function is compiled. It travels as a ``Width``, a tuple
made by ``width``, of which only the length counts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import models, overload, register_model

Width: TypeAlias = tuple[int, ...]

_Untyped: TypeAlias = Any  # what numba and llvmlite hand around
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Operation: TypeAlias = Callable[..., Any]

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)


def jit(function: _Function) -> _Function:
    """Compile on first call, without the GIL, and keep the result on disk where that is possible.

    Numba looks for a place when a function is decorated, first beside the source, then in the
    user's cache folder, and raises where neither can be written. A slow start is better than none.
    Processes that start at once compile the same thing and replace each other's files, atomically.
    What is kept is looked up by the file the function stands in: after a change in here, remove it.
    """
    try:
        compiled = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        compiled = numba.njit(nogil=True)(function)
    return cast(_Function, compiled)


def width(lanes: int) -> Width:
    """Return the ``Width`` of vectors with that many lanes, a power of two."""
    return (0,) * lanes


class Vector(types.Type):
    """Numba's view of a vector.

    Attributes:
        lanes: How many numbers it holds.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Vector({lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: _Untyped, vector: Vector) -> None:
        super().__init__(manager, vector, _floats(vector.lanes))  # type: ignore[no-untyped-call]


def _intrinsic(build: Callable[..., _Untyped]) -> _Operation:
    return cast(_Operation, numba.extending.intrinsic(build))


def _floats(lanes: int) -> ir.VectorType:
    return ir.VectorType(_FLOAT, lanes)


def _ints(lanes: int) -> ir.VectorType:
    return ir.VectorType(_INT, lanes)


def _constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _variable(builder: _Untyped, value: ir.Value) -> ir.Value:
    place = cgutils.alloca_once_value(builder, value)  # type: ignore[no-untyped-call]
    builder.store(value, place)
    return place


def _splat(builder: _Untyped, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(first, undefined, _constant(_ints(kind.count), 0))


# --- memory


def _address(
    context: _Untyped, builder: _Untyped, kind: _Untyped, array: _Untyped, index: ir.Value
) -> ir.Value:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


@_intrinsic
def load(_typing: _Untyped, array: _Untyped, start: _Untyped, like: _Untyped) -> _Untyped:
    """Return ``array[start : start + len(like)]`` of a flat array as a vector."""

    def emit(context: _Untyped, builder: _Untyped, signature: _Untyped, args: _Untyped) -> ir.Value:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        pointer = builder.bitcast(address, _floats(like.count).as_pointer())
        return builder.load(pointer, align=4)

    return Vector(like.count)(array, types.int64, like), emit


@_intrinsic
def store(_typing: _Untyped, array: _Untyped, start: _Untyped, vector: _Untyped) -> _Untyped:
    """Write a vector to ``array[start : start + lanes]`` of a flat array."""

    def emit(context: _Untyped, builder: _Untyped, signature: _Untyped, args: _Untyped) -> ir.Value:
        address = _address(context, builder, signature.args[0], args[0], args[1])
        pointer = builder.bitcast(address, _floats(vector.lanes).as_pointer())
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, vector), emit


@_intrinsic
def load_strided(
    _typing: _Untyped, array: _Untyped, start: _Untyped, stride: _Untyped, like: _Untyped
) -> _Untyped:
    """Return ``array[start], array[start + stride], ...`` of a flat array as a vector."""

    def emit(context: _Untyped, builder: _Untyped, signature: _Untyped, args: _Untyped) -> ir.Value:
        vector, index = ir.Constant(_floats(like.count), ir.Undefined), args[1]
        for lane in range(like.count):
            value = builder.load(_address(context, builder, signature.args[0], args[0], index))
            vector = builder.insert_element(vector, value, _INT(lane))
            index = builder.add(index, args[2])
        return vector

    return Vector(like.count)(array, types.int64, types.int64, like), emit


@_intrinsic
def store_strided(
    _typing: _Untyped, array: _Untyped, start: _Untyped, stride: _Untyped, vector: _Untyped
) -> _Untyped:
    """Write a vector to ``array[start], array[start + stride], ...`` of a flat array."""

    def emit(context: _Untyped, builder: _Untyped, signature: _Untyped, args: _Untyped) -> ir.Value:
        index = args[1]
        for lane in range(vector.lanes):
            address = _address(context, builder, signature.args[0], args[0], index)
            builder.store(builder.extract_element(args[3], _INT(lane)), address)
            index = builder.add(index, args[2])
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64, vector), emit


@_intrinsic
def transpose_tile(
    _typing: _Untyped,
    a: _Untyped,
    a_start: _Untyped,
    a_row: _Untyped,
    b: _Untyped,
    b_start: _Untyped,
    b_row: _Untyped,
    lanes: _Untyped,
) -> _Untyped:
    """Write the transpose of a square as wide as a vector.

    With flat arrays, r and k < len(lanes)::

        b[b_start + k * b_row + r] = a[a_start + r * a_row + k]

    Rows of ``b`` are written first to last: where ``b_row`` is less than a vector, each cuts the
    one before to that length.
    """
    kind = _floats(lanes.count)

    def emit(context: _Untyped, builder: _Untyped, signature: _Untyped, args: _Untyped) -> ir.Value:
        def vector_at(array: int, index: ir.Value) -> ir.Value:
            address = _address(context, builder, signature.args[array], args[array], index)
            return builder.bitcast(address, kind.as_pointer())

        rows, index = [], args[1]
        for _ in range(lanes.count):
            rows.append(builder.load(vector_at(0, index), align=4))
            index = builder.add(index, args[2])
        _swap_corners(builder, rows, lanes.count // 2)
        index = args[4]
        for row in rows:
            builder.store(row, vector_at(3, index), align=4)
            index = builder.add(index, args[5])
        return context.get_dummy_value()

    whole = types.int64
    return types.none(a, whole, whole, b, whole, whole, lanes), emit


def _swap_corners(builder: _Untyped, rows: list[ir.Value], half: int) -> None:
    """Transpose by swapping the off-diagonal quarters, then those of each quarter, and so on."""
    count = len(rows)
    while half:
        upper = [lane + (count - half if lane & half else 0) for lane in range(count)]
        lower = [lane + (count if lane & half else half) for lane in range(count)]
        for top in range(count):
            if not top & half:
                pair = rows[top], rows[top + half]
                for place, lanes in ((top, upper), (top + half, lower)):
                    chosen = ir.Constant(ir.VectorType(_INT, count), lanes)
                    rows[place] = builder.shuffle_vector(*pair, chosen)
        half //= 2


@_intrinsic
def multiply_tile(
    _typing: _Untyped,
    a: _Untyped,
    a_start: _Untyped,
    a_row: _Untyped,
    a_step: _Untyped,
    b: _Untyped,
    b_start: _Untyped,
    b_step: _Untyped,
    depth: _Untyped,
    c: _Untyped,
    c_start: _Untyped,
    c_row: _Untyped,
    rows: _Untyped,
    vectors: _Untyped,
    lanes: _Untyped,
) -> _Untyped:
    """Write a product of matrices, of a size whose sums all fit into registers.

    With flat arrays, r < len(rows) and j < len(vectors) * len(lanes)::

        c[c_start + r * c_row + j] = sum over k < depth of
            a[a_start + r * a_row + k * a_step] * b[b_start + k * b_step + j]
    """
    kind = _floats(lanes.count)

    def emit(context: _Untyped, builder: _Untyped, signature: _Untyped, args: _Untyped) -> ir.Value:
        bases = {at: context.make_array(signature.args[at])(context, builder, args[at]).data
                 for at in (0, 4, 8)}  # fmt: skip
        _, a_start, a_row, a_step, _, b_start, b_step, depth, _, c_start, c_row = args[:11]

        def vector_at(base: int, index: ir.Value, number: int) -> ir.Value:
            offset = builder.add(index, index.type(number * lanes.count))
            return builder.bitcast(builder.gep(bases[base], [offset]), kind.as_pointer())

        zero = _constant(kind, 0.0)
        sums = [[_variable(builder, zero) for _ in range(vectors.count)] for _ in range(rows.count)]
        with cgutils.for_range(builder, depth, intp=depth.type) as loop:
            at_b = builder.add(b_start, builder.mul(loop.index, b_step))
            at_a = builder.add(a_start, builder.mul(loop.index, a_step))
            right = [builder.load(vector_at(4, at_b, j), align=4) for j in range(vectors.count)]
            for row in sums:
                left = _splat(builder, builder.load(builder.gep(bases[0], [at_a])), kind)
                for place, factor in zip(row, right, strict=True):
                    summed = _multiply_add(builder, left, factor, builder.load(place))
                    builder.store(summed, place)
                at_a = builder.add(at_a, a_row)
        for row in sums:
            for number, place in enumerate(row):
                builder.store(builder.load(place), vector_at(8, c_start, number), align=4)
            c_start = builder.add(c_start, c_row)
        return context.get_dummy_value()

    whole = types.int64
    places = (a, whole, whole, whole, b, whole, whole, whole, c, whole, whole)
    return types.none(*places, rows, vectors, lanes), emit


@_intrinsic
def fill(_typing: _Untyped, value: _Untyped, like: _Untyped) -> _Untyped:
    """Return a vector with ``value`` in all lanes."""

    def emit(
        _context: _Untyped, builder: _Untyped, _signature: _Untyped, args: _Untyped
    ) -> ir.Value:
        return _splat(builder, args[0], _floats(like.count))

    return Vector(like.count)(types.float32, like), emit


# --- arithmetic


def _unary(body: Callable[..., ir.Value]) -> _Operation:
    @_intrinsic
    def operation(_typing: _Untyped, a: _Untyped) -> _Untyped:
        return a(a), lambda _context, builder, _signature, args: body(builder, *args)

    return operation


def _binary(body: Callable[..., ir.Value]) -> _Operation:
    @_intrinsic
    def operation(_typing: _Untyped, a: _Untyped, b: _Untyped) -> _Untyped:
        return a(a, b), lambda _context, builder, _signature, args: body(builder, *args)

    return operation


def _ternary(body: Callable[..., ir.Value]) -> _Operation:
    @_intrinsic
    def operation(_typing: _Untyped, a: _Untyped, b: _Untyped, c: _Untyped) -> _Untyped:
        return a(a, b, c), lambda _context, builder, _signature, args: body(builder, *args)

    return operation


def _multiply_add(builder: _Untyped, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.fadd(builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])


def _round(builder: _Untyped, a: ir.Value) -> ir.Value:
    signature = ir.FunctionType(a.type, [a.type])
    name = f"llvm.rint.v{a.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, signature, name)  # type: ignore[no-untyped-call]
    return builder.call(function, [a])


def _maximum(builder: _Untyped, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _less(builder: _Untyped, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.uitofp(builder.fcmp_ordered("<", a, b), a.type)


def _where_equal(builder: _Untyped, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered("==", a, b), c, _constant(a.type, 0.0))


def _exp(builder: _Untyped, a: ir.Value) -> ir.Value:
    # e^a = 2^n e^r with |r| <= ln(2) / 2: n goes to the exponent's bits, e^r is its Taylor series.
    # ln 2 is subtracted in two parts, of which n times the first is exact (Cody and Waite 1980).
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


def _folded(combine: Callable[..., ir.Value]) -> _Operation:
    @_intrinsic
    def operation(_typing: _Untyped, a: _Untyped) -> _Untyped:
        def emit(
            _context: _Untyped, builder: _Untyped, _signature: _Untyped, args: _Untyped
        ) -> ir.Value:
            value, count = args[0], a.lanes
            while count > 1:
                count //= 2
                lower, upper = (
                    ir.Constant(_ints(count), [*range(start, start + count)])
                    for start in (0, count)
                )
                value = combine(
                    builder,
                    builder.shuffle_vector(value, value, lower),
                    builder.shuffle_vector(value, value, upper),
                )
            return builder.extract_element(value, _INT(0))

        return types.float32(a), emit

    return operation


fma = _ternary(_multiply_add)
"""``fma(a, b, c)`` is a * b + c, rounded once or twice, as the processor likes."""
rint = _unary(_round)
"""``rint(a)`` is the nearest whole number, halves to even."""
exp = _unary(_exp)
"""``exp(a)`` for a <= 88, to 3e-7 of its value; exactly 0 below -50, so that no denormals arise."""
maximum = _binary(_maximum)
"""``maximum(a, b)``."""
add_lanes = _folded(lambda builder, a, b: builder.fadd(a, b))
"""``add_lanes(a)`` is the sum of a vector's numbers."""
highest_lane = _folded(_maximum)
"""``highest_lane(a)`` is the largest of a vector's numbers."""
less = _binary(_less)
"""``less(a, b)`` is 1 where a < b, else 0."""
where_equal = _ternary(_where_equal)
"""``where_equal(a, b, c)`` is c where a == b, else 0."""


def _define_operator(symbol: _Operation, body: Callable[..., ir.Value]) -> None:
    operation = _binary(body)

    def implement(a: _Untyped, b: _Untyped) -> _Operation | None:
        if isinstance(a, Vector) and a == b:
            return lambda a, b: operation(a, b)
        return None

    overload(symbol, strict=False)(implement)


_define_operator(operator.add, lambda builder, a, b: builder.fadd(a, b))
_define_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_define_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_define_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))

"""Vectors of float32 for compiled loops, as wide as the processor's registers.

numba leaves it to LLVM whether a loop is vectorised. Here a value of the type ``VECTOR`` is a
register, so that what is computed in one step is known. Addresses are integers, in bytes.
"""

from __future__ import annotations

import operator

import numba
from llvmlite import ir
from numba import types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, overload, register_model

from totalfast.system.loops import jit

HALF, FLOAT, DOUBLE, INDEX = ir.HalfType(), ir.FloatType(), ir.DoubleType(), ir.IntType(64)

HALF_BYTES, FLOAT_BYTES, DOUBLE_BYTES = 2, 4, 8

CONTRACT = ("contract",)
"""Allows LLVM to round a product and a sum once (FMA), and nothing else."""


def processor_features() -> frozenset[str]:
    """Return the features of the processor that numba compiles for, with LLVM's names."""
    named = numba.config.CPU_FEATURES
    words = (get_host_cpu_features() if named is None else named).split(",")
    return frozenset(word[1:] for word in words if word.startswith("+"))


def lanes_of(features: frozenset[str]) -> int:
    """Return the number of float32 in a register."""
    if "avx512f" in features:
        return 16
    return 8 if {"avx2", "fma"} <= features else 4


LANES = lanes_of(processor_features())
"""Number of float32 in a vector."""

CONVERTS_HALVES = "f16c" in processor_features()
"""Whether the processor converts float16. Elsewhere LLVM calls functions that may be missing."""

VECTOR_BYTES = LANES * FLOAT_BYTES


class Vector(types.Type):
    """Type of a vector, for numba."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


VECTOR = Vector()
HALVES = ir.VectorType(HALF, LANES)
SINGLES, DOUBLES = ir.VectorType(FLOAT, LANES), ir.VectorType(DOUBLE, LANES)


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, SINGLES)


def at(builder, address, kind):
    """Pointer to a value at an address, for code generators."""
    return builder.inttoptr(address, kind.as_pointer())


def load_from(builder, address, kind, bytes_each):
    """Load a value that is aligned like its elements, for code generators."""
    value = builder.load(at(builder, address, kind))
    value.align = bytes_each
    return value


def store_to(builder, value, address, bytes_each):
    """Store a value that is aligned like its elements, for code generators."""
    builder.store(value, at(builder, address, value.type)).align = bytes_each


def filled(builder, number):
    """Vector of one number, for code generators."""
    nothing, first = ir.Constant(SINGLES, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    places = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(nothing, number, first), nothing, places)


@intrinsic
def load(typing_context, address):
    """Vector at an address."""

    def generate(context, builder, signature, arguments):
        return load_from(builder, arguments[0], SINGLES, FLOAT_BYTES)

    return VECTOR(types.intp), generate


@intrinsic
def store(typing_context, address, vector):
    """Store a vector at an address."""

    def generate(context, builder, signature, arguments):
        store_to(builder, arguments[1], arguments[0], FLOAT_BYTES)
        return context.get_dummy_value()

    return types.void(types.intp, VECTOR), generate


@intrinsic
def zeros(typing_context):
    """Vector of zeros."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(SINGLES, [0.0] * LANES)

    return VECTOR(), generate


@intrinsic
def scaled(typing_context, vector, number):
    """Vector times a number."""

    def generate(context, builder, signature, arguments):
        factor = context.cast(builder, arguments[1], signature.args[1], types.float32)
        return builder.fmul(arguments[0], filled(builder, factor), flags=CONTRACT)

    return VECTOR(VECTOR, number), generate


@intrinsic
def rectified(typing_context, vector, slope):
    """Leaky ReLU: what is not positive is multiplied by a number."""

    def generate(context, builder, signature, arguments):
        vector, slope = arguments
        slope = context.cast(builder, slope, signature.args[1], types.float32)
        positive = builder.fcmp_ordered(">", vector, ir.Constant(SINGLES, [0.0] * LANES))
        return builder.select(positive, vector, builder.fmul(vector, filled(builder, slope)))

    return VECTOR(VECTOR, slope), generate


@intrinsic
def add_moments(typing_context, sums, squares, a, b, c, d):
    """Add four vectors to float64 numbers at an address, and their squares at another one.

    All is computed in float64: the variance is a small difference of large numbers.
    """

    def generate(context, builder, signature, arguments):
        sums, squares, *vectors = arguments
        a, b, c, d = (builder.fpext(vector, DOUBLES) for vector in vectors)
        total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
        old = load_from(builder, sums, DOUBLES, DOUBLE_BYTES)
        store_to(builder, builder.fadd(old, total), sums, DOUBLE_BYTES)
        total = load_from(builder, squares, DOUBLES, DOUBLE_BYTES)
        for each in (a, b, c, d):
            square = builder.fmul(each, each, flags=CONTRACT)
            total = builder.fadd(total, square, flags=CONTRACT)
        store_to(builder, total, squares, DOUBLE_BYTES)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, *[VECTOR] * 4), generate


@intrinsic
def repeated(typing_context, address):
    """Vector of the float32 at an address."""

    def generate(context, builder, signature, arguments):
        return filled(builder, load_from(builder, arguments[0], FLOAT, FLOAT_BYTES))

    return VECTOR(types.intp), generate


def _adding_to_halves(half, single):
    """Build ``half += half * single``, of numbers or vectors: in float32, rounded as by torch."""

    @intrinsic
    def add(typing_context, address, weights, values):
        def generate(context, builder, signature, arguments):
            address, weights, values = arguments
            weight = builder.fpext(load_from(builder, weights, half, HALF_BYTES), single)
            product = builder.fmul(load_from(builder, values, single, FLOAT_BYTES), weight)
            old = builder.fpext(load_from(builder, address, half, HALF_BYTES), single)
            new = builder.fptrunc(builder.fadd(old, product), half)
            store_to(builder, new, address, HALF_BYTES)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), generate

    return add


add_to_halves, add_to_half = _adding_to_halves(HALVES, SINGLES), _adding_to_halves(HALF, FLOAT)


@intrinsic
def take_number(typing_context, address):
    """Return the integer at an address and add one to it; other threads get other numbers."""

    def generate(context, builder, signature, arguments):
        place = at(builder, arguments[0], INDEX)
        return builder.atomic_rmw("add", place, ir.Constant(INDEX, 1), "monotonic")

    return types.intp(types.intp), generate


@intrinsic
def copy_number(typing_context, address, is_inside, target):
    """Copy a float32; zero from outside of the image."""

    def generate(context, builder, signature, arguments):
        address, is_inside, target = arguments
        place = builder.select(is_inside, address, target)  # reads nothing outside
        number = load_from(builder, place, FLOAT, FLOAT_BYTES)
        number = builder.select(is_inside, number, ir.Constant(FLOAT, 0.0))
        store_to(builder, number, target, FLOAT_BYTES)
        return context.get_dummy_value()

    return types.void(types.intp, types.boolean, types.intp), generate


def _operation(name):
    @intrinsic
    def operation(typing_context, one, other):
        def generate(context, builder, signature, arguments):
            return getattr(builder, name)(*arguments, flags=CONTRACT)

        return VECTOR(VECTOR, VECTOR), generate

    return operation


added, subtracted, multiplied = map(_operation, ("fadd", "fsub", "fmul"))


@overload(operator.add)
def _add(one, other):
    if one is other is VECTOR:
        return lambda one, other: added(one, other)
    return None


@overload(operator.sub)
def _subtract(one, other):
    if one is other is VECTOR:
        return lambda one, other: subtracted(one, other)
    return None


@overload(operator.mul)
def _multiply(one, other):
    if one is other is VECTOR:
        return lambda one, other: multiplied(one, other)
    if one is VECTOR and isinstance(other, types.Number):
        return lambda one, other: scaled(one, other)
    return None


@jit
def load_normalisation(source, channel):
    """Vectors of what is subtracted, the factor, and what is added, of a source's channels."""
    address = source.normalisation + channel * FLOAT_BYTES
    step = source.channels * FLOAT_BYTES
    return load(address), load(address + step), load(address + 2 * step)


@jit
def fetch(address, is_inside, mean, factor, shift, slope):
    """Normalised and rectified values of L channels; zeros outside of the image."""
    if is_inside:
        return rectified((load(address) - mean) * factor + shift, slope)
    return zeros()

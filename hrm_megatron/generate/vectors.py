"""Vectors of 16 float32 for numba, for loops that it does not vectorize itself.

LLVM splits an operation on them into registers of the processor's width, and sums are computed in the order that a loop
states.
"""
from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import models, register_model

from hrm_megatron.data.kernels import intrinsic

LANES = 16
BYTE, INDICES = ir.IntType(8), ir.IntType(32)
VECTOR, HALVES, WORDS = (ir.VectorType(each, LANES) for each in (ir.FloatType(), ir.IntType(16), INDICES))


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__("16 x float32")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VECTOR)


def place_of(context: Any, builder: Any, array: Any, index: Any, kind: Any, target: Any) -> Any:
    """Return a pointer of LLVM's type `target` to array[index]; `kind` is numba's type of the array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


def everywhere(builder: Any, number: Any) -> Any:
    """Return a vector of a number sixteen times."""
    nothing = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(INDICES, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(WORDS, [0] * LANES))


def prefetch(builder: Any, place: Any) -> None:
    """Prefetch the cache line of a pointer to bytes, for reading, into L2."""
    ask = builder.module.declare_intrinsic("llvm.prefetch", [place.type], ir.FunctionType(
        ir.VoidType(), [place.type, INDICES, INDICES, INDICES]))
    builder.call(ask, [place, *(ir.Constant(INDICES, number) for number in (0, 2, 1))])  # read, level 2, data


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Return array[index : index + 16] of a contiguous [n] array: float32, or the bits of bfloat16 as uint16."""
    wide = array.dtype == types.float32

    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = place_of(context, builder, arguments[0], arguments[1], signature.args[0], VECTOR if wide else HALVES)
        if wide:
            return builder.load(place, align=4)
        words = builder.zext(builder.load(place, align=2), WORDS)
        return builder.bitcast(builder.shl(words, ir.Constant(WORDS, [16] * LANES)), VECTOR)
    return vector(array, types.intp), make


@intrinsic
def store(typing: Any, array: Any, index: Any, values: Any) -> Any:
    """Write values to array[index : index + 16] of a contiguous float32 array [n]."""
    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = place_of(context, builder, arguments[0], arguments[1], signature.args[0], VECTOR)
        builder.store(arguments[2], place, align=4)
        return context.get_dummy_value()
    return types.void(array, types.intp, vector), make


@intrinsic
def multiply_add(typing: Any, number: Any, values: Any, total: Any) -> Any:
    """Return number * values + total, rounded once where the processor can."""
    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        product = builder.fmul(everywhere(builder, arguments[0]), arguments[1], flags=["contract"])
        return builder.fadd(product, arguments[2], flags=["contract"])
    return vector(types.float32, vector, vector), make


@intrinsic
def larger(typing: Any, one: Any, other: Any) -> Any:
    """Return the element-wise maximum."""
    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)
    return vector(vector, vector), make


@intrinsic
def fetch(typing: Any, array: Any, index: Any) -> Any:
    """Prefetch the cache line of array[index]; the index may lie past the end.

    Into L2: L1 can wait for only few lines at once, so keys and values of small heads arrived at half the rate.
    """
    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = place_of(context, builder, arguments[0], arguments[1], signature.args[0], BYTE)
        prefetch(builder, place)
        return context.get_dummy_value()
    return types.void(array, types.intp), make


@intrinsic
def zeros(typing: Any) -> Any:
    """Return sixteen zeros."""
    def make(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(VECTOR, [0.0] * LANES)
    return vector(), make

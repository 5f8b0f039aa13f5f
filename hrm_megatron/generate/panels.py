"""Products of few rows with a large fp32 matrix, compiled by numba for processors with AVX-512.

The matrix is stored in panels of 32 columns, [columns / 32, in, 32], so that it is read in order. A tile of up to 12
rows and 32 columns stays in registers while all of `in` is added up, and the panel is prefetched from memory: few rows
are bound by how fast the matrix arrives.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from hrm_megatron.data.kernels import intrinsic
from hrm_megatron.generate.vectors import LANES, VECTOR, everywhere, place_of, prefetch
from hrm_megatron.layers.loops import loop
from hrm_megatron.layers.threads import on_threads

VECTORS = 2  # of a row of a panel
COLUMNS = VECTORS * LANES  # of a panel
AHEAD = 8192  # elements between what is read and what is prefetched: 32 KB, of a second-level cache of 1 MB or more


def tile_of(rows: int) -> Callable[..., Any]:
    """Return a function for numba that computes a tile of `rows` rows."""
    @intrinsic
    def tile(typing: Any, x: Any, first: Any, size: Any, panels: Any, number: Any, out: Any, columns: Any,
             add: Any) -> Any:
        """Write rows [first, first + rows) of x [n, size] times panel `number` to out [n, columns], or add them to it;
        all are flat."""
        def make(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            _, first, size, _, number, _, columns, add = values
            intp = context.get_value_type(types.intp)

            def at(argument: int, index: Any, kind: Any) -> Any:
                return place_of(context, builder, values[argument], index, signature.args[argument], kind)
            sums = [[cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES)) for _ in range(VECTORS)]
                    for _ in range(rows)]
            begins = [builder.mul(builder.add(first, intp(row)), size) for row in range(rows)]
            panel = builder.mul(builder.mul(number, size), intp(COLUMNS))
            with cgutils.for_range(builder, size) as loop:
                begin = builder.add(panel, builder.mul(loop.index, intp(COLUMNS)))
                weights = []
                for vector in range(VECTORS):
                    index = builder.add(begin, intp(vector * LANES))
                    weights.append(builder.load(at(3, index, VECTOR), align=4))
                    prefetch(builder, at(3, builder.add(index, intp(AHEAD)), ir.IntType(8)))
                for row in range(rows):
                    element = builder.load(at(0, builder.add(begins[row], loop.index), ir.FloatType()))
                    spread = everywhere(builder, element)
                    for total, weight in zip(sums[row], weights, strict=True):
                        product = builder.fmul(spread, weight, flags=["contract"])
                        builder.store(builder.fadd(product, builder.load(total), flags=["contract"]), total)
            for row in range(rows):
                begin = builder.add(builder.mul(builder.add(first, intp(row)), columns),
                                    builder.mul(number, intp(COLUMNS)))
                for vector in range(VECTORS):
                    to, total = at(5, builder.add(begin, intp(vector * LANES)), VECTOR), builder.load(sums[row][vector])
                    with builder.if_else(add) as (adds, writes):
                        with adds:
                            builder.store(builder.fadd(total, builder.load(to, align=4)), to, align=4)
                        with writes:
                            builder.store(total, to, align=4)
            return context.get_dummy_value()
        return types.void(x, types.intp, types.intp, panels, types.intp, out, types.intp, types.boolean), make
    return tile


tile_12, tile_8, tile_4, tile_2, tile_1 = (tile_of(rows) for rows in (12, 8, 4, 2, 1))


@loop
def multiply_part(first: int, last: int, x: Any, rows: int, size: int, panels: Any, out: Any, columns: int,
                  add: bool) -> None:
    """`multiply` for panels [first, last)."""
    for number in range(first, last):
        row = 0
        while row + 12 <= rows:
            tile_12(x, row, size, panels, number, out, columns, add)
            row += 12
        if row + 8 <= rows:
            tile_8(x, row, size, panels, number, out, columns, add)
            row += 8
        if row + 4 <= rows:
            tile_4(x, row, size, panels, number, out, columns, add)
            row += 4
        if row + 2 <= rows:
            tile_2(x, row, size, panels, number, out, columns, add)
            row += 2
        if row < rows:
            tile_1(x, row, size, panels, number, out, columns, add)


@loop
def multiply(threads: int, x: Any, rows: int, size: int, panels: Any, out: Any, columns: int, add: bool) -> None:
    """Write x [rows, size] times the matrix in `panels` to out [rows, columns], or with `add` add it; all are flat."""
    on_threads(multiply_part, threads, columns // COLUMNS, (x, rows, size, panels, out, columns, add))


def panels_of(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix [in, columns] in panels, flat; columns are a multiple of 32."""
    size, columns = matrix.shape
    return np.ascontiguousarray(matrix.reshape(size, columns // COLUMNS, COLUMNS).transpose(1, 0, 2)).reshape(-1)

"""Run compiled loops over rows on torch's own threads.

Between matmuls torch's threads wait in OpenMP's pool by spinning for milliseconds, so threads of another pool, such as
numba's, would compete with them for cores. Loops therefore run on the same OpenMP pool, through the function that
compilers call: `GOMP_parallel` of GNU's runtime (libgomp/libgomp_g.h), which LLVM's provides too.
"""
from __future__ import annotations

import ctypes
from typing import Any

import torch
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from hrm_megatron.data.kernels import intrinsic

DATA = ctypes.c_void_p
BODY = ctypes.CFUNCTYPE(None, DATA)
NUMBER = ctypes.CFUNCTYPE(ctypes.c_int)
# Fallback (torch for macOS has none of these symbols): one thread runs all parts.
ALONE = {"GOMP_parallel": ctypes.CFUNCTYPE(None, BODY, DATA, ctypes.c_uint, ctypes.c_uint)(
             lambda body, data, threads, flags: body(data)),
         "omp_get_thread_num": NUMBER(lambda: 0), "omp_get_num_threads": NUMBER(lambda: 1)}
I8_POINTER, I32 = ir.IntType(8).as_pointer(), ir.IntType(32)
BODY_TYPE = ir.FunctionType(ir.VoidType(), [I8_POINTER])
SYMBOLS = {"GOMP_parallel": ir.FunctionType(ir.VoidType(), [BODY_TYPE.as_pointer(), I8_POINTER, I32, I32]),
           "omp_get_thread_num": ir.FunctionType(I32, []), "omp_get_num_threads": ir.FunctionType(I32, [])}
PREFIX = "hrm_megatron_"


def functions_of(library: ctypes.CDLL) -> dict[str, Any]:
    """Return the OpenMP functions that a library is linked with, whatever the runtime's file name, or `ALONE`."""
    try:
        return {name: getattr(library, name) for name in ALONE}
    except AttributeError:
        return ALONE


for _name, _function in functions_of(ctypes.CDLL(torch._C.__file__)).items():
    binding.add_symbol(PREFIX + _name, ctypes.cast(_function, DATA).value)


def _declared(builder: ir.IRBuilder, name: str) -> ir.Function:
    return cgutils.get_or_insert_function(builder.module, SYMBOLS[name], PREFIX + name)


@intrinsic
def on_threads(typing: Any, loop: Any, threads: Any, rows: Any, arguments: Any) -> Any:
    """Call loop(first, last, *arguments) on `threads` equal parts of range(rows), one per thread. If any raises, a
    MemoryError is raised when all have ended: the loop must raise nothing else.

    Define the loop and its caller as two module-level functions: a closure over a compiled function, as from one
    decorator that makes both, is not cached, and numba compiles it again in each process.
    """
    called = loop.get_call_type(typing, (types.intp, types.intp, *arguments.types), {})

    def make(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        compiled = loop.dispatcher.get_compile_result(called)
        context.add_linking_libs([compiled.library])
        intp, flag = context.get_value_type(types.intp), ir.IntType(8)
        shared = cgutils.alloca_once(builder, ir.LiteralStructType(
            [intp, intp, context.get_value_type(arguments), flag]))

        def field(builder: Any, data: Any, number: int) -> Any:
            return builder.gep(data, [I32(0), I32(number)])
        for number, value in enumerate([*values[1:], flag(0)]):
            builder.store(value, field(builder, shared, number))

        body = ir.Function(builder.module, BODY_TYPE, builder.module.get_unique_name("body"))
        body.linkage = "internal"
        inner = ir.IRBuilder(body.append_basic_block())
        data = inner.bitcast(body.args[0], shared.type)
        parts, count, packed = (inner.load(field(inner, data, number)) for number in range(3))
        own, team = (inner.sext(inner.call(_declared(inner, name), []), intp)
                     for name in ("omp_get_thread_num", "omp_get_num_threads"))
        with cgutils.for_range_slice(inner, own, parts, team, intp) as (part, _):  # OpenMP may grant fewer threads
            first, last = (inner.sdiv(inner.mul(count, number), parts) for number in (part, inner.add(part, intp(1))))
            # Inlined, since a call would execute the copy that was loaded first: in the process that compiles it is the
            # loop's own, elsewhere that of this function, optimized once more, with sums in another order.
            status, _ = context.call_conv.call_function(
                inner, context.declare_function(builder.module, compiled.fndesc), called.return_type, called.args,
                [first, last, *cgutils.unpack_tuple(inner, packed)], attrs=("alwaysinline",))
            with inner.if_then(status.is_error):
                inner.store(flag(1), field(inner, data, 3))
        inner.ret_void()

        builder.call(_declared(builder, "GOMP_parallel"), [
            body, builder.bitcast(shared, I8_POINTER), builder.trunc(values[1], I32), I32(0)])
        with builder.if_then(builder.trunc(builder.load(field(builder, shared, 3)), ir.IntType(1))):
            context.call_conv.return_user_exc(builder, MemoryError, ("a compiled loop",))
        return context.get_dummy_value()
    return types.void(loop, types.intp, types.intp, arguments), make

"""The compiled half of Transformer Engine in plain torch: enough to build its linear layers on a CPU and to run them.

`install()` must come before anything imports transformer_engine. Products are computed in fp32 from the dequantized
operands. Like a GPU of compute capability 9, `generic_gemm` refuses an FP8 operand whose transpose it would need and
that was not made; like one of 10, for block scales, one that lacks the scales of the other direction.
"""
from __future__ import annotations

import enum
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

CAST_LOG: list[torch.Tensor] = []  # what was cast to FP8, in order
BUFFERS = {"_data", "_transpose", "_scale_inv", "_rowwise_data", "_columnwise_data", "_rowwise_scale_inv",
           "_columnwise_scale_inv"}
BLOCK = 32  # elements that share a scale in MXFP8

DType = enum.IntEnum("DType", "kByte kInt16 kInt32 kInt64 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 "
                              "kFloat8E8M0 kFloat4E2M1", start=0)
FP8FwdTensors = enum.IntEnum("FP8FwdTensors", "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT "
                                              "GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT", start=0)
FP8BwdTensors = enum.IntEnum("FP8BwdTensors", "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 "
                                              "GRAD_INPUT3", start=0)
FP8 = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}


class Absent:
    """A function or an enumerator that is only ever named here."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __index__(self) -> int:
        return 0

    __int__ = __index__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, Absent(f"{self.name}.{name}"))
        return self.__dict__[name]

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"the stub of Transformer Engine has no {self.name}")


class Extension(types.ModuleType):
    """transformer_engine_torch: what is below, and names for the rest."""

    __file__ = "stub"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, Absent(name))
        return self.__dict__[name]


def quantize(x: torch.Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """Cast `x` for `quantizer` into a new tensor, or into `out` in place."""
    CAST_LOG.append(x)
    x = x.detach()
    made = (_in_blocks if type(quantizer).__name__ == "MXFP8Quantizer" else _with_one_scale)(x, quantizer)
    if out is None:
        return made
    for name in BUFFERS & vars(made).keys():
        value, buffer = getattr(made, name), getattr(out, name)
        if value is None or buffer is None:
            setattr(out, name, value)
        else:  # it may be a view of another tensor's
            buffer.copy_(value.view_as(buffer))
    if hasattr(made, "_transpose"):
        out._transpose_invalid = made._transpose is None
    return out


def _cast(x: torch.Tensor, dtype: DType) -> torch.Tensor:
    limit = torch.finfo(FP8[dtype]).max
    return x.float().clamp(-limit, limit).to(FP8[dtype]).view(torch.uint8)


def _with_one_scale(x: torch.Tensor, quantizer: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    amax = x.float().abs().max()
    if hasattr(quantizer, "scale"):  # delayed: the scale of before, and the maximum kept for later
        scale = quantizer.scale.clone().view(1)
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    else:
        scale = (torch.finfo(FP8[quantizer.dtype]).max / amax.clamp(min=1e-12)).view(1)
    data = _cast(x.float() * scale, quantizer.dtype)
    both = quantizer.columnwise_usage and not is_non_tn_fp8_gemm_supported()
    parts = dict(data=data, fp8_scale_inv=1 / scale, fp8_dtype=quantizer.dtype, quantizer=quantizer,
                 data_transpose=fp8_transpose(data) if both else None)
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=x.dtype, **parts)
    return Float8Tensor(shape=x.shape, dtype=x.dtype, device=x.device, **parts)


def _in_blocks(x: torch.Tensor, quantizer: Any) -> Any:
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor
    from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage

    rows = x.float().flatten(0, -2)
    parts: dict[str, Any] = dict(fp8_dtype=quantizer.dtype, quantizer=quantizer, with_gemm_swizzled_scales=False)
    for name, wanted, blocks in (("rowwise", quantizer.rowwise_usage, rows.unflatten(-1, (-1, BLOCK))),
                                 ("columnwise", quantizer.columnwise_usage, rows.unflatten(0, (-1, BLOCK)))):
        axis = -1 if name == "rowwise" else 1
        limit = torch.finfo(FP8[quantizer.dtype]).max
        inverse = torch.exp2(torch.log2(blocks.abs().amax(axis, keepdim=True).clamp(min=1e-30) / limit).ceil())
        parts[f"{name}_data"] = _cast(blocks / inverse, quantizer.dtype).view(x.shape) if wanted else None
        parts[f"{name}_scale_inv"] = inverse if wanted else None
    if quantizer.internal:
        return MXFP8TensorStorage(fake_dtype=x.dtype, **parts)
    return MXFP8Tensor(shape=x.shape, dtype=x.dtype, device=x.device, **parts)


def fp8_transpose(data: torch.Tensor, dtype: Any = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """[..., k] to [k, ...], bytes."""
    return data.movedim(-1, 0).contiguous()


def _operand(x: Any, along_columns: bool) -> torch.Tensor:
    """Dequantize to fp32 rows [m, k], from the data that a product over this direction reads."""
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    if hasattr(x, "_rowwise_data"):
        data, inverse = ((x._columnwise_data, x._columnwise_scale_inv) if along_columns
                         else (x._rowwise_data, x._rowwise_scale_inv))
        if data is None:
            raise RuntimeError("MXFP8 operand without the data of the direction that the product reads")
        shape = (-1, BLOCK) if not along_columns else None
        values = data.view(FP8[x._fp8_dtype]).float().flatten(0, -2)
        blocks = values.unflatten(-1, shape) if shape else values.unflatten(0, (-1, BLOCK))
        return (blocks * inverse).view_as(values)
    if hasattr(x, "_scale_inv"):
        if along_columns and not is_non_tn_fp8_gemm_supported():
            if x._transpose is None or x._transpose_invalid:
                raise RuntimeError("FP8 operand without the transpose that the product reads")
            data = x._transpose.movedim(0, -1).contiguous()
        else:
            data = x._data if x._data is not None else x._transpose.movedim(0, -1).contiguous()
        return data.view(FP8[x._fp8_dtype]).float().flatten(0, -2) * x._scale_inv
    return x.float().flatten(0, -2)


def generic_gemm(a: Any, transpose_a: bool, b: Any, transpose_b: bool, out: torch.Tensor | None, quantizer: Any,
                 out_dtype: Any, bias: Any, bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any,
                 workspace_bytes: int, accumulate: bool, *_: Any, **__: Any) -> tuple[Any, None, None, None]:
    """op(b) op(a) for matrices of rows, added to `out` or written over it (cublas of column-major a and b)."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    left, right = _operand(b, along_columns=transpose_b), _operand(a, along_columns=not transpose_a)
    product = (left.t() if transpose_b else left) @ (right.t() if transpose_a else right)
    if out is None:
        shape = product.shape if transpose_b else (*b.size()[:-1], product.shape[-1])
        out = torch.empty(shape, dtype=TE_DType_To_Torch[out_dtype])  # no view: autograd tells them apart
        out.view_as(product).copy_(product)
        return out, None, None, None
    out.add_(product) if accumulate else out.copy_(product)
    return out, None, None, None


def multi_tensor_l2norm(chunk: int, flag: torch.Tensor, lists: list[list[torch.Tensor]],
                        per_tensor: bool) -> tuple[torch.Tensor, None]:
    """Norm of all tensors of the first list."""
    return torch.stack([x.float().norm() for x in lists[0]]).norm().view(1), None


def multi_tensor_scale(chunk: int, flag: torch.Tensor, lists: list[list[torch.Tensor]], factor: float) -> None:
    """Second list = first list * factor."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def compute_amax(x: torch.Tensor, amax: torch.Tensor) -> None:
    """Largest absolute value of `x`."""
    amax.copy_(x.float().abs().max())


def multi_tensor_compute_scale_and_scale_inv(chunk: int, flag: torch.Tensor, lists: list[list[torch.Tensor]],
                                             largest: float, powers_of_two: bool, epsilon: float) -> None:
    """Scales and their inverses for lists of [amax], [scale], [inverse]."""
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(largest / amax)
        inverse.copy_(1 / scale)


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """Let transformer_engine.pytorch be imported and its layers take CPU tensors; pretend a GPU of `capability`."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # else its common part looks for the compiled core
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # delayed scaling's update in Python
    for name in ("einops", "onnx", "onnxscript", "onnxscript.onnx_opset"):  # for inference and export only
        sys.modules[name] = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
    extension = Extension("transformer_engine_torch")
    parts: tuple[Any, ...] = (DType, FP8FwdTensors, FP8BwdTensors, quantize, fp8_transpose, generic_gemm,
                              multi_tensor_l2norm, multi_tensor_scale, compute_amax,
                              multi_tensor_compute_scale_and_scale_inv)
    for part in parts:
        setattr(extension, part.__name__, part)
    answers: dict[str, Callable[[], int]] = dict(get_cudnn_version=lambda: 91900, get_cublasLt_version=lambda: 130000)
    for name, answer in answers.items():
        setattr(extension, name, answer)
    sys.modules[extension.__name__] = extension
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda name: None
    from transformer_engine.pytorch import distributed

    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    named_after_cuda = torch.Tensor.type  # by hrm_megatron.parallel.cpu; FP8 parameters say cuda by themselves
    torch.Tensor.type = lambda self, *arguments, **options: (  # type: ignore[method-assign]
        name.replace("cuda.cuda", "cuda") if isinstance(name := named_after_cuda(self, *arguments, **options), str)
        else name)
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_capability = lambda *_: capability
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        name="stub", major=capability[0], minor=capability[1], multi_processor_count=1, total_memory=1 << 34)
    # Its own code alone must believe that tensors are on a GPU.
    torch.Tensor.is_cuda = property(  # type: ignore[assignment,method-assign]
        lambda self: sys._getframe(1).f_globals["__name__"].startswith("transformer_engine"))

"""Weight matrices for the matmuls of generation: few rows, repeated hundreds of times.

On a CPU the speed of such a matmul depends on the memory layout of the weight, and both of torch's libraries accept
prepacked weights. Measured on one core of a Xeon with AMX, 768 x 3072, milliseconds:

| rows | fp32 [out, in] | fp32 [in, out] | fp32 MKL, packed | bf16 [out, in] | bf16 [in, out] | bf16 oneDNN, packed |
|---|---|---|---|---|---|---|
| 1 | 0.69 | 0.60 | 0.63 | 0.57 | 0.66 | 0.39 |
| 8 | 1.71 | 1.60 | 0.96 | 0.53 | 0.65 | 0.38 |
| 32 | 2.09 | 2.40 | 1.47 | 0.64 | 0.77 | 0.51 |

On an AMD EPYC with AVX-512 (parallel/processor.py) oneDNN's layout is the best for fp32 too, except for products so
small that the call overhead dominates. GFLOP/s:

| rows | in x out | fp32 [in, out] | fp32 MKL, packed | fp32 oneDNN, packed |
|---|---|---|---|---|
| 1 | 768 x 3072 | 33 | 39 | 39 |
| 2 | 768 x 3072 | 44 | 41 | 81 |
| 8 | 768 x 3072 | 60 | 64 | 117 |
| 3072 | 768 x 3072 | 95 | 97 | 195 |
| 4 | 128 x 512 | 43 | 49 | 34 |
| 32 | 128 x 128 | 88 | | 77 |
| 32 | 128 x 512 | 95 | 95 | 148 |
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from hrm_megatron.parallel import processor

PACKED_ROWS = 4  # from this number of rows on MKL's layout is faster
PACKED_ELEMENTS = 1 << 18  # a smaller fp32 matrix stays in a core's cache, and gains nothing from packing
ONEDNN_MULTIPLICATIONS = 1 << 19  # multiply-adds of a product with a small fp32 matrix above which oneDNN is faster


class Matrix:
    """A matrix stored as [in, out], for any device."""

    def __init__(self, weight: torch.Tensor) -> None:
        """`weight` is [out, in]."""
        self.columns, self.nbytes = len(weight), weight.nbytes
        self.keep(weight)

    def keep(self, weight: torch.Tensor) -> None:
        """Store `weight` for `__call__`."""
        self.dense = weight.t().contiguous()

    def more_bytes(self, rows: int) -> int:
        """Return the bytes that `prepare(rows)` would allocate."""
        return 0

    def prepare(self, rows: int) -> None:
        """Prepare for matmuls of mostly `rows` rows."""

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """Return x [n, in] times the matrix, plus `added` [n, out]."""
        return x @ self.dense if added is None else torch.addmm(added, x, self.dense)


class OneDNNMatrix(Matrix):
    """For bf16 on a CPU, and fp32 where MKL is slow: stored only in oneDNN's layout, which works for any number of
    rows."""

    def keep(self, weight: torch.Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        matmul = torch.ops.mkldnn._linear_pointwise
        found: torch.Tensor = (matmul(x, self.packed, None, "none", [], "") if added is None else
                               matmul.binary(x, added, self.packed, None, "add"))
        return found


class SmallOneDNNMatrix(OneDNNMatrix):
    """For small fp32 matrices: stored in both layouts, with the plain one used for few rows."""

    def keep(self, weight: torch.Tensor) -> None:
        super().keep(weight)
        Matrix.keep(self, weight)

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        if x.numel() * self.columns <= ONEDNN_MULTIPLICATIONS:
            return Matrix.__call__(self, x, added)
        return super().__call__(x, added)


class MKLMatrix(Matrix):
    """For fp32 on a CPU: the plain matrix and a copy in MKL's layout, which is for a fixed number of rows.

    Fewer rows are padded with zeros while that is still faster.
    """

    def keep(self, weight: torch.Tensor) -> None:
        super().keep(weight)
        self.rows = 0

    def more_bytes(self, rows: int) -> int:
        return self.nbytes if rows >= PACKED_ROWS and not self.rows else 0

    def prepare(self, rows: int) -> None:
        if rows >= PACKED_ROWS and rows != self.rows:
            self.packed, self.rows = torch.ops.mkl._mkl_reorder_linear_weight(self.dense.t().contiguous(), rows), rows

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        if not self.rows / 2 < len(x) <= self.rows:
            return super().__call__(x, added)
        full = F.pad(x, (0, 0, 0, self.rows - len(x))) if len(x) < self.rows else x
        found = torch.ops.mkl._mkl_linear(full, self.packed, self.dense.t(), None, self.rows)[:len(x)]
        return found if added is None else found.add_(added)


def matrix_of(weight: torch.Tensor) -> Matrix:
    """Return `weight` [out, in] as a Matrix in the layout that is fastest on its device."""
    if weight.device.type == "cpu":
        if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return OneDNNMatrix(weight)
        large = weight.numel() >= PACKED_ELEMENTS
        if weight.dtype == torch.float32 and processor.ON_ONEDNN:
            return (OneDNNMatrix if large else SmallOneDNNMatrix)(weight)
        if weight.dtype == torch.float32 and large and torch.backends.mkl.is_available():
            return MKLMatrix(weight)
    return Matrix(weight)

"""Weight matrices for the matmuls of generation: few rows, repeated hundreds of times.

On a CPU the speed of such a matmul depends on the memory layout of the weight, and both of torch's libraries accept
prepacked weights. Measured on one core of a Xeon with AMX, 768 x 3072, milliseconds:

| rows | fp32 [out, in] | fp32 [in, out] | fp32 MKL, packed | bf16 [out, in] | bf16 [in, out] | bf16 oneDNN, packed |
|---|---|---|---|---|---|---|
| 1 | 0.69 | 0.60 | 0.63 | 0.57 | 0.66 | 0.39 |
| 8 | 1.71 | 1.60 | 0.96 | 0.53 | 0.65 | 0.38 |
| 32 | 2.09 | 2.40 | 1.47 | 0.64 | 0.77 | 0.51 |

MKL does not prefetch a matrix that comes from memory, panels.py does. Weights of 200 MB in turns, on another machine of
that kind, fp32, milliseconds:

| rows | 768 x 3072 [in, out] | MKL, packed | panels | 2048 x 768 [in, out] | MKL, packed | panels |
|---|---|---|---|---|---|---|
| 1 | 0.56 | 0.57 | 0.67 | 0.37 | 0.37 | 0.43 |
| 4 | 1.06 | 1.06 | 0.67 | 0.72 | 0.68 | 0.50 |
| 8 | 1.57 | 1.12 | 0.72 | 0.88 | 0.77 | 0.60 |
| 16 | 1.89 | 1.32 | 0.97 | 0.97 | 0.94 | 0.76 |
| 32 | 2.37 | 1.73 | 1.44 | 1.04 | 1.16 | 1.03 |
| 64 | 3.18 | 2.46 | 2.60 | 1.38 | 1.65 | 1.70 |

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

import numpy as np
import torch
import torch.nn.functional as F

from hrm_megatron.parallel import processor

PACKED_ROWS = 4  # from this number of rows on a second layout is faster
PANEL_ROWS = 32  # up to which panels are faster than MKL's layout
PANEL_COLUMNS = 32  # of which a matrix in panels has a multiple
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


class PanelMatrix(MKLMatrix):
    """For fp32 on a CPU with AVX-512: the plain matrix and a copy in panels (panels.py), for any number of rows up to
    PANEL_ROWS; MKL's layout for more."""

    def keep(self, weight: torch.Tensor) -> None:
        super().keep(weight)
        self.panels: np.ndarray | None = None

    def more_bytes(self, rows: int) -> int:
        if PACKED_ROWS <= rows <= PANEL_ROWS:
            return self.nbytes if self.panels is None else 0
        return super().more_bytes(rows)

    def prepare(self, rows: int) -> None:
        if not PACKED_ROWS <= rows <= PANEL_ROWS:
            super().prepare(rows)
        elif self.panels is None:
            from hrm_megatron.generate import panels  # late: numba takes half a second

            self.multiply, self.panels = panels.multiply, panels.panels_of(self.dense.numpy())
            self(self.dense.new_zeros(PACKED_ROWS, len(self.dense)))  # compiles, which a first answer would wait for

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        if self.panels is None or not PACKED_ROWS <= len(x) <= PANEL_ROWS:
            return super().__call__(x, added)
        out = x.new_empty(len(x), self.columns) if added is None else added.clone(memory_format=torch.contiguous_format)
        self.multiply(torch.get_num_threads(), x.contiguous().view(-1).numpy(), *x.shape, self.panels,
                      out.view(-1).numpy(), self.columns, added is not None)
        return out


def matrix_of(weight: torch.Tensor) -> Matrix:
    """Return `weight` [out, in] as a Matrix in the layout that is fastest on its device."""
    if weight.device.type == "cpu":
        if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return OneDNNMatrix(weight)
        large = weight.numel() >= PACKED_ELEMENTS
        if weight.dtype == torch.float32 and processor.ON_ONEDNN:
            return (OneDNNMatrix if large else SmallOneDNNMatrix)(weight)
        if weight.dtype == torch.float32 and large and torch.backends.mkl.is_available():
            in_panels = processor.HAS_AVX_512 and not len(weight) % PANEL_COLUMNS
            return (PanelMatrix if in_panels else MKLMatrix)(weight)
    return Matrix(weight)

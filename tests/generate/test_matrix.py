"""A matrix of generation in each of its layouts against the product in fp64."""
from __future__ import annotations

import pytest
import torch

from hrm_megatron.generate import matrix as module
from hrm_megatron.generate.matrix import (
    PANEL_COLUMNS,
    PANEL_ROWS,
    Matrix,
    MKLMatrix,
    OneDNNMatrix,
    PanelMatrix,
    SmallOneDNNMatrix,
    matrix_of,
)
from hrm_megatron.parallel import processor

UNIT = {torch.float32: 2.0 ** -24, torch.bfloat16: 2.0 ** -8}
HAS_MKL = torch.backends.mkl.is_available()
HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
KINDS = [(Matrix, torch.float32), (Matrix, torch.bfloat16),
         *[(MKLMatrix, torch.float32), (PanelMatrix, torch.float32)] * HAS_MKL,
         *[(OneDNNMatrix, torch.bfloat16)] * HAS_BF16,
         *[(OneDNNMatrix, torch.float32), (SmallOneDNNMatrix, torch.float32)] * HAS_ONEDNN]


def drawn(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 40), (rows, 40), (rows, 96)))


@pytest.mark.parametrize("kind, dtype", KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("rows", [1, 5, 8, 9])  # of a matrix prepared for 8: too few, filled up, all, too many
def test_a_product_is_that_of_fp64(kind: type[Matrix], dtype: torch.dtype, rows: int,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONEDNN_MULTIPLICATIONS", 6 * 40 * 96)  # of 5 rows fewer, of 8 more
    weight, x, added = drawn(rows, dtype)
    matrix = kind(weight)
    matrix.prepare(8)
    exact, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    # 40 products summed in fp32 in any order, and one rounding to the dtype of each result.
    summed = 41 * 2.0 ** -24 * sizes
    for found, expected in ((matrix(x), exact), (matrix(x, added), exact + added.double())):
        assert found.dtype == dtype and found.shape == (rows, 96)
        bound = summed + 2 * UNIT[dtype] * (expected.abs() + summed) + 2.0 ** -24 * (added.double().abs() + sizes)
        assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.skipif(not HAS_MKL, reason="torch without MKL")
@pytest.mark.parametrize("threads", [1, 3])
def test_every_number_of_rows_is_cut_into_tiles(threads: int) -> None:
    """Panels are divided among threads, rows are not."""
    weight, x, added = drawn(PANEL_ROWS + 1, torch.float32)
    added = added.t().contiguous().t()  # not in order, as no layer passes it
    matrix, before = PanelMatrix(weight), torch.get_num_threads()
    matrix.prepare(PANEL_ROWS)
    exact, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    torch.set_num_threads(threads)
    try:
        for rows in range(1, PANEL_ROWS + 2):
            found = matrix(x[:rows], added[:rows]).double()
            # 40 products and what is added, summed in fp32 in any order.
            bound = 42 * 2.0 ** -24 * (sizes[:rows] + added[:rows].double().abs())
            assert ((found - exact[:rows] - added[:rows].double()).abs() <= bound).all(), rows
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not HAS_MKL, reason="torch without MKL")
def test_few_rows_are_multiplied_in_panels_and_many_by_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    from hrm_megatron.generate import panels

    assert panels.COLUMNS == PANEL_COLUMNS
    weight, x, _ = drawn(PANEL_ROWS + 1, torch.float32)
    matrix = PanelMatrix(weight)
    for rows, more in ((3, 0), (8, weight.nbytes), (PANEL_ROWS + 1, weight.nbytes)):
        assert matrix.more_bytes(rows) == more
        matrix.prepare(rows)
        assert matrix.more_bytes(rows) == 0
    multiplied = []
    monkeypatch.setattr(matrix, "multiply", lambda threads, x, rows, *_: multiplied.append(rows))
    for rows in (1, 3, 4, PANEL_ROWS, PANEL_ROWS + 1):
        matrix(x[:rows])
    assert multiplied == [4, PANEL_ROWS] and matrix.rows == PANEL_ROWS + 1


def test_what_is_added_stays_as_it_was() -> None:
    """A layer's input is added to what comes out of it, and other layers may still read it."""
    for kind, dtype in KINDS:
        weight, x, added = drawn(8, dtype)
        before = added.clone()
        matrix = kind(weight)
        matrix.prepare(8)
        matrix(x, added)
        assert torch.equal(added, before)


def test_the_layout_is_that_of_device_dtype_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.ones(8, 8), torch.ones(512, 512)
    monkeypatch.setattr(processor, "ON_ONEDNN", False)
    assert type(matrix_of(small)) is Matrix
    for avx_512, kind in ((False, MKLMatrix), (True, PanelMatrix)):
        monkeypatch.setattr(processor, "HAS_AVX_512", avx_512)
        assert type(matrix_of(large)) is (kind if HAS_MKL else Matrix)
        assert type(matrix_of(torch.ones(1000, 512))) is (MKLMatrix if HAS_MKL else Matrix)  # not whole panels
    assert type(matrix_of(small.bfloat16())) is (OneDNNMatrix if HAS_BF16 else Matrix)
    assert type(matrix_of(large.half())) is Matrix
    if HAS_ONEDNN:
        monkeypatch.setattr(processor, "ON_ONEDNN", True)
        assert [type(matrix_of(weight)) for weight in (small, large, large.half())] == [
            SmallOneDNNMatrix, OneDNNMatrix, Matrix]


@pytest.mark.skipif(not HAS_MKL, reason="torch without MKL")
def test_panels_are_compiled_before_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from hrm_megatron.generate import panels

    weight, *_ = drawn(8, torch.float32)
    matrix, multiplied = PanelMatrix(weight), []
    monkeypatch.setattr(panels, "multiply", lambda threads, x, rows, *_: multiplied.append(rows))
    matrix.prepare(8)
    assert multiplied == [module.PACKED_ROWS]


@pytest.mark.parametrize("name, value", [("NUMBA_CPU_NAME", "generic"), ("NUMBA_CPU_FEATURES", "-avx512f"),
                                         ("NUMBA_DISABLE_JIT", "1")])
def test_no_panels_where_numba_compiles_for_another_processor(name: str, value: str,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DISABLE_JIT"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert processor.loops_have_avx_512()
    monkeypatch.setenv(name, value)
    assert not processor.loops_have_avx_512()


@pytest.mark.skipif(not HAS_MKL, reason="torch without MKL")
def test_rows_are_laid_out_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, packed = MKLMatrix(torch.ones(8, 8)), []
    pack = torch.ops.mkl._mkl_reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkl, "_mkl_reorder_linear_weight",
                        lambda weight, rows: packed.append(rows) or pack(weight, rows))
    for rows in (1, 3, 8, 8, 16):
        matrix.prepare(rows)
    assert packed == [8, 16]


@pytest.mark.skipif(not HAS_MKL, reason="torch without MKL")
def test_a_second_layout_that_does_not_fit_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch,
                                                                 caplog: pytest.LogCaptureFixture) -> None:
    from hrm_megatron.benchmark.generation import random_tensors
    from hrm_megatron.config import Architecture
    from hrm_megatron.generate import decoder
    from hrm_megatron.generate.weights import take_weights

    monkeypatch.setattr(processor, "ON_ONEDNN", False)
    monkeypatch.setattr(processor, "HAS_AVX_512", False)
    architecture = Architecture(1, 256, 2, 512, 64)
    made = decoder.Decoder(take_weights(architecture, random_tensors(architecture).items()), 32)
    layouts = [matrix for matrix in made.weights.matrices if isinstance(matrix, MKLMatrix)]
    more, cache_bytes = sum(matrix.nbytes for matrix in layouts), 1000
    free = type("Memory", (), {"available": decoder.RESERVE_BYTES + cache_bytes + more - 1})
    monkeypatch.setattr(decoder.psutil, "virtual_memory", lambda: free)
    made.prepare(8, cache_bytes)
    assert layouts and not any(matrix.rows for matrix in layouts) and "weights stay in one layout" in caplog.text
    free.available += 1
    made.prepare(8, cache_bytes)
    assert all(matrix.rows == 8 for matrix in layouts)

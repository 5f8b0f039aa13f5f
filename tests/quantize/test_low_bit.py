from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hrm_megatron.checkpoint.stream import LazyTensor
from hrm_megatron.config import PRESETS, Architecture
from hrm_megatron.convert.low_bit import Scheme, from_stored, stored_tensors
from hrm_megatron.convert.safetensors_file import write_safetensors
from hrm_megatron.quantize.job import size_table
from hrm_megatron.quantize.rounding import round_plainly

SCHEMES = [Scheme("int4", 32), Scheme("int4", 64), Scheme("int8", 0), Scheme("mxfp4", 32)]
SHAPE = (6, 192)


@pytest.fixture(params=SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.group_size}")
def scheme(request):
    return request.param


@pytest.fixture
def library():
    """compressed-tensors, of which a matrix's compressor and settings come."""
    return pytest.importorskip("compressed_tensors", reason="the extra quantize is not installed")


@pytest.fixture
def weight():
    # Magnitudes of every size, zeros and whole groups of zeros.
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, SHAPE[0])[:, None]
    weight[2, :64] = 0
    weight[4, ::3] = 0
    return weight


def test_the_library_unpacks_what_we_pack(library, scheme, weight):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    matrix = round_plainly(weight, scheme)
    tensors = {f"weight{stored.suffix}": stored.make(matrix) for stored in stored_tensors(scheme, SHAPE, 1)}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        f"weight{stored.suffix}": (stored.dtype, stored.shape) for stored in stored_tensors(scheme, SHAPE, 1)}
    if not scheme.is_float:  # it computes in the dtype of the scales
        tensors["weight_scale"] = tensors["weight_scale"].float()
    settings = QuantizationScheme(targets=["Linear"], weights=scheme.arguments())
    theirs = BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors, settings)["weight"]
    assert torch.equal(theirs.float(), matrix.dequantized())


def test_plain_rounding_is_the_librarys(library, scheme, weight):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    settings = QuantizationArgs(**scheme.arguments())
    groups = weight.unflatten(1, (scheme.groups(SHAPE[1]), -1))
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), settings)
    matrix = round_plainly(weight, scheme)
    some = groups.abs().amax(-1) > 0  # of zeros any scale does
    assert torch.equal(matrix.scales[some], scales.float().bfloat16().float()[some])
    theirs = fake_quantize(weight, matrix.scales, None, settings)
    assert torch.equal(matrix.dequantized(), theirs)


def test_all_codes_come_back(scheme):
    codes = torch.arange(scheme.smallest, scheme.largest + 1).float()
    codes = scheme.nearest(codes).to(torch.int8).repeat(SHAPE[0], 64)[:, :SHAPE[1]].contiguous()
    matrix = round_plainly(torch.ones(SHAPE), scheme)
    matrix = type(matrix)(codes, matrix.scales, scheme)
    again = from_stored(scheme, SHAPE, {each.suffix: each.make(matrix) for each in stored_tensors(scheme, SHAPE, 1)})
    assert torch.equal(again.codes, codes) and torch.equal(again.scales, matrix.scales)


def test_a_file_of_many_dtypes_is_the_librarys(tmp_path):
    dtypes = (torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.int8, torch.int32)
    tensors = {f"{9 - i}.{i}": torch.arange(5 + i).to(dtype) for i, dtype in enumerate(dtypes)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours", {name: LazyTensor(tuple(tensor.shape), tensor.dtype, lambda t=tensor: t)
                                          for name, tensor in tensors.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_xl_in_four_bits_with_an_int8_embedding_takes_at_most_063_gib():
    header, *rows = (line.split() for line in size_table())
    xl = next(row for row in rows if row[0] == "XL")
    assert header[3:5] == ["int4", "g64"] and float(xl[3]) <= 0.63 and float(xl[5]) <= 0.63
    p = PRESETS["XL"]
    a = Architecture(p.num_layers, p.hidden_size, p.num_attention_heads, p.ffn_hidden_size, 65_536)
    h, embedding = a.hidden_size, a.padded_vocab_size * a.hidden_size
    of_four_bits = a.num_parameters - embedding
    expected = of_four_bits * (4 + 16 / 64) / 8 + embedding + 2 * a.padded_vocab_size + 2 * h
    # 64 shapes of matrices: eight values each for gate, query, key, value, four for gate and up, two for one.
    expected += 2 * a.num_layers * (8 + 2 + 4 + 2) * 8 + 2 * 8
    assert float(xl[3]) == round(expected / 2**30, 3)

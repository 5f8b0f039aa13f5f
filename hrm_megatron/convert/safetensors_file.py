"""Write a safetensors file tensor by tensor: the library's writer needs all of them in memory at once.

The bytes are identical to the library's. Format: huggingface/safetensors, README.
"""
from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hrm_megatron.checkpoint.stream import LazyTensor

# In the library's order of dtypes, by which it sorts a file: widest alignment first.
DTYPE_NAMES = {torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.int8: "I8",
               torch.uint8: "U8"}
METADATA = {"format": "pt"}  # required by transformers
HEADER_ALIGNMENT = 8


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor as they are in memory."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write tensors into a new file, creating each after the one before it is written."""
    order = sorted(tensors, key=lambda name: ([*DTYPE_NAMES].index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].size_bytes
        header[name] = {"dtype": DTYPE_NAMES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensor_bytes(tensors[name].made()))

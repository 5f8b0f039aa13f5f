"""A pytest plugin that decides which library multiplies matrices, by $PRODUCTS, as another maker's processor would."""
from __future__ import annotations

import os

import torch

from hrm_megatron.parallel.cpu import activate

activate()

from hrm_megatron.generate import matrix  # noqa: E402
from hrm_megatron.parallel import processor  # noqa: E402

PRODUCTS = os.environ["PRODUCTS"]
assert PRODUCTS in ("onednn", "mkl", "without onednn"), PRODUCTS
processor.ON_ONEDNN = PRODUCTS == "onednn"
processor.MIN_MULTIPLICATIONS = matrix.ONEDNN_MULTIPLICATIONS = 0  # the models of tests are small
if PRODUCTS == "without onednn":
    torch.backends.mkldnn.set_flags(False)

"""How far fp32 may take two computations of one thing apart: from arithmetic, never what one machine printed.

Sums run in the order of the processor at hand: the width of its vectors, the blocks of a product and the number of
ranks decide it, and with it the last digits. So a bound is either that of every order, or a multiple of what one order
rounds, measured against the same formula in fp64.
"""
from __future__ import annotations

import torch

UNIT = 2.0 ** -24  # an operation in fp32 rounds its result by at most this part of it
# The errors of n additions grow with their root: 256 terms one by one round sqrt(256 / 16) times as much as 16 in each
# lane of a vector. Among some thousand elements the largest errors of two orders alike differ by a factor of 2 at most.
ORDERS = 4
# What HRM-Text's own fp32 rounds in a pre-norm model of golden size; tests/model/test_golden.py holds it against fp64.
REFERENCE_GRADIENTS = 1e-6  # of the largest element
REFERENCE_STATES = 1.5e-6  # of states and logits, which reach 4
GRADIENTS = 2 * ORDERS * REFERENCE_GRADIENTS  # between two models in fp32
LOSSES = 2 * ORDERS * 2 * REFERENCE_STATES  # likewise; a loss is the difference of two numbers that move as logits do


def of_sums(terms: int, magnitudes: torch.Tensor) -> torch.Tensor:
    """Bound sums of so many products in any order; `magnitudes` sums up their absolute values (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1)."""
    return magnitudes.double() * terms * UNIT / (1 - terms * UNIT)


def error(have: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error of `have`, of the largest element."""
    return ((have.double() - exact).abs().max() / exact.abs().max()).item()


def allowed(plain: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Bound `error` of another order, where `plain` is the formula in fp32 and `exact` the same in fp64."""
    return ORDERS * max(UNIT, *(error(one, of) for one, of in zip(plain, exact, strict=True)))

"""custom_generate of an HRM for transformers: a prompt without token_type_ids is all prefix, read both ways.

transformers' own `generate`, and `pipeline` with it, reads such a prompt causally, which the model was not trained for.
"""
from __future__ import annotations

from typing import Any

import torch


def generate(inputs: torch.Tensor | None = None, *, model: Any, input_ids: torch.Tensor | None = None,
             attention_mask: torch.Tensor | None = None, token_type_ids: torch.Tensor | None = None,
             **options: Any) -> Any:
    """Call transformers' generate with the types of a prompt; those that are given stay as they are."""
    prompt = inputs if input_ids is None else input_ids
    if token_type_ids is None and prompt is not None:
        token_type_ids = torch.ones_like(prompt) if attention_mask is None else attention_mask.to(prompt.dtype)
    given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
    options |= {name: value for name, value in given.items() if value is not None}
    return type(model).generate(model, prompt, **options)

"""custom_generate of an HRM for transformers: a prompt without token_type_ids counts as prefix, with bidirectional
attention.

transformers' own `generate`, and `pipeline` with it, reads such a prompt causally, which the model was not trained for.
"""
from __future__ import annotations

from typing import Any

import torch

FIRST_CANDIDATES = "the first candidates for the answer would be read both ways"  # they run in one pass with the prompt
# Settings with which transformers would attend otherwise than in training -> what would differ.
OTHERWISE = {"prefill_chunk_size": "only the first part of a prompt would be read both ways",
             "assistant_model": FIRST_CANDIDATES, "assistant_early_exit": FIRST_CANDIDATES,
             "prompt_lookup_num_tokens": FIRST_CANDIDATES}


def generate(inputs: torch.Tensor | None = None, *, model: Any, input_ids: torch.Tensor | None = None,
             attention_mask: torch.Tensor | None = None, token_type_ids: torch.Tensor | None = None,
             **options: Any) -> Any:
    """Call transformers' generate with token types that mark the prompt as prefix; given token_type_ids are kept.

    Settings with which transformers would attend bidirectionally in (a part of) the answer, or process the prompt in
    parts, raise ValueError.
    """
    if _setting("use_cache", model, options) is False:
        raise ValueError("use_cache=False: the answer would be read both ways, which the model was not trained for; "
                         "pass use_cache=True")
    for name, what in OTHERWISE.items():
        if value := _setting(name, model, options):
            shown = type(value).__name__ if isinstance(value, torch.nn.Module) else value
            raise ValueError(f"{name}={shown}: {what}, which the model was not trained for; leave it out")
    prompt = inputs if input_ids is None else input_ids
    if token_type_ids is None and prompt is not None:
        token_type_ids = torch.ones_like(prompt) if attention_mask is None else attention_mask.to(prompt.dtype)
    given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
    options |= {name: value for name, value in given.items() if value is not None}
    return type(model).generate(model, prompt, **options)


def _setting(name: str, model: Any, options: dict[str, Any]) -> Any:
    """Return a setting as transformers resolves it: the first that is not None."""
    places = (options.get("generation_config"), model.generation_config)
    return next((value for value in (options.get(name), *(getattr(place, name, None) for place in places))
                 if value is not None), None)

"""The README.md of an export: what the model is, and the call that answers a prompt as in training."""
from __future__ import annotations

from hrm_megatron.config import Architecture
from hrm_megatron.convert.quantization import Quantized
from hrm_megatron.data.spelling import Spelling

CARD_FILE = "README.md"
ASK_WITH_TOKENIZER = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
prompts = [f"{boq}{tag}{{question}}{eoq}" for question in ("What is 2 + 3?", "What is seven times eight?")]
inputs = tokenizer(prompts, padding=True, return_tensors="pt")  # input_ids, token_type_ids and attention_mask
output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(answers)"""
ASK_WITHOUT = """\
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")
prompt = torch.tensor([[{prompt}]])  # put your token ids here
inputs = dict(input_ids=prompt, token_type_ids=torch.ones_like(prompt), attention_mask=torch.ones_like(prompt))
output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
answers = output[:, prompt.shape[1]:].tolist()
print(answers)"""
QUANTIZED = """

Weights are stored in few bits: {scheme}, by {method}.
transformers loads them with `pip install compressed-tensors` and computes in {dtype} with what the codes stand for,
which saves disk and not memory there."""
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# A Hierarchical Reasoning Model for text

HrmText of transformers (from 5.17 on), {dtype}: {parameters:,} parameters, {layers} layers in each of two stacks,
{ticks} ticks. Trained with prompt and answer of at most {tokens} tokens together.{quantized}

Run this in the model's folder:

```python
{ask}
```

**Pass `token_type_ids`.** The model was trained to read a prompt both ways, and transformers lets it do so only where
the type is 1. Without them it reads the prompt causally, which is another function; nothing warns of it.
`pipeline("text-generation")` does not pass them.{types}

A prompt is `{boq}`, tokens for what the answer shall be like (any of {tags}, or none), the question, `{eoq}`.
An answer ends with `{eoa}`.{padding}
"""
TYPES = """ The tokenizer of this folder makes them: pass on all that it returns, as above.
`tokenizer.apply_chat_template` spells one question, with `condition="direct"` for that token; add `return_dict=True`.
To score an answer, give it as the second text, `tokenizer(prompt, answer)`: its types are 0."""


def model_card(architecture: Architecture, max_tokens: int, dtype: str, pad_token: str | None,
               first_token: object, spelling: Spelling, quantized: Quantized | None = None) -> str:
    """Write the card; `pad_token` None: there is no tokenizer beside the model, whose prompts begin so."""
    spelled = dict(boq=spelling.boq, eoq=spelling.eoq, eoa=spelling.eoa)
    ask = ASK_WITHOUT.format(prompt=first_token) if pad_token is None else ASK_WITH_TOKENIZER.format(
        tag=next(iter(spelling.tags.values()), ""), **spelled)
    return CARD.format(
        parameters=architecture.num_parameters, layers=architecture.num_layers, dtype=dtype, tokens=max_tokens, ask=ask,
        ticks=architecture.h_cycles * (architecture.l_cycles + 1), types="" if pad_token is None else TYPES,
        quantized="" if quantized is None else QUANTIZED.format(
            scheme=quantized.quantization.spelled, method=quantized.method, dtype=dtype),
        tags=", ".join(f"`{token}` {tag}" for tag, token in spelling.tags.items()), **spelled,
        padding="" if pad_token is None else f" Batches are padded on the left with `{pad_token}`.")

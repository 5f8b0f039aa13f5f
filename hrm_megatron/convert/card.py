"""The README.md of an export: what the model is, how it was trained, and code that generates as in training."""
from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from hrm_megatron.config import ConfigError
from hrm_megatron.convert.checkpoint import Checkpoint
from hrm_megatron.convert.quantization import Quantized
from hrm_megatron.data.spelling import Spelling

CARD_FILE = "README.md"
ASK_WITH_TOKENIZER = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
prompts = [f"{boq}{tag}{{question}}{eoq}" for question in ("What is 2 + 3?", "What is seven times eight?")]
inputs = tokenizer(prompts, padding=True, return_tensors="pt"){returned}
output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(answers)"""
ASK_WITHOUT = """\
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")
prompt = torch.tensor([[{prompt}]])  # put your token ids here
inputs = dict(input_ids=prompt, {types}attention_mask=torch.ones_like(prompt))
output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
answers = output[:, prompt.shape[1]:].tolist()
print(answers)"""
ASK_LLAMA_CPP = """\
import numpy as np
from llama_cpp import Llama, LogitsProcessorList

model = Llama("model.gguf", n_ctx={tokens}, n_batch={tokens}, n_ubatch={tokens}, logits_all=False,
              verbose=False{both_ways})
{prompt}
model.reset()  # before every prompt{why}
# The head has rows that stand for no token.
tokens = LogitsProcessorList([lambda _, logits: np.where(np.arange(len(logits)) < {words}, logits, -np.inf)])
answer = []
for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0, logits_processor=tokens):
    if token == {end} or len(answer) == 100:
        break
    answer.append(token)
print({shown})"""
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

HrmText of transformers (from 5.17 on), {dtype}: {about}{quantized}

Run this in the model's folder:

```python
{ask}
```

{reads}{types}

{spelling}{padding}
{sections}"""
# Text for a model with bidirectional prompts, and its replacement for a causal one.
RETURNED = "  # input_ids, token_type_ids and attention_mask"
TYPES_GIVEN = "token_type_ids=torch.ones_like(prompt), "
BOTH_WAYS = ', kv_overrides={"hrm_text.attention.causal": False}'
SEEN = ": what is kept of another one has seen the end of that"
READS = """\
**Pass `token_type_ids`.** The model was trained to read a prompt both ways, and transformers lets it do so only where
the type is 1. Without `token_type_ids` a prompt is causal, which is another function; nothing warns of it.
`pipeline("text-generation")` does not pass them, unless it is made with `trust_remote_code=True`: then
`custom_generate/generate.py` of this folder does, for every prompt that comes without. **Neither `save_pretrained` nor
`Trainer` copies `custom_generate`**, and without it such a pipeline is causal again: copy it into what they save.
**Keep the cache:** with `use_cache=False` transformers reads the answer both ways, too, with `prefill_chunk_size` only
the first part of a prompt, and with `assistant_model`, `assistant_early_exit` or `prompt_lookup_num_tokens` the first
candidates for the answer both ways; that file refuses all of them."""
READS_CAUSALLY = """\
The model reads prompts causally, as it was trained to: `prefix_lm` is false in config.json, and there are no
`token_type_ids` to pass. **vLLM (0.33) ignores that setting** and reads a prompt both ways: another function."""
TYPES = " The tokenizer of this folder makes them: pass on all that it returns, as above."
CHATS = """

`tokenizer.apply_chat_template(messages, return_dict=True)` spells a question, or all turns of a chat up to the one that
asks, as one prompt; `condition="{tag}"` puts that token before it."""
PAIRS = """ Without `return_dict=True` there are no types.
To score an answer, give it as the second text, `tokenizer(prompt, answer)`: its types are 0. In one text with its
prompt it would be read both ways, too, and see its own end."""
LLAMA_CPP_CARD = """\
---
library_name: llama.cpp
pipeline_tag: text-generation
---
# A Hierarchical Reasoning Model for text

`model.gguf` for `hrm_text` of llama.cpp, {dtype}: {about}

{reads}{normalizes}

{spelling}
{sections}"""
LLAMA_CPP_CAUSAL = """\
llama.cpp reads a prompt causally, as the model was trained to. In Python (`llama-cpp-python`):

```python
{ask}
```"""
LLAMA_CPP_BOTH_WAYS = """\
**llama.cpp reads a prompt causally**, whatever `hrm.prefix_lm` in the file says, and nothing warns of it. The model was
trained to read a prompt both ways, so these are answers of another function. It reads both ways with
`hrm_text.attention.causal` set to false and all of a prompt in one micro-batch, which it refuses otherwise; an answer
is made token by token and stays causal. In Python (`llama-cpp-python`):

```python
{ask}
```

Other programs of llama.cpp take `--override-kv hrm_text.attention.causal=bool:false --batch-size {tokens} --ubatch-size
{tokens}`. They must not reuse what they keep of an earlier prompt (`--no-cache-prompt` in llama-server), nor read a
prompt that answers are already being made beside in one batch (`--parallel 1`)."""
NORMALIZES = " The tokenizer was trained on texts in Unicode's form C, which llama.cpp does not bring them into."
SPELLING = """\
A prompt is `{boq}`, tokens for what the answer shall be like (any of {tags}, or none), the question, `{eoq}`.
An answer ends with `{eoa}`."""


@dataclasses.dataclass(frozen=True)
class Sections:
    """Markdown written elsewhere about a model: its data report, and its evaluation."""

    data_report: str = ""
    evaluation: str = ""

    @staticmethod
    def read(data_report: Path | None, evaluation: Path | None) -> Sections:
        """Read the files, without their pictures, which are not copied."""
        texts = []
        for flag, path in (("--data-report", data_report), ("--evaluation", evaluation)):
            try:
                text = "" if path is None else path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ConfigError(f"{flag} {path}: cannot read ({error}); give a Markdown file, or leave it out"
                                  ) from error
            lines = [re.sub(r"^#+ ", "### ", line) for line in text.splitlines() if not line.startswith("![")]
            texts.append(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())
        return Sections(*texts)


NO_SECTIONS = Sections()


def model_card(checkpoint: Checkpoint, dtype: str, pad_token: str | None, first_token: object, spelling: Spelling,
               sections: Sections, quantized: Quantized | None = None) -> str:
    """Return the card of a transformers folder; `pad_token` None: there is no tokenizer beside the model, whose prompts
    begin with `first_token`."""
    tag, token = next(iter(spelling.tags.items()), ("", ""))
    causal = checkpoint.architecture.causal
    if pad_token is None:
        ask, types = ASK_WITHOUT.format(prompt=first_token, types="" if causal else TYPES_GIVEN), ""
    else:
        ask = ASK_WITH_TOKENIZER.format(tag=token, boq=spelling.boq, eoq=spelling.eoq,
                                        returned="" if causal else RETURNED)
        chats = CHATS.format(tag=tag)
        types = chats if causal else f"{TYPES}{chats}{PAIRS}"
    return CARD.format(
        dtype=dtype, about=_about(checkpoint), ask=ask, types=types, reads=READS_CAUSALLY if causal else READS,
        spelling=_spelled(spelling), sections=_sections(checkpoint, sections),
        quantized="" if quantized is None else QUANTIZED.format(
            scheme=quantized.quantization.spelled, method=quantized.method, dtype=dtype),
        padding="" if pad_token is None else f" Batches are padded on the left with `{pad_token}`.")


def gguf_card(checkpoint: Checkpoint, dtype: str, tokens: int, end: int, spelling: Spelling | None, sections: Sections
              ) -> str:
    """Return the card of a GGUF file whose head has `tokens` rows that stand for a token, and whose answers end with
    the token `end`; `spelling` None: the file has no tokenizer."""
    max_tokens, ours = checkpoint.training.seq_length, spelling or Spelling()
    question = f"{ours.boq}{next(iter(ours.tags.values()), '')}What is 2 + 3?{ours.eoq}"
    prompt = "prompt = [0]  # put your token ids here" if spelling is None else \
        f'prompt = model.tokenize("{question}".encode(), add_bos=False, special=True)'
    shown = "answer" if spelling is None else "model.detokenize(answer).decode(errors='replace')"
    causal = checkpoint.architecture.causal
    ask = ASK_LLAMA_CPP.format(tokens=max_tokens, prompt=prompt, end=end, shown=shown,
                               words=tokens, both_ways="" if causal else BOTH_WAYS, why="" if causal else SEEN)
    reads = (LLAMA_CPP_CAUSAL if causal else LLAMA_CPP_BOTH_WAYS).format(ask=ask, tokens=max_tokens)
    return LLAMA_CPP_CARD.format(dtype=dtype, about=_about(checkpoint), reads=reads,
                                 normalizes="" if spelling is None else NORMALIZES, spelling=_spelled(ours),
                                 sections=_sections(checkpoint, sections))


def _about(checkpoint: Checkpoint) -> str:
    architecture = checkpoint.architecture
    return (f"{architecture.num_parameters:,} parameters, {architecture.num_layers} layers in each of two stacks,\n"
            f"{architecture.h_cycles * (architecture.l_cycles + 1)} ticks. Trained with prompt and answer of at most "
            f"{checkpoint.training.seq_length} tokens together.")


def _spelled(spelling: Spelling) -> str:
    return SPELLING.format(boq=spelling.boq, eoq=spelling.eoq, eoa=spelling.eoa,
                           tags=", ".join(f"`{token}` {tag}" for tag, token in spelling.tags.items()))


def _sections(checkpoint: Checkpoint, sections: Sections) -> str:
    """Return the settings of the model, and of its training if there was any, followed by the other sections."""
    settings = dataclasses.asdict(checkpoint.architecture)
    if checkpoint.iteration:
        settings |= dict(steps=checkpoint.iteration, **dataclasses.asdict(checkpoint.training))
    rows = "".join(f"| `{name}` | {value} |\n" for name, value in settings.items() if value is not None)
    return (f"\n## Settings\n\n| | |\n|---|---|\n{rows}"
            + (f"\n## Data\n\n{sections.data_report}\n" if sections.data_report else "")
            + (f"\n## Evaluation\n\n{sections.evaluation}\n" if sections.evaluation else ""))

"""Answer the demo's questions: with our models through hrm_megatron.generate, with the export through transformers."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from examples.demo.questions import Row  # noqa: E402
from hrm_megatron.config import Architecture  # noqa: E402
from hrm_megatron.data.spelling import BOQ, EOQ, TAG_TOKENS  # noqa: E402
from hrm_megatron.data.tokenizer import TextTokenizer  # noqa: E402
from hrm_megatron.generate.decode import generate  # noqa: E402
from hrm_megatron.generate.load import load_model, open_checkpoint  # noqa: E402
from hrm_megatron.model.hrm import HRMModel  # noqa: E402
from hrm_megatron.parallel.single import single_rank  # noqa: E402
from hrm_megatron.transformer_config import hrm_config  # noqa: E402

UNFINISHED = " ..."  # no right answer ends like this


def of_untrained(architecture: Architecture, seed: int, tokenizer: TextTokenizer, rows: Sequence[Row]) -> list[str]:
    """Answer with the initial model of a run with this seed: weights depend only on the seed and their names."""
    with single_rank():
        return _answers(HRMModel(hrm_config(architecture), seed), tokenizer, rows)


def of_checkpoint(folder: Path, tokenizer: TextTokenizer, rows: Sequence[Row]) -> list[str]:
    """Answer with the EMA weights of the latest Megatron checkpoint in `folder`."""
    with single_rank():
        return _answers(load_model(open_checkpoint(folder)), tokenizer, rows)


def _answers(model: HRMModel, tokenizer: TextTokenizer, rows: Sequence[Row]) -> list[str]:
    prompts = [tokenizer.encode_prefix(row["condition"], row["instruction"]) for row in rows]
    answers = generate(model, prompts, tokenizer.eoa, tokenizer.vocab_size, longest_answer(tokenizer, rows))
    return [tokenizer.decode(ids) + (UNFINISHED if ids[-1] != tokenizer.eoa else "") for ids in answers]


def longest_answer(tokenizer: TextTokenizer, rows: Sequence[Row]) -> int:
    """Return the tokens of the longest right answer, end token included: anything longer is wrong anyway."""
    return max(map(len, tokenizer.encode_responses([row["response"] for row in rows])))


def of_export(folder: Path, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """Answer with a Hugging Face folder in plain transformers, without any code of this project."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = []
    for row in rows:
        # The tokenizer gives every token of a prompt the type 1 (prefix), which the model attends to bidirectionally.
        prompt = tokenizer(f"{BOQ}{TAG_TOKENS[row['condition']]}{row['instruction']}{EOQ}", return_tensors="pt")
        assert prompt["token_type_ids"].eq(1).all()
        out = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)[0]
        text = tokenizer.decode(out[prompt["input_ids"].shape[1]:], skip_special_tokens=True)
        answers.append(text + (UNFINISHED if out[-1] != tokenizer.eos_token_id else ""))
    return answers


def right_share(answers: Sequence[str], rows: Sequence[Row]) -> float:
    """Return the share of exactly right answers."""
    return sum(answer == row["response"] for answer, row in zip(answers, rows, strict=True)) / len(rows)

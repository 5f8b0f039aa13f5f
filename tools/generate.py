"""Answer prompts from a Megatron checkpoint.

    python tools/generate.py --load runs/demo/checkpoints --tokenizer-model runs/demo/tokenizer \\
        --condition direct --prompt "What is the tens digit of 7543?"
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hrm_megatron.program import listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

from tqdm import tqdm  # noqa: E402

from hrm_megatron.config import ConfigError  # noqa: E402
from hrm_megatron.convert.checkpoint import EMA, RAW  # noqa: E402
from hrm_megatron.data.text_files import read_lines  # noqa: E402
from hrm_megatron.data.tokenizer import TextTokenizer  # noqa: E402
from hrm_megatron.generate.decode import Sampling, generate  # noqa: E402
from hrm_megatron.generate.load import load_model, open_checkpoint  # noqa: E402
from hrm_megatron.parallel.single import single_rank  # noqa: E402


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--load", required=True, help="folder that --save named, or one iteration in it")
    p.add_argument("--ckpt-step", type=int, help="iteration to take instead of the latest")
    p.add_argument("--no-verify-checkpoint", dest="verify_checkpoint", action="store_false",
                   help="answer from what can be read of a damaged checkpoint")
    p.add_argument("--weights", choices=[EMA, RAW], default=EMA)
    p.add_argument("--tokenizer-model", required=True, help="tokenizer folder of the training data")
    prompts = p.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one instruction")
    prompts.add_argument("--prompt-file", type=Path, help="one instruction per line, which ends at \\n or \\r\\n only")
    p.add_argument("--jsonl", action="store_true",
                   help="print each answer as one line of JSON: condition, instruction, response")
    p.add_argument("--condition", default="direct", help="comma-separated tags (direct, cot, noisy, synth), or ''")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=1234)
    return p


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = [args.prompt] if args.prompt_file is None else read_lines(args.prompt_file)
    if not prompts:
        raise ConfigError(f"--prompt-file {args.prompt_file}: empty; write one instruction per line")
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # how Python takes a command line that is no UTF-8
            raise ConfigError(f"--prompt {prompt!r}: not UTF-8 at character {error.start + 1}; correct it") from error
    return prompts


def answer(args: argparse.Namespace) -> None:
    """Print one answer per prompt."""
    tokenizer = TextTokenizer(args.tokenizer_model)
    checkpoint = open_checkpoint(args.load, args.ckpt_step, args.verify_checkpoint)
    if checkpoint.remark:
        print(f"{checkpoint.path} {checkpoint.remark}", file=sys.stderr)
    if tokenizer.vocab_size != checkpoint.architecture.vocab_size:
        raise ConfigError(f"{args.tokenizer_model}: {tokenizer.vocab_size} entries, the checkpoint has "
                          f"{checkpoint.architecture.vocab_size}; give the tokenizer of its training data")
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    prompts = read_prompts(args)
    encoded = [tokenizer.encode_prefix(args.condition, prompt) for prompt in prompts]
    with single_rank(), tqdm(total=len(prompts), unit="answer", disable=len(prompts) == 1) as bar:
        answers = generate(load_model(checkpoint, args.weights), encoded, tokenizer.eoa, tokenizer.vocab_size,
                           args.max_new_tokens, sampling, on_answer=bar.update)
    texts = [tokenizer.decode(token for token in ids if token != tokenizer.eoa) for ids in answers]
    for prompt, text in zip(prompts, texts, strict=True):
        # ASCII, so that no reader splits a record at U+2028 and the like
        record = {"condition": args.condition, "instruction": prompt, "response": text}
        print(json.dumps(record) if args.jsonl else text)
    if len(prompts) > 1 and not args.jsonl and (longer := sum("\n" in text for text in texts)):
        print(f"{longer} of {len(prompts)} answers hold line ends; --jsonl keeps each on one line", file=sys.stderr)


def main() -> int:
    args = parser().parse_args()
    return one_line(lambda: answer(args))


if __name__ == "__main__":
    sys.exit(main())

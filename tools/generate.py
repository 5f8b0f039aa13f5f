"""Answer prompts with a checkpoint of Megatron, transformers (hf) or HRM-Text.

    python tools/generate.py --load runs/demo/checkpoints --tokenizer-model runs/demo/tokenizer \\
        --condition direct --prompt "What is the tens digit of 7543?"
    python tools/generate.py --load runs/demo/hf --input questions.jsonl --output answers.jsonl --batch-size 32
"""
from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hrm_megatron.program import check_outputs, listen, one_line

if __name__ == "__main__":
    listen()

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

from tqdm import tqdm  # noqa: E402

from hrm_megatron.config import ConfigError, refuse_beside  # noqa: E402
from hrm_megatron.data.text_files import BYTE_ORDER_MARK  # noqa: E402
from hrm_megatron.generate.answer_count import answer_count  # noqa: E402
from hrm_megatron.generate.answer_file import AnswerFile  # noqa: E402
from hrm_megatron.generate.engine import Progress, Request  # noqa: E402
from hrm_megatron.generate.flags import add_compute_flags, add_model_flags  # noqa: E402
from hrm_megatron.generate.questions import Question, of_jsonl, of_lines  # noqa: E402
from hrm_megatron.generate.sampling import Sampling  # noqa: E402
from hrm_megatron.generate.session import Answering, Session, record  # noqa: E402


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(p)
    prompts = p.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one instruction")
    prompts.add_argument("--prompt-file", type=Path, help="one instruction per line, which ends at \\n or \\r\\n only")
    prompts.add_argument("--input", type=Path, metavar="JSONL",
                         help="one question per row: instruction, condition (else --condition), others are kept")
    prompts.add_argument("--interactive", action="store_true", help="answer each line of standard input as it comes")
    p.add_argument("--condition", default="direct", help="comma-separated tags (direct, cot, noisy, synth), or ''")
    out = p.add_argument_group("output")
    out.add_argument("--jsonl", action="store_true",
                     help="print each answer as one line of JSON: condition, instruction, response, finish")
    out.add_argument("--output", type=Path, metavar="JSONL",
                     help="write these lines to a file, in the order of the questions; an interrupted run goes on")
    out.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    out.add_argument("--stream", action="store_true", help="print an answer while it grows")
    out.add_argument("--logprobs", type=int, metavar="K",
                     help="also write the log-probability of each token and of the K likeliest")
    how = p.add_argument_group("how to answer")
    how.add_argument("--max-new-tokens", type=int, default=128)
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text")
    how.add_argument("--samples", type=int, default=1, help="answers to each prompt, which is read once")
    how.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    how.add_argument("--top-p", type=float, default=1.0)
    how.add_argument("--top-k", type=int, default=0)
    how.add_argument("--min-p", type=float, default=0.0)
    how.add_argument("--seed", type=int, default=1234)
    add_compute_flags(how)
    how.add_argument("--batch-size", type=int, default=32, help="answers at once (default: %(default)s)")
    return p


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect, and outputs that cannot be written."""
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size}: must be at least 1")
    if args.output:
        check_outputs({"--output": args.output}, inputs={"--input": args.input, "--prompt-file": args.prompt_file})
        refuse_beside("--output", {"--jsonl": args.jsonl, "--stream": args.stream, "--interactive": args.interactive})
    elif args.overwrite:
        raise ConfigError("--overwrite: replaces an --output; give one, or leave it out")
    if args.stream:
        refuse_beside("--stream", {"--jsonl": args.jsonl, "--prompt-file": args.prompt_file, "--input": args.input})
    if args.interactive:
        refuse_beside("--interactive", {"--jsonl": args.jsonl})
    if args.logprobs is not None and not (args.jsonl or args.output):
        raise ConfigError("--logprobs: are written as JSON; give --jsonl or --output too")
    if args.samples > 1 and (args.stream or args.interactive):
        raise ConfigError(f"--samples {args.samples}: only one answer is printed while it grows; leave --stream and "
                          "--interactive out")
    if args.samples > 1 and not args.temperature:
        raise ConfigError(f"--samples {args.samples}: greedy answers are all the same; give a --temperature too")


def questions_of(args: argparse.Namespace) -> list[Question]:
    if args.prompt is not None:
        return [Question("--prompt", args.condition, args.prompt)]
    if args.prompt_file is not None:
        return of_lines(args.prompt_file, args.condition)
    return [] if args.interactive else of_jsonl(args.input, args.condition)


def say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the progress bar


def print_piece(progress: Progress) -> None:
    print(progress.piece, end="\n" if progress.transcript.finish else "", flush=True)


def converse(session: Session, condition: str) -> None:
    """Answer lines of standard input until it ends; report a bad line and skip it."""
    tell_once = iter([say])
    if sys.stdin.isatty():
        say("one instruction a line; Ctrl-D ends")
    for number, line in enumerate(lines_of_input(), start=1):
        if not (instruction := line.rstrip("\r\n")).strip():
            continue
        try:
            [request] = session.requests([Question(f"line {number}", condition, instruction)])
            asked = [replace(request, stream=number - 1)]
            list(session.answer(asked, 1, next(tell_once, lambda _: None), print_piece))
        except ConfigError as error:
            say(f"error: {error}")


def lines_of_input() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def print_answers(session: Session, questions: Sequence[Question], args: argparse.Namespace) -> None:
    requests = session.requests(questions)
    broken = 0
    with shown(args, requests) as show:
        for question, samples in zip(questions, session.answer(requests, args.batch_size, say, show), strict=True):
            if args.stream:
                continue  # already printed
            if args.jsonl:
                tqdm.write(json.dumps(record(question, samples, session.tokenizer)))
            else:
                tqdm.write("\n".join(sample.text for sample in samples))
                broken += sum("\n" in sample.text for sample in samples)
    if len(questions) > 1 and broken:
        say(f"{broken} of {len(questions) * args.samples} answers hold line ends; --jsonl keeps each on one line")


def write_answers(session: Session, questions: Sequence[Question], args: argparse.Namespace) -> None:
    requests = session.requests(questions)
    with AnswerFile(args.output, session.identity, args.overwrite, questions) as file:
        if file.done:
            say(f"{file.partial}: goes on after {file.done} of {len(questions)} answers")
        requests = requests[file.done:]
        with shown(args, requests) as show:
            found = session.answer(requests, args.batch_size, say, show)
            for question, samples in zip(questions[file.done:], found, strict=True):
                file.write(record(question, samples, session.tokenizer))
        file.finish()
    say(f"{args.output}: {len(questions)} questions answered")


def shown(args: argparse.Namespace, requests: Sequence[Request]
          ) -> contextlib.AbstractContextManager[Callable[[Progress], object]]:
    """Return the progress display: the text itself with --stream, else a count of answers."""
    return contextlib.nullcontext(print_piece) if args.stream else answer_count(len(requests) * args.samples)


def answer(args: argparse.Namespace) -> None:
    check_flags(args)
    answering = Answering(
        args.max_new_tokens, Sampling(args.temperature, args.top_p, args.seed, args.top_k, args.min_p), args.samples,
        tuple(args.stop), args.logprobs, args.h_cycles, args.l_cycles, args.exit_threshold, args.dtype)
    questions = questions_of(args)
    session = Session(args.load, answering, args.tokenizer_model, args.weights, args.ckpt_step, args.verify_checkpoint)
    if session.remark:
        say(session.remark)
    if args.interactive:
        converse(session, args.condition)
    elif args.output:
        write_answers(session, questions, args)
    else:
        print_answers(session, questions, args)


def main() -> int:
    args = parser().parse_args()
    return one_line(lambda: answer(args))


if __name__ == "__main__":
    sys.exit(main())

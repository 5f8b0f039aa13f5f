"""`--eval-tasks`: tasks of tools/evaluate.py at every validation of a training run, answered by the EMA weights.

Every rank holds the whole model and answers its share of the questions with a copy of the weights in the layout of
generation; afterwards the training weights are restored bitwise.
"""
from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from megatron.training import training as megatron_training

from hrm_megatron.config import ConfigError
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.evaluate.ask import prepare, requests_of
from hrm_megatron.evaluate.report import percent
from hrm_megatron.evaluate.rows import read_items
from hrm_megatron.evaluate.scoring import equal_math
from hrm_megatron.evaluate.summary import Result, summarize
from hrm_megatron.evaluate.tasks import TASKS, TOO_LONG, Asked, Task, chosen
from hrm_megatron.generate.cache import RESERVE_BYTES, free_bytes
from hrm_megatron.generate.decode import MAX_ROWS, decoder_of
from hrm_megatron.generate.session import Answering, Session
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.optim.averaged_weights import averaged_weights
from hrm_megatron.parallel.patching import around
from hrm_megatron.training.evaluation import ON_TEST_SET, Evaluation, log_part

log = logging.getLogger(__name__)

WAY_OUT = "or evaluate the checkpoints with tools/evaluate.py"


@dataclass(frozen=True)
class LiveTask:
    """A task with tokenized questions; prompt and answer have at most `context_tokens`."""

    task: Task
    asked: Sequence[Asked]
    context_tokens: int


@dataclass(frozen=True)
class LiveTasks:
    """Tasks, and the tokenizer of the training data."""

    tasks: Sequence[LiveTask]
    tokenizer: TextTokenizer
    context_tokens: int  # of the model

    def results(self, model: HRMModel) -> list[Result]:
        """Answer all questions with this model, divided among the ranks; every rank gets all results.

        A task is skipped with a warning if some rank lacks memory for its cache; all tasks, if some rank lacks memory
        for the weights.
        """
        if (rank := _full_rank(model)) is not None:
            log.warning(f"tasks: not answered: on rank {rank} the memory that training leaves free holds no copy of "
                        f"the weights for generation; lower --micro-batch-size, {WAY_OUT}")
            return []
        decoder = decoder_of(model, self.context_tokens, self.tokenizer.vocab_size)
        session = Session.of_decoder(decoder, self.tokenizer, Answering())
        answered = [(live, _records(live, session)) for live in self.tasks]
        return [summarize(live.task, live.asked, records, 1, live.context_tokens) for live, records in answered
                if records is not None]


def _full_rank(model: HRMModel) -> int | None:
    """Return the first rank that lacks memory for the decoder's weights, or None; collective, the same on all ranks."""
    wanted = sum(weight.nbytes for weight in model.parameters()) + RESERVE_BYTES
    full: list[bool] = [False] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(full, wanted > free_bytes(model.output_layer.weight.device))
    return full.index(True) if any(full) else None


def _records(live: LiveTask, session: Session) -> list[dict[str, Any]] | None:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    requests = list(requests_of(live.task, live.asked, session, live.context_tokens))[rank::ranks]
    wanted = [request for request in requests if request]
    rows: list[int] = [0] * ranks
    torch.distributed.all_gather_object(rows, session.rows_that_fit(wanted, MAX_ROWS))
    if not all(rows):
        log.warning(f"tasks: {live.task.title}: not answered: on rank {rows.index(0)} the memory that training leaves "
                    "free holds no key-value cache for one answer; lower --eval-tasks-new-tokens or "
                    f"--micro-batch-size, {WAY_OUT}")
        return None
    found = session.answer(wanted, rows[rank], lambda line: None)
    answers = [next(found)[0] if request else None for request in requests]
    own = [dict(responses=[answer.text if answer else ""], finish=[answer.finish if answer else TOO_LONG])
           for answer in answers]
    shares: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(shares, own)
    return [shares[place % ranks][place // ranks] for place in range(len(live.asked))]


def open_tasks(args: argparse.Namespace, validates: bool) -> LiveTasks:
    """Read and tokenize all questions, before the model is built; raises ConfigError if they cannot be evaluated in
    this run."""
    others = {"--eval-tasks-data": args.eval_tasks_data, "--eval-tasks-limit": args.eval_tasks_limit,
              "--eval-tasks-new-tokens": args.eval_tasks_new_tokens}
    for flag, value in others.items():
        if value is not None and not args.eval_tasks:
            raise ConfigError(f"{flag} {value}: has no effect without --eval-tasks; give tasks, or leave it out")
    flag = f"--eval-tasks {' '.join(args.eval_tasks)}"
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        if (size := getattr(args, name)) > 1:
            raise ConfigError(f"{flag}: every rank must hold the whole model, and --{name.replace('_', '-')} is "
                              f"{size}; evaluate its checkpoints with tools/evaluate.py")
    for name, on in (("--use-torch-fsdp2", args.use_torch_fsdp2), ("--use-megatron-fsdp", args.use_megatron_fsdp),
                     ("--fp8-param-gather", args.fp8_param_gather or args.fp4_param_gather)):
        if on:
            raise ConfigError(f"{flag} is incompatible with {name}: leave one of them out")
    if args.skip_train or not validates:
        raise ConfigError(f"{flag}: tasks are answered at every validation of a training run, and there is "
                          f"{'no training' if args.skip_train else 'none'}; use tools/evaluate.py"
                          f"{'' if args.skip_train else ', or give examples to validate on and --eval-iters'}")
    for name, value in (("--eval-tasks-data", args.eval_tasks_data), ("--tokenizer-model", args.tokenizer_model)):
        if value is None:
            raise ConfigError(f"{flag}: needs {name}; give it")
    tokenizer, found = TextTokenizer(args.tokenizer_model), []
    for task in chosen(args.eval_tasks, {}):
        if task.name == "math":
            equal_math("1", "1")  # fail now, not after hours of work
        task = replace(task, new_tokens=task.new_tokens or args.eval_tasks_new_tokens)
        context = min(task.context_tokens, args.seq_length)
        rows = read_items(task, args.eval_tasks_data, args.eval_tasks_limit)
        found.append(LiveTask(task, prepare(task, *rows, tokenizer, context), context))
    if args.eval_tasks_new_tokens is not None and all(TASKS[live.task.name].new_tokens for live in found):
        raise ConfigError(f"--eval-tasks-new-tokens {args.eval_tasks_new_tokens}: no task of "
                          f"{', '.join(args.eval_tasks)} has free answers; leave it out")
    log.info("data: tasks: " + ", ".join(f"{live.task.title} {len(live.asked)} questions" for live in found))
    return LiveTasks(found, tokenizer, args.seq_length)


def install_tasks(args: argparse.Namespace, tasks: LiveTasks, evaluation: Evaluation) -> None:
    """Run the tasks after every validation."""
    done = -1

    def evaluate_and_print_results(stock: Callable[..., None], prefix: str, forward_step_func: Any, data_iterator: Any,
                                   model: Any, iteration: int, *rest: Any, **options: Any) -> None:
        nonlocal done
        stock(prefix, forward_step_func, data_iterator, model, iteration, *rest, **options)
        # The final validation repeats that of the last step.
        if prefix.endswith(ON_TEST_SET) or iteration == done:
            return
        done, began = iteration, time.monotonic()
        with averaged_weights(evaluation.optimizer, model):
            [one] = unwrap_model(model)
            results = tasks.results(one)
        log_results(results, iteration, args, time.monotonic() - began)

    megatron_training.evaluate_and_print_results = around(megatron_training.evaluate_and_print_results,
                                                          evaluate_and_print_results)


def log_results(results: Sequence[Result], iteration: int, args: argparse.Namespace, seconds: float) -> None:
    """Log each result with its standard error, and write both to TensorBoard."""
    scores = [f"{result.task.title} " + ", ".join(f"{name} {percent(found)}" for name, found in result.metrics.items())
              for result in results]
    log.info(f"step {iteration}/{args.train_iters}  tasks EMA: {'; '.join(scores)}  in {seconds:.0f}s")
    values = {}
    for result in results:
        for name, found in result.metrics.items():
            values[f"{result.task.name} {name}"] = found.value
            if found.stderr is not None:
                values[f"{result.task.name} {name} stderr"] = found.stderr
    log_part("tasks EMA", values, iteration, args.consumed_train_samples, True)

"""Make prompts of a task's questions, and keep the answers in a file that an interrupted run resumes."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.spelling import tags_of
from hrm_megatron.data.text_files import read_lines, shown
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.evaluate.prompts import Item
from hrm_megatron.evaluate.rows import PlacedItem
from hrm_megatron.evaluate.tasks import TOO_LONG, Asked, Task, spelled
from hrm_megatron.generate.answer_file import AnswerFile, check_settings, write_settings
from hrm_megatron.generate.engine import Progress, Request
from hrm_megatron.generate.session import Session


def prepare(task: Task, questions: Sequence[PlacedItem], shot_rows: Sequence[PlacedItem], tokenizer: TextTokenizer,
            context_tokens: int) -> list[Asked]:
    """Tokenize questions with their shots; prompts that do not fit get fewer shots if the task allows it."""
    try:
        tags_of(task.condition, tokenizer.tag_ids)
    except ConfigError as error:
        raise ConfigError(f"task {task.name}: {error}") from error
    asked = _spell(task, questions, [_count(task, placed.item) for placed in questions], shot_rows, tokenizer)
    long = [i for i, one in enumerate(asked) if len(one.prompt or ()) >= context_tokens]
    if task.fewer_shots is not None:
        fewer = [min(task.fewer_shots, asked[i].shots) for i in long]
        for i, one in zip(long, _spell(task, [questions[i] for i in long], fewer, shot_rows, tokenizer), strict=True):
            asked[i] = one
    return [one if len(one.prompt or ()) < context_tokens else Asked(one.place, one.item, one.shots, None)
            for one in asked]


def _count(task: Task, item: Item) -> int:
    return task.special_shots.get(item.group, task.shots)


def _spell(task: Task, questions: Sequence[PlacedItem], counts: Sequence[int], shot_rows: Sequence[PlacedItem],
           tokenizer: TextTokenizer) -> list[Asked]:
    by_group: dict[str, list[Item]] = {}
    for row in shot_rows:
        by_group.setdefault(row.item.group if task.grouped_shots else "", []).append(row.item)
    texts = []
    for placed, count in zip(questions, counts, strict=True):
        shots = by_group.get(placed.item.group if task.grouped_shots else "", [])
        if len(shots) < count:
            of = f" of {placed.item.group!r}" if task.grouped_shots else ""
            raise ConfigError(f"task {task.name}: {count} shots are wanted, split '{task.source.shots_split}' has "
                              f"{len(shots)} rows{of}; give it more, or pass fewer as --shots {task.name}=N")
        texts.append(spelled(task, placed.item, shots[:count]).strip())
    prompts = tokenizer.encode_prefixes([task.condition] * len(texts), texts) if texts else []
    return [Asked(placed.place, placed.item, count, prompt)
            for placed, count, prompt in zip(questions, counts, prompts, strict=True)]


def requests_of(task: Task, asked: Sequence[Asked], session: Session, context_tokens: int) -> Iterator[Request | None]:
    """Yield a request for each question, None for one that does not fit; the index among all questions is the random
    stream."""
    how = session.answering
    for stream, one in enumerate(asked):
        if one.prompt is None:
            yield None
        else:
            room = context_tokens - len(one.prompt)
            yield Request(one.prompt, min(task.new_tokens or room, room), how.sampling, session.stop_tokens,
                          how.samples, stream=stream)


def fingerprint(asked: Sequence[Asked]) -> str:
    """Return a hash of prompts and right answers."""
    made = [[None if one.prompt is None else list(map(int, one.prompt)), repr(one.item)] for one in asked]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


class TaskAnswers:
    """The answers in FOLDER/TASK.jsonl, made with the settings in FOLDER/TASK.settings.json; never mixed with other
    settings."""

    def __init__(self, folder: Path, task: Task, session: Session, asked: Sequence[Asked], context_tokens: int) -> None:
        self.path, self.note = folder / f"{task.name}.jsonl", folder / f"{task.name}.settings.json"
        self.task, self.session, self.asked, self.context_tokens = task, session, asked, context_tokens
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(
            session.identity, max_new_tokens=task.new_tokens, condition=task.condition, context_tokens=context_tokens,
            shots=task.shots, questions=fingerprint(asked))))
        self.check()

    def check(self) -> None:
        """Raise ConfigError if the file was begun with other settings."""
        if self.note.exists():
            check_settings(self.note, self.settings, f"{self.path.name}*", self.note, ", or choose another --output; "
                           "'questions' is a hash of rows and prompts, which --limit, --data and --shots decide")

    def records(self, max_rows: int, say: Callable[[str], object],
                on_progress: Callable[[Progress], object] = lambda progress: None) -> list[dict[str, Any]]:
        """Return a record for each question; answer those that are not in the file yet."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            if not self.note.exists():
                write_settings(self.note, self.settings)
            self._answer(max_rows, say, on_progress)
        elif not self.note.exists():
            raise ConfigError(f"{self.path}: has no {self.note.name} beside it that says what it was made with; choose "
                              "another --output")
        lines = list(read_lines(self.path))
        if len(lines) != len(self.asked):
            raise ConfigError(f"{self.path}: {len(lines)} answers to {len(self.asked)} questions; it was changed, "
                              "remove it to answer them again")
        return [self._record(f"{self.path}:{number}", line, one)
                for number, (line, one) in enumerate(zip(lines, self.asked, strict=True), start=1)]

    def _record(self, place: str, line: str, one: Asked) -> dict[str, Any]:
        """Parse a line of the file; raises ConfigError if it is not an answer to this question."""
        samples = self.session.answering.samples
        try:
            record: dict[str, Any] = json.loads(line)
            for name, value in self._about(one).items():
                if name != "place" and record[name] != value:  # the file of rows may have been moved
                    raise ValueError(f"{name} is {shown(record[name])}, not {value!r}")
            for name in ("responses", "finish"):
                if not (isinstance(record[name], list) and len(record[name]) == samples
                        and all(isinstance(each, str) for each in record[name])):
                    raise ValueError(f"{name} is {shown(record[name])}, not {samples} text{'s' * (samples > 1)}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(f"{place}: is not the answer to {one.place} ({error!r}); it was changed, remove "
                              f"{self.path} to answer again") from error
        return record

    @staticmethod
    def _about(one: Asked) -> dict[str, Any]:
        return dict(place=one.place, group=one.item.group, shots=one.shots, prompt_tokens=len(one.prompt or ()))

    def _answer(self, max_rows: int, say: Callable[[str], object], on_progress: Callable[[Progress], object]) -> None:
        with AnswerFile(self.path, self.settings) as file:
            if file.done:
                say(f"{file.partial}: goes on after {file.done} of {len(self.asked)} answers")
            wanted = list(requests_of(self.task, self.asked, self.session, self.context_tokens))[file.done:]
            found = self.session.answer([each for each in wanted if each], max_rows, say, on_progress)
            samples = self.session.answering.samples
            for one, request in zip(self.asked[file.done:], wanted, strict=True):
                answers = [] if request is None else next(found)
                finish: list[str | None] = [answer.finish for answer in answers]
                file.write(dict(self._about(one), responses=[answer.text for answer in answers] or [""] * samples,
                                finish=finish or [TOO_LONG] * samples))
            file.finish()

"""Chats of a kind that the demo's model has never seen: write a number backwards, and in some a second one."""
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.row_shapes import examples_of

Row = dict[str, str]  # condition, instruction, response
Chat = dict[str, Any]

CONDITION = "direct"
DIGITS = (2, 3, 4, 5)
HELD_OUT_SHARE = 0.1  # of all numbers; training chats have numbers of their own
SHARE_OF_TWO = 1 / 3  # of the chats, which have a second number


def write_chats(folder: Path, counts: dict[str, int], seed: int = 0) -> dict[str, list[Chat]]:
    """Write NAME.jsonl for every count into the folder and return the chats; `train` uses its own numbers, all others
    the held-out ones."""
    training: dict[int, list[int]] = {}
    held_out: dict[int, list[int]] = {}
    for digits in DIGITS:
        numbers = list(range(10 ** (digits - 1), 10 ** digits))
        random.Random(f"{seed} {digits}").shuffle(numbers)
        cut = round(HELD_OUT_SHARE * len(numbers))
        held_out[digits], training[digits] = numbers[:cut], numbers[cut:]
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, count in counts.items():
        chance = random.Random(f"{seed} {name}")
        files[name] = [_chat(chance, training if name == "train" else held_out) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in files[name]))
    return files


def _chat(chance: random.Random, numbers: dict[int, list[int]]) -> Chat:
    turns = []
    for ask in ("Write {} backwards.", "And {}?")[:1 + (chance.random() < SHARE_OF_TWO)]:
        number = str(chance.choice(numbers[chance.choice(DIGITS)]))
        turns += [{"role": "user", "content": ask.format(number)}, {"role": "assistant", "content": number[::-1]}]
    return {"condition": CONDITION, "messages": turns}


def questions_of(chats: list[Chat]) -> list[Row]:
    """Return a question with its answer for each turn of the assistant, as preprocessing does."""
    return [{"condition": example.condition, "instruction": example.instruction, "response": example.response}
            for number, chat in enumerate(chats)
            for example in examples_of(chat, f"chat {number}", RowFormat(shape="messages"))]

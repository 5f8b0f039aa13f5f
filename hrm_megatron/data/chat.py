"""Chats as examples: one for each turn of the assistant, whose prefix is everything said before.

A single question is used verbatim as prefix, so a chat of one question and one answer gives the same example as the
pair would. Otherwise the prefix is the system message, if any, and a paragraph for each turn, beginning with `User: `,
`Assistant: `, `Tool: ` or, for a later system message, `System: `. Paragraphs are joined by blank lines.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

from hrm_megatron.data.example import BadRow, Example, RowFormat, make_example, text_of
from hrm_megatron.data.text_files import shown

TURN_LISTS = ("messages", "conversations")
SPELLINGS = (("role", "content"), ("from", "value"))  # the keys of a turn
SPEAKERS = {  # roles of OpenAI's and ShareGPT's formats
    "system": "System", "developer": "System", "user": "User", "human": "User", "assistant": "Assistant",
    "gpt": "Assistant", "tool": "Tool", "function": "Tool", "ipython": "Tool", "observation": "Tool",
}
CALLS = ("tool_calls", "function_call")
LOST = {  # fields of a turn that would be lost, and what they hold
    **dict.fromkeys(CALLS, "tool call"), **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "thought"),
    "refusal": "refusal",
}
LOSS_KEYS = ("weight", "train", "loss")  # 0 or false masks a turn in OpenAI's, axolotl's or LLaMA-Factory's format
REPEATS = 10  # prefixes of a chat together may have this many times --max-characters


class Turn(NamedTuple):
    speaker: str
    text: str
    learned: bool = True  # for answers: whether it is trained on


def chat_examples(row: dict[str, Any], place: str, rows: RowFormat, noted: Counter[str],
                  system: str = "") -> list[Example]:
    """Return an example for each unmasked turn of the assistant that follows a question. Raises BadRow.

    `system` is the system message of a row that has it in a field of its own. All examples of a chat have the same
    split key, that of the first question, so that no part of a chat is held out while another is trained on.
    """
    turns = _with_system(_turns(row, place), system, place)
    if not any(turn.speaker == "Assistant" for turn in turns):
        raise BadRow("no answer", f"{place}: no turn of the assistant; drop the row")
    asked = next((i for i, turn in enumerate(turns) if turn.speaker in ("User", "Tool")), len(turns))
    answers = [i for i, turn in enumerate(turns) if turn.speaker == "Assistant" and i > asked]
    learned = [i for i in answers if turns[i].learned]
    if not learned:
        masked = f"; {' or '.join(LOSS_KEYS)} masks all of its answers" if answers else ""
        raise BadRow("no answer", f"{place}: the assistant answers nothing{masked}; drop the row")
    question = prefix_of(turns[:answers[0]])
    examples: list[Example] = []
    seen: Counter[str] = Counter()
    characters = 0
    for i, turn in enumerate(turns):
        if i and turn.speaker == turns[i - 1].speaker != "Tool":
            seen[f"turns of the {turn.speaker.lower()} behind another of the same"] += 1
        seen["turns of tools, kept in prefixes"] += turn.speaker == "Tool"
        if turn.speaker != "Assistant" or i > learned[-1]:
            continue
        if i < asked:
            seen["turns of the assistant before any question, kept in prefixes"] += 1
            continue
        if not turn.learned:
            seen["turns of the assistant that are masked, kept in prefixes"] += 1
            continue
        prefix = prefix_of(turns[:i])
        characters += len(prefix)
        if characters > REPEATS * rows.max_characters:
            raise BadRow("row too long", f"{place}: a chat whose prefixes have over {REPEATS} x --max-characters "
                                         f"{rows.max_characters}; split it or raise that")
        examples.append(replace(make_example(row, place, rows, prefix, turn.text), question=question))
    seen["turns behind the last of the assistant, left out"] += len(turns[learned[-1] + 1:])
    noted.update(+seen)
    return examples


def prefix_of(turns: list[Turn]) -> str:
    """Format what was said before an answer as its prefix."""
    system, said = (turns[0].text, turns[1:]) if turns and turns[0].speaker == "System" else ("", turns)
    alone = len(said) == 1 and said[0].speaker == "User"
    paragraphs = [said[0].text] if alone else [f"{turn.speaker}: {turn.text}" for turn in said]
    return "\n\n".join([system, *paragraphs] if system else paragraphs)


def _with_system(turns: list[Turn], system: str, place: str) -> list[Turn]:
    """Prepend the system message of a row to its turns, unless it is already the first of them."""
    if not system.strip():
        return turns
    if turns and turns[0].speaker == "System":
        if turns[0].text.strip() != system.strip():
            raise BadRow("two system messages", f"{place}: {shown(system)} beside the turns, {shown(turns[0].text)} as "
                                                "the first of them; drop one")
        return turns
    return [Turn("System", system), *turns]


def _turns(row: dict[str, Any], place: str) -> list[Turn]:
    """Read the turns of a row; a system message without text is dropped."""
    if not any(key in row for key in TURN_LISTS):
        raise BadRow("missing field", f"{place}: no field {' or '.join(map(repr, TURN_LISTS))} (there are "
                                      f"{shown(sorted(row))}); add it or choose another --row-shape")
    key = next((key for key in TURN_LISTS if row.get(key) is not None), TURN_LISTS[0])
    said = row.get(key)
    if not isinstance(said, list) or not said:
        raise BadRow("no turns", f"{place}: {key}={shown(said)} is not a list of turns; write "
                                 '[{"role": "user", "content": ...}, ...]')
    turns = [_turn(turn, f"{place}, {key}[{number}]") for number, turn in enumerate(said)]
    return [turn for turn in turns if turn.text.strip() or turn.speaker == "Tool"]


def _turn(turn: Any, place: str) -> Turn:
    if not isinstance(turn, dict):
        raise BadRow("no turns", f'{place}: {shown(turn)} is not a turn; write {{"role": ..., "content": ...}}')
    role_key, text_key = next((keys for keys in SPELLINGS if turn.get(keys[0]) is not None), SPELLINGS[0])
    role = turn.get(role_key)
    speaker = SPEAKERS.get(role) if isinstance(role, str) else None
    if speaker is None:
        raise BadRow("unknown role", f"{place}: {role_key}={shown(role)}; use one of {', '.join(SPEAKERS)}")
    if lost := next((key for key in LOST if turn.get(key)), None):
        raise BadRow(LOST[lost], f"{place}: {lost} would be lost; write the {LOST[lost]} into the text of the turn, or "
                                 "drop the field")
    text = _text(turn, text_key, place)
    if not text.strip() and speaker in ("User", "Assistant"):
        raise BadRow("empty turn", f"{place}: {text_key}={shown(text)} is empty; fill it or drop the row")
    return Turn(speaker, text, speaker != "Assistant" or _is_learned(turn, place))


def _is_learned(turn: dict[str, Any], place: str) -> bool:
    """Return whether an answer is trained on: no field masks it."""
    for key in LOSS_KEYS:
        if turn.get(key) not in (0, 1, None):
            raise BadRow("unknown weight", f"{place}: {key}={shown(turn[key])} is neither 0 (no loss) nor 1; write one "
                                           "of these, or drop the field")
    return 0 not in map(turn.get, LOSS_KEYS)


def _text(turn: dict[str, Any], key: str, place: str) -> str:
    """Return the text of a turn, joined from its parts if it has some."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return text_of(turn, key, place)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise BadRow("turn is no text", f"{place}: {shown(part)} is no text; leave such rows out")
    return "".join(text_of(part, "text", place) for part in parts)

"""Examples of consecutive rows as columns, which is how they are spelled, looked at and hashed."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hrm_megatron.data.characters import Texts
from hrm_megatron.data.example import BadRow, Example

BATCH_CHARACTERS = 1 << 21  # of text that are spelled at once, more only where one example has more


@dataclass(frozen=True)
class ExampleBatch:
    """`place` says where an example comes from, by its number in the batch. `texts`: instruction, response,
    instruction, response, ... `bad_rows` are in order, each with the number of examples before it. `questions`: of the
    examples, by number, that are split by another text than their instruction."""

    place: Callable[[int], str]
    conditions: Sequence[str]
    texts: Texts
    defaulted: Sequence[bool]
    bad_rows: Sequence[tuple[int, BadRow]] = ()
    questions: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, read: Iterable[tuple[str, Example | BadRow]]) -> ExampleBatch:
        """Put together what was read of rows one by one."""
        places: list[str] = []
        examples: list[Example] = []
        bad_rows: list[tuple[int, BadRow]] = []
        for place, example in read:
            if isinstance(example, BadRow):
                bad_rows.append((len(examples), example))
            else:
                places.append(place)
                examples.append(example)
        texts = Texts.of(text for example in examples for text in (example.instruction, example.response))
        return cls(places.__getitem__, [example.condition for example in examples], texts,
                   [example.defaulted for example in examples], bad_rows,
                   {i: example.question for i, example in enumerate(examples)
                    if example.question not in (None, example.instruction)})


def batches(read: Iterable[tuple[str, Example | BadRow]]) -> Iterator[ExampleBatch]:
    """Cut what was read into batches of bounded length: rows of compressed files can be far longer than the files."""
    batch: list[tuple[str, Example | BadRow]] = []
    characters = 0
    for place, example in read:
        batch.append((place, example))
        if isinstance(example, Example):
            characters += len(example.instruction) + len(example.response)
        if characters >= BATCH_CHARACTERS:
            yield ExampleBatch.of(batch)
            batch, characters = [], 0
    yield ExampleBatch.of(batch)

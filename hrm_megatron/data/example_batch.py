"""Examples of consecutive rows in columnar form, for encoding, linting and hashing."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hrm_megatron.data.characters import Texts
from hrm_megatron.data.example import BadRow, Example

BATCH_CHARACTERS = 1 << 21  # of text per batch; only a single longer example exceeds it


@dataclass(frozen=True)
class ExampleBatch:
    """`place` names the origin of an example by its index in the batch. `texts`: instruction, response, instruction,
    response, ... `bad_rows` are in order, each with the number of examples before it. `questions`: by index, the texts
    that replace the instruction as split key."""

    place: Callable[[int], str]
    conditions: Sequence[str]
    texts: Texts
    defaulted: Sequence[bool]
    bad_rows: Sequence[tuple[int, BadRow]] = ()
    questions: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, read: Iterable[tuple[str, Example | BadRow]]) -> ExampleBatch:
        """Build a batch from examples and bad rows that were read one by one."""
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
    """Group examples into batches of bounded size: decompressed rows can be far larger than their files."""
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

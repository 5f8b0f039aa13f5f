"""Equal keys are equal texts, and nothing else."""
import hashlib
import unicodedata

import numpy as np

from hrm_megatron.data.example import Example
from hrm_megatron.data.example_batch import ExampleBatch
from hrm_megatron.data.text_keys import TextKeys, example_key, prompt_key


def test_a_prompt_is_known_by_its_normalized_text():
    assert prompt_key(" caf\u00e9?\n") == prompt_key(unicodedata.normalize("NFD", "café?")) \
        == hashlib.blake2b("caf\u00e9?".encode()).digest()[:8]
    assert len({prompt_key(text) for text in ("a", "b", "A", "a b")}) == 4


def test_an_example_is_known_by_all_its_texts_and_their_borders():
    given = [("", "ab", "c"), ("", "a", "bc"), ("cot", "ab", "c"), ("", "ab", "c "), ("c", "ot", "abc")]
    keys = [example_key(*(text.encode() for text in texts)) for texts in given]
    assert len(set(keys)) == 5 and all(len(key) == 16 for key in keys)


def test_keys_stand_in_the_order_of_their_examples():
    keys = TextKeys()
    assert [array.shape for array in keys.arrays()] == [(0,), (0, 2)]
    examples = [Example("", "q", "1"), Example("", " q ", "2"), Example("", "", "one text"), Example("", "", "another")]
    for part in (examples[:3], examples[3:]):
        batch = ExampleBatch.of(("", example) for example in part)
        keys.add(batch, range(len(part)))
    prompts, whole = keys.arrays()
    assert prompts[0] == prompts[1] and len(set(prompts.tolist())) == 3  # without a prompt, the response tells
    assert len({*map(tuple, whole.tolist())}) == 4 and np.array_equal(
        whole[2], np.frombuffer(example_key(b"", b"", b"one text"), "<u8"))


def test_a_prompt_that_needs_no_change_has_the_key_of_any_other_spelling():
    spellings = ["caf\u00e9", " caf\u00e9", "cafe\u0301", "cafe\u0301\n"]
    batch = ExampleBatch.of(("", Example("", text, "a")) for text in spellings)
    keys = TextKeys()
    keys.add(batch, range(len(spellings)))
    prompts, whole = keys.arrays()
    assert set(prompts.tolist()) == {int.from_bytes(prompt_key("caf\u00e9"), "little")}
    assert len({*map(tuple, whole.tolist())}) == len(spellings)

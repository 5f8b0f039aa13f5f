"""Equal keys are equal texts, and nothing else."""
import hashlib
import unicodedata

import numpy as np

from hrm_megatron.data.example import Example
from hrm_megatron.data.text_keys import TextKeys, example_key, prompt_key


def test_a_prompt_is_known_by_its_normalized_text():
    assert prompt_key(" caf\u00e9?\n") == prompt_key(unicodedata.normalize("NFD", "café?")) \
        == hashlib.blake2b("caf\u00e9?".encode()).digest()[:8]
    assert len({prompt_key(text) for text in ("a", "b", "A", "a b")}) == 4


def test_an_example_is_known_by_all_its_texts_and_their_borders():
    given = [("", "ab", "c"), ("", "a", "bc"), ("cot", "ab", "c"), ("", "ab", "c "), ("c", "ot", "abc")]
    keys = [example_key(Example(*texts)) for texts in given]
    assert len(set(keys)) == 5 and all(len(key) == 16 for key in keys)
    assert example_key(Example("", "ab", "c", defaulted=True)) == keys[0]


def test_keys_stand_in_the_order_of_their_examples():
    keys = TextKeys()
    assert [array.shape for array in keys.arrays()] == [(0,), (0, 2)]
    examples = [Example("", "q", "1"), Example("", " q ", "2"), Example("", "", "one text"), Example("", "", "another")]
    for example in examples:
        keys.add(example)
    prompts, whole = keys.arrays()
    assert prompts[0] == prompts[1] and len(set(prompts.tolist())) == 3  # without a prompt, the response tells
    assert len({*map(tuple, whole.tolist())}) == 4 and np.array_equal(
        whole[2], np.frombuffer(example_key(examples[2]), "<u8"))

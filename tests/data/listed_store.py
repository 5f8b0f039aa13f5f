"""A dataset in memory with sources and keys, for tests of what is drawn from it."""
import hashlib

import numpy as np

from hrm_megatron.data.indexed_examples import SourceRange


class ListedStore:
    """Example i has the prompt `prompts[i]` and the lengths `prefixes[i]`, `targets[i]`; `files` holds all of that."""

    vocab_size, manifest = 300, None

    def __init__(self, folder, prompts, prefixes, targets, sources=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.prefix = str(folder / "x")
        self.prompts, self.prefixes, self.targets = prompts, np.asarray(prefixes), np.asarray(targets)
        firsts = np.cumsum([0, *(count for _, count in sources or [("x", len(prompts))])])
        self.sources = tuple(SourceRange(name, int(first), count) for (name, count), first in
                             zip(sources or [("x", len(prompts))], firsts, strict=False))
        self.files = [folder / "x.json"]
        self.files[0].write_text(repr((prompts, list(prefixes), list(targets), sources)))

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, i):
        return np.full(self.prefixes[i], i), np.full(self.targets[i], i)

    def example_name(self, i):
        return f"{self.prefix}, example {i}"

    def lengths(self, start=0, stop=None):
        return self.prefixes[start:stop], self.targets[start:stop]

    def prompt_keys(self):
        return None if self.prompts[0] is None else np.array(
            [int.from_bytes(hashlib.blake2b(prompt.encode()).digest()[:8], "little") for prompt in self.prompts],
            np.uint64)

    def example_keys(self):
        return None

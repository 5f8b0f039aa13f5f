"""Where sentences begin: by Punkt, loaded from a folder or trained on the corpus, and by borders that need no model.

Punkt looks for sentence ends only before whitespace. The text is first cut at certain ends: blank lines, and full stops
of scripts that put no space after them.
"""
from __future__ import annotations

import hashlib
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from nltk.tabdata import PunktDecoder, TabEncoder
from nltk.tokenize.punkt import PunktLanguageVars, PunktParameters, PunktSentenceTokenizer, PunktTrainer

from hrm_megatron.config import ConfigError
from hrm_megatron.program import signals_held

FILES = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")  # nltk's punkt_tab
SAMPLE_CHARACTERS = 2_000_000  # of the corpus are used to train Punkt, which reads some 500,000 a second
CERTAIN_END = re.compile(r"[。！？｡]+[」』”’）〉》】]*|\n[^\S\n]*(?=\n)")
BLOCK_CHARACTERS = 100_000  # longer blocks without a certain end are cut, to bound the time of Punkt


class ManyScripts(PunktLanguageVars):  # type: ignore[misc]  # nltk has no types
    """Sentence-end characters of all scripts that put a space after them."""

    sent_end_chars = (".", "?", "!", "…", "।", "॥", "؟", "۔", "։", "።", "᙮", "។", "။")


def sentence_starts(text: str, folder: Path) -> list[int]:
    """Return where the sentences of a text begin, from 0 on; whitespace between two belongs to the second."""
    punkt = _punkt(folder)
    starts, last_end = [0], 0
    for first, last in _blocks(text):
        for _, end in punkt.span_tokenize(text[first:last]):
            if last_end:
                starts.append(last_end)
            last_end = first + end
    return starts


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Cut a text at its certain sentence ends."""
    first = 0
    for end in [*(match.end() for match in CERTAIN_END.finditer(text)), len(text)]:
        while end - first > BLOCK_CHARACTERS:
            yield first, first + BLOCK_CHARACTERS
            first += BLOCK_CHARACTERS
        if end > first:
            yield first, end
        first = end


def train_sentences(texts: Iterable[str]) -> dict[str, str]:
    """Train Punkt: abbreviations, collocations and sentence starters. Returns the files of nltk's punkt_tab format."""
    trainer = PunktTrainer(lang_vars=ManyScripts())
    for text in texts:
        trainer.train(text, finalize=False)
    trainer.finalize_training()
    params, encoder = trainer.get_params(), TabEncoder()
    return dict(zip(FILES, (
        encoder.tups2tab(sorted(params.collocations)), encoder.set2txt(sorted(params.sent_starters)),
        encoder.set2txt(sorted(params.abbrev_types)),
        encoder.ivdict2tab(dict(sorted(params.ortho_context.items())))), strict=True))


def save_sentences(files: dict[str, str], folder: Path) -> None:
    """Write a folder that `sentence_starts` reads, completely or not at all. A folder that exists by then is kept:
    tasks of a job array train the same model from the same input."""
    partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        for name, contents in files.items():
            (partial / name).write_text(contents, encoding="utf-8", newline="")
        with signals_held():
            try:
                partial.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fingerprint(folder: Path) -> str:
    """Hash the contents of a model; refuse a folder that holds none."""
    try:
        contents = [(folder / name).read_bytes() for name in FILES]
        _punkt(folder)
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"--sentence-model {folder}: no Punkt model in nltk's punkt_tab format ({error}); name a "
                          "folder that is not there, and one is trained on the input and saved in it") from error
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


@lru_cache(maxsize=1)
def _punkt(folder: Path) -> PunktSentenceTokenizer:
    params, decoder = PunktParameters(), PunktDecoder()
    readers = (decoder.tab2tups, decoder.txt2set, decoder.txt2set, decoder.tab2intdict)
    for name, read in zip(FILES, readers, strict=True):
        with open(folder / name, encoding="utf-8") as file:
            found = read(file)
        setattr(params, name.partition(".")[0], set(found) if name != FILES[3] else found)
    return PunktSentenceTokenizer(params, lang_vars=ManyScripts())

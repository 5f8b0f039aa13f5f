"""Train a tokenizer from rows, in one pass and bounded memory."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import AUTO, BadRows, RowFormat
from hrm_megatron.data.progress import Bar
from hrm_megatron.data.provenance import Provenance
from hrm_megatron.data.readers import read_examples, with_shape
from hrm_megatron.data.tokenizer import (
    TextTokenizer,
    already_trained,
    check_output_folder,
    save_tokenizer,
    train_tokenizer,
)

TEXTS_PER_CAPPED_ROW = 10  # HRM-Text: of a file that sampling caps at n rows, its tokenizer training reads 10 n texts
ROWS = RowFormat()

log = logging.getLogger(__name__)


def learn_tokenizer(paths: Sequence[Path], output: str | Path, vocab_size: int, max_chars: int = 10_000,
                    overwrite: bool = False, rows: RowFormat = ROWS, bad_rows: BadRows | None = None,
                    keep_same: bool = False, max_per_file: int | None = None) -> TextTokenizer | None:
    """Train a tokenizer on the first `max_chars` characters of every instruction and response, and save it.

    Bad rows go to `bad_rows`; without it the first is raised. With the row shape `AUTO`, the first row of each file
    decides its shape. With `keep_same` a tokenizer made from the same files and settings is kept, and None returned. Of
    a file that sampling caps at `max_per_file` rows, at most `TEXTS_PER_CAPPED_ROW` times as many texts are read.
    """
    for name, value in (("max-chars", max_chars), ("max-per-file", 1 if max_per_file is None else max_per_file)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    formats = _told(paths, rows) if rows.shape == AUTO else dict.fromkeys(paths, rows)
    settings = {**rows.settings(), "row_shape": ", ".join(sorted({rows.shape for rows in formats.values()}))}
    capped = {} if max_per_file is None else {"max_per_file": max_per_file}
    provenance = Provenance.of(paths, **settings, vocab_size=vocab_size, max_chars=max_chars, **capped)
    if keep_same and already_trained(Path(output), provenance):
        return None
    check_output_folder(Path(output), overwrite)  # before the long work

    def texts(advance: Callable[[], object]) -> Iterator[str]:
        seen = False
        for path in paths:
            left = None if max_per_file is None else TEXTS_PER_CAPPED_ROW * max_per_file
            for _, example in read_examples([path], formats[path], bad_rows):
                yield example.instruction[:max_chars]
                yield example.response[:max_chars]
                seen = True
                advance()
                if left is not None and (left := left - 2) < 1:
                    break
        if not seen:
            raise ConfigError(f"no examples in {', '.join(map(str, paths))}; check --input")
        log.info("all texts are read; learning entries from them")

    with Bar(" examples") as bar:
        tokenizer = train_tokenizer(texts(bar.advance), vocab_size)
    save_tokenizer(tokenizer, output, overwrite, provenance)
    return TextTokenizer(output)


def _told(paths: Sequence[Path], rows: RowFormat) -> dict[Path, RowFormat]:
    """Detect the row shape of each file. A file without rows takes that of another file."""
    found = {path: with_shape(rows, [path]) for path in paths}
    first = {told.shape: (told, place) for told, place in reversed(found.values()) if place}
    for shape, (_, place) in sorted(first.items()):
        log.info("row shape: %s, as in %s", shape, place)
    any_of_them = next((told for told, _ in first.values()), replace(rows, shape=RowFormat.shape))
    return {path: told if place else any_of_them for path, (told, place) in found.items()}

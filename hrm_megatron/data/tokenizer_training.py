"""From rows to a tokenizer, in one pass and bounded memory."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import BadRows, RowFormat
from hrm_megatron.data.provenance import Provenance
from hrm_megatron.data.readers import read_examples
from hrm_megatron.data.tokenizer import (
    TextTokenizer,
    already_trained,
    check_output_folder,
    save_tokenizer,
    train_tokenizer,
)

TEXTS_PER_CAPPED_ROW = 10  # HRM-Text: where sampling caps a file at n rows, its tokenizer reads 10 n texts of it
ROWS = RowFormat()


def learn_tokenizer(paths: Sequence[Path], output: str | Path, vocab_size: int, max_chars: int = 10_000,
                    overwrite: bool = False, rows: RowFormat = ROWS, bad_rows: BadRows | None = None,
                    keep_same: bool = False, max_per_file: int | None = None) -> TextTokenizer | None:
    """Train a tokenizer on the first `max_chars` characters of every instruction and response, and save it.

    Bad rows go to `bad_rows`, else the first is raised. With `keep_same` a tokenizer that was made from the same files
    and settings is left alone, and None returned. Of a file that sampling caps at `max_per_file` rows, at most
    `TEXTS_PER_CAPPED_ROW` times as many texts are read.
    """
    for name, value in (("max-chars", max_chars), ("max-per-file", 1 if max_per_file is None else max_per_file)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    capped = {} if max_per_file is None else {"max_per_file": max_per_file}
    provenance = Provenance.of(paths, **rows.settings(), vocab_size=vocab_size, max_chars=max_chars, **capped)
    if keep_same and already_trained(Path(output), provenance):
        return None
    check_output_folder(Path(output), overwrite)  # before the long part

    def texts(advance: Callable[[int], object]) -> Iterator[str]:
        seen = False
        for path in paths:
            left = None if max_per_file is None else TEXTS_PER_CAPPED_ROW * max_per_file
            for _, example in read_examples([path], rows, bad_rows):
                yield example.instruction[:max_chars]
                yield example.response[:max_chars]
                seen = True
                advance(1)
                if left is not None and (left := left - 2) < 1:
                    break
        if not seen:
            raise ConfigError(f"no examples in {', '.join(map(str, paths))}; check --input")

    with tqdm(unit=" examples", disable=None) as bar:
        tokenizer = train_tokenizer(texts(bar.update), vocab_size)
    save_tokenizer(tokenizer, output, overwrite, provenance)
    return TextTokenizer(output)

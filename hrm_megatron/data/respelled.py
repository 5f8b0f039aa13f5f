"""PREFIX.tokenizer: a tokenizer with the spelling that flags give, replaced only together with its dataset."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hrm_megatron.data.spelling import Spelling
from hrm_megatron.data.tokenizer import PAD_TOKENS, TextTokenizer, check_output_folder, tokenizer_files
from hrm_megatron.program import whole_folder

FLAG = "--output-prefix"


@dataclass(frozen=True)
class Respelled:
    """The files, name -> text, of a tokenizer that is written to `folder` when everything else is done."""

    files: Mapping[str, str]
    folder: Path
    overwrite: bool

    @classmethod
    def of(cls, path: str | Path, spelling: Spelling, folder: Path, overwrite: bool) -> Respelled:
        """Load a tokenizer with another spelling. Refuses a folder whose contents `write` must not replace."""
        tokenizer = TextTokenizer(path, spelling=spelling)
        pad = next(token for token in (*PAD_TOKENS, spelling.eoa) if token in tokenizer.special_ids)
        made = cls(tokenizer_files(tokenizer.tokenizer, folder.name, pad, spelling), folder, overwrite)
        made._check()
        return made

    def write_aside(self, place: Path) -> Path:
        """Write it to a temporary folder inside `place`, to be read until `write`, and return that folder."""
        aside = place / self.folder.name
        aside.mkdir()
        self._write(aside)
        return aside

    def write(self) -> None:
        """Write it to `folder`, unless it is already there."""
        self._check()
        if not self._is_there():
            with whole_folder(self.folder) as partial:
                self._write(partial)

    def _check(self) -> None:
        if not self._is_there():
            check_output_folder(self.folder, self.overwrite, FLAG)

    def _is_there(self) -> bool:
        return all((self.folder / name).is_file() and (self.folder / name).read_bytes() == text.encode()
                   for name, text in self.files.items())

    def _write(self, folder: Path) -> None:
        for name, text in self.files.items():
            (folder / name).write_bytes(text.encode())

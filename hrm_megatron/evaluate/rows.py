"""Read the rows of a task's split, from the user's files or from the Hugging Face hub by `datasets`."""
from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import BadRow
from hrm_megatron.data.inputs import ROWS_SUFFIXES
from hrm_megatron.data.readers import ROWS, pieces
from hrm_megatron.data.text_files import shown
from hrm_megatron.evaluate.prompts import BadItem, Item
from hrm_megatron.evaluate.tasks import Source, Task
from hrm_megatron.generate.questions import check_text

PlacedRow = tuple[str, Mapping[str, Any]]


class PlacedItem(NamedTuple):
    """An item and the place of its row."""

    place: str
    item: Item


def read_items(task: Task, data: Path | None, limit: int | None = None) -> tuple[list[PlacedItem], list[PlacedItem]]:
    """Return a task's questions (the first `limit`) and the rows for its shots."""
    questions, shots, _ = read_first_items(task, data, limit)
    return questions, shots


def read_first_items(task: Task, data: Path | None,
                     limit: int | None) -> tuple[list[PlacedItem], list[PlacedItem], bool]:
    """Return what `read_items` does, and whether the split has rows after the first `limit`."""
    source = task.source
    rows = _rows(task, source.split, data)
    questions = _items(task, islice(rows, limit))
    if not questions:
        raise ConfigError(f"task {task.name}: split '{source.split}' has no row")
    cut = limit is not None and next(rows, None) is not None
    wanted = task.shots or any(task.special_shots.values())
    shots = _items(task, _rows(task, source.shots_split, data)) if source.shots_split and wanted else []
    return questions, shots, cut


def _items(task: Task, rows: Iterable[PlacedRow]) -> list[PlacedItem]:
    return [PlacedItem(place, _item(task, place, row)) for place, row in rows]


def _rows(task: Task, split: str, data: Path | None) -> Iterator[PlacedRow]:
    return _hub_rows(task.source, split) if data is None else _local_rows(task, split, data)


def _item(task: Task, place: str, row: Mapping[str, Any]) -> Item:
    for name, kind in task.fields.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(each.__name__ for each in kinds)
        if name not in row:
            raise ConfigError(f"{place}: no field '{name}' ({wanted}), which {task.title} has; the row has "
                              f"{', '.join(row)}")
        if not isinstance(row[name], kinds):
            raise ConfigError(f"{place}: {name}={shown(row[name])} is not of type {wanted}, as in {task.title}")
        _check_texts(f"{place}: {name}", row[name])
    try:
        return task.item(row)
    except BadItem as error:
        raise ConfigError(f"{place}: {error}") from error


def _check_texts(place: str, value: object) -> None:
    """Refuse texts that cannot be encoded as UTF-8, at any depth of a field."""
    if isinstance(value, str):
        check_text(place, value)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            _check_texts(f"{place}.{name}", each)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value, 1):
            _check_texts(f"{place} {number}", each)


def _local_rows(task: Task, split: str, data: Path) -> Iterator[PlacedRow]:
    for path in split_files(data / task.name, split):
        for piece in pieces(path):
            for place, row in piece.read(ROWS):
                if isinstance(row, BadRow):
                    raise row
                yield place, row


def split_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split: SPLIT.jsonl or similar, shards named SPLIT-00000-of-00002.parquet as on the hub, or
    all files in SPLIT/.

    More than one of these is refused, since the rows would be duplicates; so is an incomplete set of shards.
    """
    kinds = [sorted(path for path in places if path.is_file() and path.name.endswith(ROWS_SUFFIXES)) for places in (
        folder.glob(f"{split}.*"), folder.glob(f"{split}-*"), (folder / split).rglob("*"))]
    files = [path for kind in kinds for path in kind]
    same = [kind[0] for kind in kinds if kind]
    found: dict[str, Path] = {}
    for path in files:
        first = found.setdefault(re.sub(r"-of-\d+$", "", _stem(path)), path)
        same = same if len(same) > 1 or first == path else [first, path]
    if len(same) > 1:
        raise ConfigError(f"{folder}: split '{split}' is there more than once, as "
                          f"{' and '.join(str(path.relative_to(folder)) for path in same)}; keep one of them")
    for shard in filter(None, (re.fullmatch(r"(.+-)(\d{5,})-of-(\d{5,})", _stem(path)) for path in files)):
        for number in range(int(shard[3])):
            if (other := f"{shard[1]}{number:0{len(shard[2])}}") not in found:
                raise ConfigError(f"{shard[0]}: {other}-of-{shard[3]} is missing beside it; put it there, or give the "
                                  "rows in one file")
    if not files:
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise ConfigError(f"{folder}: no split '{split}' ({'there is ' + ', '.join(there) if there else 'no such '
                          'folder, or it is empty'}); put its rows there as {split}.jsonl or {split}.parquet")
    return files


def _stem(path: Path) -> str:
    return str(path).removesuffix(next(suffix for suffix in ROWS_SUFFIXES if path.name.endswith(suffix)))


def _hub_rows(source: Source, split: str) -> Iterator[PlacedRow]:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("without --data, rows come from the hub by datasets, which is not installed: pip install "
                          "datasets, or give --data DIR")
    import datasets

    for name in source.names or (source.name,):
        place = f"{source.path}{f'/{name}' if name else ''} {split}"
        try:
            rows = datasets.load_dataset(source.path, name, split=split)
        # No network, no such configuration or split, a script-based or broken dataset.
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(f"{place}: cannot be loaded from the hub ({' '.join(str(error).split())}); give --data "
                              "DIR") from error
        yield from ((f"{place}:{number}", row) for number, row in enumerate(rows))

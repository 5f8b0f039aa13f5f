"""Command-line flags that name input files and say how to read them, shared by all data tools."""
from __future__ import annotations

import argparse
import glob
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hrm_megatron.config import ConfigError, refuse_beside
from hrm_megatron.data.condition_rules import read_condition_rules
from hrm_megatron.data.example import AUTO, FIELDS, MAX_CHARACTERS, RawText, RowFormat
from hrm_megatron.data.manifest import REPORT, shard_folder
from hrm_megatron.data.readers import is_blank, sample_documents, with_shape
from hrm_megatron.data.readers.documents import SUFFIXES as DOCUMENT_SUFFIXES
from hrm_megatron.data.readers.saved_dataset import ITS_OWN_FILES, row_files, splits_of
from hrm_megatron.data.row_shapes import CONTEXT, INPUT, SHAPES, SYSTEM
from hrm_megatron.data.sentences import FILES, SAMPLE_CHARACTERS, fingerprint, save_sentences, train_sentences
from hrm_megatron.data.spelling import TAG_TOKENS

PACKED = (".gz", ".zst")
ROWS_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow", ".feather",
                 *(name + packed for name in (".jsonl", ".ndjson", ".json") for packed in PACKED))
KINDS = "jsonl, plain or in .gz or .zst, Parquet, Arrow, or datasets saved to disk"
FRACTION = (0.1, 0.5)  # default of --prefix-fraction
TEXT_FLAGS = ("sentence_model", "prefix_fraction", "cut_seed", "text_key")
DATA_SUFFIXES = {".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".csv", ".tsv"}  # may hold rows
SHOWN_NAMES = 5

log = logging.getLogger(__name__)


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `inputs_of` reads, and --on-bad-row."""
    parser.add_argument("--input", nargs="+", action="extend", required=True, metavar="PATH",
                        help=f"files, globs or folders of {KINDS}")
    parser.add_argument("--json-keys", nargs=3, default=FIELDS, metavar=("CONDITION", "INSTRUCTION", "RESPONSE"),
                        help="names of the fields in your rows (default: the names above in lower case)")
    parser.add_argument("--row-shape", choices=(AUTO, *SHAPES), default=AUTO,
                        help="fields: those of --json-keys; messages: chats, an example for each turn of the "
                             "assistant; alpaca: instruction, input, output (default: what the first row is; a "
                             "tokenizer is trained on files of different shapes, each told by its first row)")
    parser.add_argument("--ignore-fields", nargs="+", action="extend", default=[], metavar="NAME",
                        choices=(*SYSTEM, INPUT, *CONTEXT),
                        help=f"leave out parts of prompts that rows have in fields beside those of their shape: "
                             f"{', '.join(SYSTEM)} and {INPUT}, which are spelled, and {', '.join(CONTEXT)}, with "
                             "which a row is bad")
    parser.add_argument("--split-sentences", action="store_true",
                        help="the rows are plain documents, and files of .txt and .md are: cut them at borders of "
                             "sentences into examples that fill the context")
    parser.add_argument("--sentence-model", type=Path, metavar="DIR",
                        help="Punkt model for --split-sentences, in nltk's punkt_tab format; where there is none, one "
                             "is trained on the input and saved there")
    parser.add_argument("--prefix-fraction", nargs=2, type=float, metavar=("LOW", "HIGH"),
                        help=f"share of a document's example that is its prefix, drawn for each (default: {FRACTION})")
    parser.add_argument("--cut-seed", type=int, help="for --prefix-fraction (default: 0)")
    parser.add_argument("--text-key", help="name of the field with the document's text (default: text)")
    parser.add_argument("--default-condition", metavar="TAGS",
                        help="comma-separated tags of rows that have no condition, or '' for none; the reference's "
                             "own is direct (default: such a row is bad)")
    parser.add_argument("--condition-rules", type=Path, metavar="FILE",
                        help="YAML list of rules that give rows without a condition their tags, by patterns in their "
                             "texts; where none fits, --default-condition holds")
    parser.add_argument("--max-characters", type=int, default=MAX_CHARACTERS,
                        help="a row with a longer text is bad (default: %(default)s)")
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error",
                        help="stop at a bad row, or count and leave it out (default: %(default)s)")


def inputs_of(args: argparse.Namespace, tags: Iterable[str] = TAG_TOKENS,
              one_shape: bool = True) -> tuple[list[Path], RowFormat]:
    """Return the input files and the row format that the flags of `add_input_flags` give. The row shape, if no flag
    gives it, is that of the first row; with `one_shape=False` it stays AUTO, to be determined for each file."""
    given = [f"--{name.replace('_', '-')}" for name in TEXT_FLAGS if getattr(args, name) is not None]
    if given and not args.split_sentences:
        raise ConfigError(f"{given[0]} has no effect without --split-sentences")
    paths = find_inputs(args.input, args.split_sentences)
    rows = RowFormat(tuple(args.json_keys), args.default_condition, args.max_characters, tuple(tags),
                     ignored_fields=tuple(args.ignore_fields))
    if meant := [name for name in rows.ignored_fields if name in rows.keys]:
        raise ConfigError(f"--ignore-fields {meant[0]}: --json-keys says that it is read; drop one")
    if args.condition_rules:
        refuse_beside("--condition-rules", {"--split-sentences": args.split_sentences})
        rows = replace(rows, condition_rules=read_condition_rules(args.condition_rules, tags))
    named_keys = rows.keys[1:] != FIELDS[1:]
    if args.split_sentences:
        refuse_beside("--split-sentences", {"--ignore-fields": args.ignore_fields})
        if named_keys or args.row_shape != AUTO:
            flag = "--json-keys" if named_keys else "--row-shape"
            raise ConfigError(f"--split-sentences reads documents, {flag} rows; leave one out")
        return paths, _with_raw_text(rows, args, paths)
    if args.row_shape != AUTO:
        if named_keys and args.row_shape != "fields":
            raise ConfigError(f"--json-keys names fields that --row-shape {args.row_shape} does not read; drop one")
        return paths, replace(rows, shape=args.row_shape)
    if not one_shape:
        return paths, replace(rows, shape=AUTO)
    if not named_keys:
        rows, place = with_shape(rows, paths)
        log.info("row shape: %s, as in %s", rows.shape, place or "no row")
    return paths, rows


def _with_raw_text(rows: RowFormat, args: argparse.Namespace, paths: Sequence[Path]) -> RowFormat:
    folder = args.sentence_model
    if folder is None:
        raise ConfigError("--split-sentences needs --sentence-model DIR; where there is none, one is trained and saved "
                          "there")
    raw = RawText(tuple(args.prefix_fraction or FRACTION), args.cut_seed or 0, folder, "", args.text_key or "text")
    if not folder.exists():
        log.info("training a model of sentences")
        samples = sample_documents(paths, replace(rows, raw=raw), SAMPLE_CHARACTERS)
        save_sentences(train_sentences(samples), folder)
    return replace(rows, raw=replace(raw, fingerprint=fingerprint(folder)))


def find_inputs(inputs: Sequence[str], documents: bool = False) -> list[Path]:
    """Resolve files, glob patterns and folders (searched for ROWS_SUFFIXES) in the order given, each file once, under
    the first of its names. With `documents`, plain text files are included.

    A file of a kind that cannot be read is refused with its kind. Files beside the inputs that are not read are listed
    in a warning, those that may hold rows first; so are further names of a file, which links give it.
    """
    suffixes = ROWS_SUFFIXES + (DOCUMENT_SUFFIXES if documents else ())
    found: dict[str, Path] = {}
    other_names: list[Path] = []
    unread: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            candidates = sorted(_walk(path))
            files = [file for file in candidates if file.name.endswith(suffixes) and file.is_file() and not _ours(file)
                     and not file.name.startswith(".")]
            files, candidates = _without_rests(files, candidates)
        elif path.exists():
            candidates = files = [path]
            if not path.is_file():
                raise ConfigError(f"--input {name} is no file that can be read twice; write it to one first")
        else:
            matches = [*_matches(name)]
            files = sorted(match for match in matches if match.is_file() and not _ours(match))
            # to warn of a.jsonl.gz beside b.jsonl, given *.jsonl
            candidates = [*matches, *_matches(f"{name}.*")]
        read_here = set(files)
        unread.update(dict.fromkeys(file for file in candidates if file not in read_here))
        if not files:
            what = "has no file to read" if path.is_dir() else "matches no file"
            raise ConfigError(f"--input {name} {what}{_beside(unread)}; give files, globs or folders of {KINDS}")
        for file in files:
            _check_name(file)
            first = found.setdefault(os.path.realpath(file), file)
            if os.path.abspath(first) != os.path.abspath(file):
                other_names.append(file)
    read = {path for file in found.values() for path in (file.absolute(), *file.absolute().parents)}
    if len(splits := splits_of([*found.values()])) > 1:
        log.warning("--input: splits of a dataset are all read, to be trained on: %s; to keep some for evaluation, "
                    "name the files or folders of the others",
                    ", ".join(f"{split} ({file})" for split, file in splits.items()))
    if names := [path for path in unread if path.absolute() not in read]:
        log.warning("not read: %s", _listed(names))
    if other_names:
        log.warning("read once, under the first of their names: %s", _listed(other_names))
    if twice := [path for path in found.values() if path.suffix in PACKED and path.absolute().with_suffix("") in read]:
        log.warning("read beside the file of the same name that is not packed: %s", _listed(twice))
    if blank := [path for path in found.values() if is_blank(path, documents)]:
        log.warning("no row in: %s", _listed(blank))
    return list(found.values())


def _without_rests(files: list[Path], candidates: list[Path]) -> tuple[list[Path], list[Path]]:
    """Remove what a dataset saved to disk keeps beside its rows: caches of computed results, and its metadata."""
    listed = {folder: row_files(folder) for folder in {file.parent for file in files}}
    rows_of = {folder: None if rows is None else {*rows} for folder, rows in listed.items()}
    described = {folder for folder, rows in rows_of.items() if rows is not None}
    described |= {folder.parent for folder in described}  # the folder around several splits
    kept = [file for file in files if (rows := rows_of[file.parent]) is None or file in rows]
    return kept, [file for file in candidates if file.parent not in described or file.name not in ITS_OWN_FILES]


def _check_name(file: Path) -> None:
    """Refuse a name that is not UTF-8: messages and manifests could not hold it."""
    name = os.fsencode(file).decode("utf-8", "backslashreplace")
    if name != str(file):
        raise ConfigError(f"--input {name}: the name is not UTF-8; rename the file, or the folder that is called so")


def _ours(file: Path) -> bool:
    """Return whether a file was written by our tools and is no corpus text: a dataset report or a sentence model. If
    these were read, every run would change the dataset."""
    return ((file.name.endswith(REPORT) and shard_folder(str(file).removesuffix(REPORT)).is_dir())
            or (file.name in FILES and all((file.parent / name).is_file() for name in FILES)))


def _matches(pattern: str) -> Iterator[Path]:
    """Expand a glob as glob.glob(recursive=True) does, except that each folder below a `**` is searched once: links may
    lead around in circles."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    at = parts.index("**")
    for top in glob.glob(os.sep.join([*parts[:at], ""])) if at else [""]:
        for folder in _folders(top):
            yield from _matches(os.path.join(glob.escape(folder), *parts[at + 1:] or ["*"]))


def _folders(top: str) -> Iterator[str]:
    """Yield a folder ("": the current one) and all below it that are not hidden, each once, behind links last."""
    starts, seen = [top], set[str]()
    for start in starts:  # grows while iterating
        for here, folders, _ in os.walk(start or os.curdir):
            if (real := os.path.realpath(here)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [link for name in folders if os.path.islink(link := os.path.join(here, name))]
            yield here


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, and the folders in it that are not searched: symlinks and hidden ones."""
    for here, folders, files in os.walk(folder):
        apart = [name for name in folders if name.startswith(".") or os.path.islink(os.path.join(here, name))]
        yield from (Path(here) / name for name in (*files, *apart))
        folders[:] = {*folders}.difference(apart)


def _may_hold_rows(path: Path) -> bool:
    return not path.name.startswith(".") and (path.is_dir() or not DATA_SUFFIXES.isdisjoint(path.suffixes))


def _listed(paths: Sequence[Path]) -> str:
    paths = sorted(paths, key=_may_hold_rows, reverse=True)  # a stable sort
    more = len(paths) - SHOWN_NAMES
    return ", ".join(map(str, paths[:SHOWN_NAMES])) + (f" and {more} more" if more > 0 else "")


def _beside(unread: dict[Path, None]) -> str:
    return f" (but {_listed(list(unread))})" if unread else ""

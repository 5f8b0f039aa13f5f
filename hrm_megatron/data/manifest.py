"""PREFIX.json: the sources that a dataset was made from, the shard of each, and the checksums of all shards."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.lint import Lint
from hrm_megatron.data.shards import Shard
from hrm_megatron.data.tokenizer import TextTokenizer

READING = 2  # version of the row readers; 1 dropped parts of prompts, trained on masked turns and split chats
FORMAT = 2  # 1 was PREFIX.bin and PREFIX.idx, without "format"
REPORT = ".report.md"
PREPROCESS = "python tools/preprocess_data.py"
TOKENIZER = ("tokenizer_fingerprint", "vocab_size", "boq", "eoq", "eoa")
TOTALS = ("examples", "tokens", "max_row_length")
SHA256 = "sha256"  # of everything else in the file, to detect damage


@dataclass(frozen=True)
class Left:
    """Rows of one kind that were left out: how many, and the message about the first."""

    count: int
    first: str


@dataclass(frozen=True)
class Source:
    """An input file as it was read, and the result; `shard` is None if it gave no example, `lint` (of `Lint.to_json`)
    if it was not linted; `reading` is the `READING` of the version that made it."""

    name: str
    num_bytes: int
    modified_ns: int
    sha256: str
    shard: Shard | None
    truncated: int = 0
    defaulted: int = 0
    noted: Mapping[str, int] = field(default_factory=dict)
    bad_rows: Mapping[str, Left] = field(default_factory=dict)
    lint: Mapping[str, Any] | None = None
    reading: int = 1  # older manifests have no such field

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Source:
        """Read the result of `asdict`; raises KeyError or TypeError if it is something else."""
        return cls(**{**value, "shard": Shard.from_json(value["shard"]) if value["shard"] else None,
                      "bad_rows": {kind: Left(**left) for kind, left in value["bad_rows"].items()}})

    @property
    def examples(self) -> int:
        return self.shard.examples if self.shard else 0


@dataclass(frozen=True)
class Manifest:
    """The sources of a dataset in order, and the settings that decide what is made of them. `tokenizer` holds what
    training needs to know about the tokenizer."""

    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    sources: tuple[Source, ...]

    @property
    def shards(self) -> list[Shard]:
        """The shard of each source that has one; sources with equal contents share a shard."""
        return [source.shard for source in self.sources if source.shard]

    @property
    def lint(self) -> Lint:
        """Lint results of all linted sources, merged."""
        found = Lint()
        for source in self.sources:
            if source.lint is not None:
                found.merge(Lint.from_json(source.lint))
        return found

    @property
    def bad_rows(self) -> dict[str, Left]:
        """The rows of all sources that were left out, by kind."""
        found: dict[str, Left] = {}
        for source in self.sources:
            for kind, left in source.bad_rows.items():
                before = found.get(kind, Left(0, left.first))
                found[kind] = Left(before.count + left.count, before.first)
        return dict(sorted(found.items()))

    def left_out(self) -> list[str]:
        """Return a line for each kind of bad row: how many were left out, and the first."""
        return [f"skipped {left.count}: {kind}, first {left.first}" for kind, left in self.bad_rows.items()]

    @property
    def totals(self) -> dict[str, int]:
        shards = self.shards
        return dict(examples=sum(shard.examples for shard in shards), tokens=sum(shard.tokens for shard in shards),
                    max_row_length=max((shard.max_row_length for shard in shards), default=0))


def facts_of(tokenizer: TextTokenizer) -> dict[str, Any]:
    """Return what a manifest records about a tokenizer."""
    return {"tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
            "boq": tokenizer.boq, "eoq": tokenizer.eoq, "eoa": tokenizer.eoa}


def manifest_path(prefix: str | Path) -> Path:
    """Return PREFIX.json; `with_suffix` would be wrong, because the prefix may contain dots."""
    return Path(f"{prefix}.json")


def shard_folder(prefix: str | Path) -> Path:
    return Path(f"{prefix}.shards")


def report_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}{REPORT}")


def write_manifest(prefix: str | Path, manifest: Manifest, scratch: Path) -> None:
    """Write PREFIX.json atomically; `scratch` is a folder on the same file system."""
    content = {"format": FORMAT, **manifest.tokenizer, **manifest.totals, "settings": dict(manifest.settings),
               "sources": [asdict(source) for source in manifest.sources]}
    write_sealed(manifest_path(prefix), content, scratch)


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Read PREFIX.json; None if it is of the older form, whose contents `read_json` returns."""
    path = manifest_path(prefix)
    content = read_json(path)
    if "format" not in content:
        return None
    if content["format"] != FORMAT:
        raise broken(path, f"of format {content['format']!r}, this version reads {FORMAT}")
    check_seal(path, content)
    try:
        return Manifest({name: content[name] for name in TOKENIZER}, content["settings"],
                        tuple(map(Source.from_json, content["sources"])))
    except (KeyError, TypeError, AttributeError) as error:
        raise broken(path, f"not of this version ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ConfigError if the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise broken(path, f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise broken(path, f"has no {', '.join(TOKENIZER)}")
    return content


def write_sealed(path: Path, content: Mapping[str, Any], scratch: Path) -> None:
    """Write a JSON object with its own digest, atomically."""
    partial = scratch / "json"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps({**content, SHA256: _seal(content)}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def check_seal(path: Path, content: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the object has the digest that it was written with."""
    if content.get(SHA256) != _seal({name: value for name, value in content.items() if name != SHA256}):
        raise broken(path, "damaged: its contents do not have the digest that it ends with")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def broken(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path}: {reason}; delete it and run {PREPROCESS} again, or copy it again")


def check_settings(prefix: str | Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Refuse to add examples made with other settings to a dataset."""
    for name in sorted({*have, *want}):
        if have.get(name) != want.get(name):
            raise ConfigError(f"{prefix} was made with {name}={have.get(name)!r}, not {want.get(name)!r}; choose "
                              "another --output-prefix, or make all of it again with --overwrite")


def check_names(names: Iterable[str], paths: Iterable[Path]) -> None:
    """Refuse two sources with the same name: rules and reports could not tell them apart."""
    seen: dict[str, Path] = {}
    for name, path in zip(names, paths, strict=True):
        if name in seen:
            raise ConfigError(f"{seen[name]} and {path} would both be called {name}; give --input the folder that "
                              "holds both, or rename one")
        seen[name] = path

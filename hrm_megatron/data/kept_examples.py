"""Which examples of a dataset are trained on, if some are left out: a list beside it, PREFIX.kept.json and
PREFIX.kept.npy.

No data is copied: the row plan skips the other examples.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.npy_file import load_array
from hrm_megatron.program import whole_file

BITS, FACTS = "kept.npy", "kept.json"  # one bit per example; which dataset the list belongs to
WAY_OUT = "deduplicate again, or delete it to train on all examples"
HASHED_BYTES = 1 << 24  # at a time


def kept_files(prefix: str | Path) -> tuple[Path, Path]:
    return Path(f"{prefix}.{BITS}"), Path(f"{prefix}.{FACTS}")


def write_kept(store: IndexedExamples, kept: np.ndarray, facts: dict[str, Any]) -> None:
    """Write which examples are kept, bool [n]; the list becomes valid with `facts`, which are written last."""
    bits, described = kept_files(store.prefix)
    try:
        with whole_file(described) as partial:
            partial.write_text(json.dumps(facts | {"dataset": dataset_digest(store)}, indent=1), encoding="utf-8")
            with whole_file(bits) as packed:
                np.save(packed, np.packbits(kept), allow_pickle=False)
                described.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{bits}: cannot write ({error.strerror}); free some space") from error


def kept_mask(store: IndexedExamples) -> np.ndarray | None:
    """Return which examples are kept, bool [n]; None if all are. Refuses a list of another dataset."""
    bits = _kept_bits(store)
    return None if bits is None else np.unpackbits(bits, count=len(store)).view(bool)


def kept_count(store: IndexedExamples) -> int | None:
    """Return the number of examples that are kept; None if all are."""
    bits = _kept_bits(store)
    return None if bits is None else int(np.bitwise_count(bits).sum(dtype=np.int64))


def kept_digest(store: IndexedExamples) -> str | None:
    """Return a hash of which examples are kept; None if all are."""
    bits = _kept_bits(store)
    return None if bits is None else hashlib.sha256(bits.data).hexdigest()


def _kept_bits(store: IndexedExamples) -> np.ndarray | None:
    """Read one bit per example, packed eight to a byte, the last byte padded with zeros."""
    bits, described = kept_files(store.prefix)
    if not described.exists():
        return None
    with _damage_named(described):
        if _made_for(described) != dataset_digest(store):
            raise ValueError("made for another dataset")
        found = load_array(bits)
        if found.dtype != np.uint8 or found.shape != (-(-len(store) // 8),):
            raise ValueError(f"{bits.name} holds {found.dtype} of shape {found.shape}")
        return found


def _made_for(described: Path) -> str:
    return str(json.loads(described.read_text(encoding="utf-8"))["dataset"])


@contextlib.contextmanager
def _damage_named(described: Path) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise ConfigError(f"{described}: does not say of which dataset it is; {WAY_OUT}") from error
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ConfigError(f"{described}: {error}; {WAY_OUT}") from error


def forget_kept_of_another(store: IndexedExamples) -> bool:
    """Remove a list made for an earlier state of the dataset; return whether there was one. Refuses a damaged one."""
    bits, described = kept_files(store.prefix)
    if not described.exists():
        return False
    with _damage_named(described):
        if _made_for(described) == dataset_digest(store):
            return False
    described.unlink()
    bits.unlink(missing_ok=True)
    return True


def dataset_digest(store: IndexedExamples) -> str:
    """Hash everything that decides the lengths and the split of a dataset: the names of its sources and the names of
    their shards, which are content hashes; for the older form the contents of the files, but only the size of the .bin.
    """
    hashed = hashlib.sha256()
    if store.manifest:
        hashed.update(repr([(source.name, source.shard.name) for source in store.manifest.sources if source.shard]
                           ).encode())
        return hashed.hexdigest()
    for path in store.files:
        hashed.update(f"{path.stat().st_size}\0".encode())
        if path.suffix != ".bin":
            with path.open("rb") as file:
                while block := file.read(HASHED_BYTES):
                    hashed.update(block)
    return hashed.hexdigest()

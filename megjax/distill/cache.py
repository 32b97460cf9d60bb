"""What is computed once and kept on disk: latents, text embeddings, a teacher's samples.

A cache is a folder of shards, each a folder of `.npy` files of which single rows are read; one that was
interrupted goes on with the shards that are missing.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from megjax.errors import MegError
from megjax.files import writable_folder, write_file
from megjax.training.processes import together

JUDGED_AFTER = 1000
"""Examples, from which on the share of broken ones is checked; of fewer, at the end."""

OUTAGE = 16
"""A shard of so many examples or more, all broken, means that a disk or a network fails."""

ABANDONED_AFTER_S = 24 * 3600
"""Age of a half-written shard that no run can still be at work on."""


class Block(NamedTuple):
    """A shard's contents.

    Args:
        arrays: by name; one row for each whole example, in order.
        broken: a line on each of the others.
    """

    arrays: Mapping[str, np.ndarray]
    broken: Sequence[str] = ()


Compute = Callable[[int, int], Block]
"""(start, stop) of the examples -> what is kept of them."""


class Stored(NamedTuple):
    """An array in a file. It stays closed: a large cache has more files than a process may have open.

    Args:
        path: of the `.npy` file.
        offset: of the first row; bytes.
        dtype: of the elements.
        shape: rows first.
    """

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def row(self, i: int) -> np.ndarray:
        """Read row i."""
        size = math.prod(self.shape[1:])
        offset = self.offset + i * size * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, size, offset=offset).reshape(self.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """Random access to the rows of a finished cache.

    Args:
        shards: of each, the arrays by name.
        starts: of each, the number of its first row.
        count: rows in all, or the first of them.
    """

    shards: tuple[Mapping[str, Stored], ...]
    starts: tuple[int, ...]
    count: int

    def first(self, count: int) -> Cache:
        """The first rows alone."""
        return dataclasses.replace(self, count=min(count, self.count))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """The arrays of a row."""
        row = range(len(self))[index]
        shard = bisect.bisect_right(self.starts, row) - 1
        return {name: array.row(row - self.starts[shard]) for name, array in self.shards[shard].items()}


def cached(
    folder: Path,
    key: Mapping[str, Any],
    examples: int,
    compute: Compute,
    *,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
    max_broken: float = 0.05,
    shard: int = 1024,
) -> Cache:
    """Open the cache of a key, computing what is missing first; processes share the shards.

    Args:
        folder: of all caches, on a disk that all processes see.
        key: all that the contents depend on, in JSON's types: model, preset, data. Each key has its own
            folder.
        examples: how many there are.
        compute: makes a shard's contents.
        say: told of each broken example.
        progress: told the examples done.
        max_broken: share of broken examples that ends the run, once a thousand were seen.
        shard: examples a shard.

    Raises:
        MegError: a folder that cannot be written, too many broken examples, or a shard without a whole one,
            which is then not kept (unless all may be broken).
    """
    own = folder / digest(key)
    if jax.process_index() == 0:
        writable_folder(folder, "cache")
        own.mkdir(exist_ok=True)
        for unfinished in own.glob(".part-*"):
            # Another run, at work on the same cache, may finish it and so rename it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - unfinished.stat().st_mtime > ABANDONED_AFTER_S:
                    shutil.rmtree(unfinished, ignore_errors=True)
        _write_json(own / "key.json", dict(key))
    together("cache opened")
    parts = [own / f"part-{i:06d}" for i in range(-(-examples // shard))]
    seen, broken = 0, []
    for i, part in list(enumerate(parts))[jax.process_index() :: jax.process_count()]:
        start, stop = i * shard, min((i + 1) * shard, examples)
        if not part.exists():
            block = compute(start, stop)
            for line in block.broken:
                say(f"skipped {line}")
            if max_broken < 1 and len(block.broken) == stop - start >= OUTAGE:
                raise MegError(
                    f"examples {start} to {stop}: no example is whole: {'; '.join(block.broken[:3])}, ... "
                    "Mend the data or the network and start again: what was read before is kept"
                )
            _write(part, block)
        seen, broken = seen + stop - start, [*broken, *_broken(part)]
        progress(stop)
        if seen >= JUDGED_AFTER:
            _judge(broken, seen, max_broken)
    together("cache complete")
    broken = [line for part in parts for line in _broken(part)]
    _judge(broken, examples, max_broken)
    if broken and jax.process_index() == 0:
        say(f"{len(broken)} of {examples} examples were broken and are left out")
    return _open(own, parts)


def digest(key: Mapping[str, Any]) -> str:
    """A key's short name: equal for equal contents, whatever their order."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """Tell model folders apart: a digest of their files' names and contents; some seconds for SDXL's 7 GB."""
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(
        p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".msgpack", ".txt")
    ):
        with path.open("rb") as file:
            contents = hashlib.file_digest(file, "blake2b").hexdigest()
        found.update(f"{path.relative_to(folder).as_posix()} {contents}\n".encode())
    return found.hexdigest()


def _write(part: Path, block: Block) -> None:
    temporary = _beside(part)
    try:
        temporary.mkdir()
        for name, array in block.arrays.items():
            np.save(temporary / f"{name}.npy", np.ascontiguousarray(array))  # row by row, as `Stored` reads
        _write_json(temporary / "broken.json", list(block.broken))
    except (OSError, MegError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise MegError(
            f"{part}: cannot be written ({getattr(error, 'strerror', None) or error}); make room and start "
            "again: what was computed before is kept"
        ) from None
    try:
        temporary.rename(part)
    except OSError:
        # The other run was quicker, with the same contents.
        if not part.exists():
            raise
        shutil.rmtree(temporary)


def _broken(part: Path) -> list[str]:
    return json.loads((part / "broken.json").read_text())


def _judge(broken: Sequence[str], seen: int, max_broken: float) -> None:
    if len(broken) > max_broken * seen:
        raise MegError(
            f"{len(broken)} of {seen} examples are broken, more than {max_broken:.0%}: "
            f"{'; '.join(broken[:3])}, ... Mend the data, or raise --data.max-broken"
        )


def _stored(path: Path) -> Stored:
    array = np.load(path, mmap_mode="r")
    return Stored(path, array.offset, array.dtype, array.shape)


def _open(folder: Path, parts: list[Path]) -> Cache:
    shards = [{path.stem: _stored(path) for path in sorted(part.glob("*.npy"))} for part in parts]
    counts = [next((array.shape[0] for array in shard.values()), 0) for shard in shards]
    if not sum(counts):
        raise MegError(f"{folder}: no example is whole")
    *starts, count = itertools.accumulate(counts, initial=0)
    return Cache(tuple(shards), tuple(starts), count)


def _write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=1, sort_keys=True, default=str))


def _beside(path: Path) -> Path:
    """A hidden name that no other run has, which may be filling the same cache."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}")

"""One loader over captioned pictures: a folder, a stream from the Hugging Face hub, or `scenes`.

Pictures are read once, in order, to be encoded and cached (`megjax.distill.cache`); training then draws from
the cache in shuffled batches whose position is a number.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from megjax.checks import within
from megjax.data.grammar import captions
from megjax.data.pictures import to_uint8, upright_rgb
from megjax.data.render import render
from megjax.data.scenes import sample_scenes
from megjax.errors import MegError
from megjax.files import expanded
from megjax.text import is_text

SCENES, HUB = "scenes", "hf:"
FETCH_SECONDS = 20.0
"""That a server may be silent; of an answer in all, three times as long."""
FETCH_BYTES = 2**28
SCENE_BATCH = 64


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which captioned pictures."""

    source: str = SCENES
    """`scenes`; a folder with metadata.jsonl (`file_name` and a caption a line); `hf:ORG/NAME`, streamed."""
    pictures: int = 0
    """How many, from the first; 0 takes all there are, of a folder."""
    split: str = "train"
    """Of a Hugging Face data set."""
    picture: str = "image"
    """Name of the hub's column: pictures, or addresses to fetch them from."""
    caption: str = "text"
    """Name of the caption's column, or of its field in metadata.jsonl."""
    min_side: int = 0
    """Pass over what the hub's columns `width` and `height` say is smaller; pixels."""
    max_broken: float = 0.05
    """Share of broken pictures and empty captions that ends the run."""
    two_objects: float = 0.5
    """Of `scenes`: the share with two objects."""
    seed: int = 0
    """Of `scenes`."""


class Example(NamedTuple):
    """A captioned picture.

    Args:
        image_SxSx3: its middle, square.
        caption: not empty.
    """

    image_SxSx3: UInt8[np.ndarray, "S S 3"]
    caption: str


class Broken(NamedTuple):
    """What could not be read, and why."""

    name: str
    reason: str


Read = Callable[[int, int], list[Example | Broken]]
"""(start, stop) -> these examples; calls go forwards."""


class Pictures(NamedTuple):
    """Captioned pictures in a fixed order.

    Args:
        count: of examples, broken ones included.
        read: reads some.
    """

    count: int
    read: Read


def open_pictures(config: DataConfig, size: int) -> Pictures:
    """Open a source of captioned pictures, cut to their middle square and resized.

    Args:
        config: which.
        size: of the pictures; pixels a side.

    Raises:
        MegError: no such folder or data set, no pictures in it, or a count that is missing or negative.
    """
    within(config, 0, math.inf, "pictures")
    if config.source != SCENES and not config.source.startswith(HUB):
        return _folder(config, expanded(config.source), size)
    if config.pictures < 1:
        raise MegError(f"{config.source} has no end: say how many pictures (--data.pictures)")
    read = _scenes(config, size) if config.source == SCENES else _stream(config, size)
    return Pictures(config.pictures, read)


def data_key(config: DataConfig) -> dict[str, Any]:
    """What the pictures depend on, in JSON's types: the config, and a folder's list of them.

    Pictures that are replaced under their names are not noticed.
    """
    key = {k: v for k, v in dataclasses.asdict(config).items() if k != "max_broken"}
    path = expanded(config.source) / "metadata.jsonl"
    if path.is_file():
        key["metadata"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return key


def _scenes(config: DataConfig, size: int) -> Read:
    key = jax.random.key(config.seed)

    @functools.lru_cache(maxsize=2)
    def drawn(number: int) -> tuple[np.ndarray, list[str]]:
        scenes = sample_scenes(jax.random.fold_in(key, number), SCENE_BATCH, two_objects=config.two_objects)
        pixels = np.asarray(render(scenes, size))
        return to_uint8(pixels), captions(scenes)

    def one(i: int) -> Example:
        images, texts = drawn(i // SCENE_BATCH)
        return Example(images[i % SCENE_BATCH], texts[i % SCENE_BATCH])

    return lambda start, stop: [one(i) for i in range(start, stop)]


def _folder(config: DataConfig, folder: Path, size: int) -> Pictures:
    path = folder / "metadata.jsonl"
    try:
        # `splitlines` would also cut at the separators U+2028 and U+0085, which JSON allows in a caption.
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise MegError(
            f"{path}: cannot be read ({error.strerror}); a folder of pictures needs a line of JSON for each, "
            f'{{"file_name": "a.png", "{config.caption}": "a cat"}}'
        ) from None
    except UnicodeDecodeError as error:
        raise MegError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    lines = lines[: config.pictures or None]
    if not lines:
        raise MegError(f"{path}: names no pictures")

    def one(i: int) -> Example | Broken:
        try:
            entry = json.loads(lines[i])
            picture, caption = folder / entry["file_name"], entry.get(config.caption)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return Broken(f"{path.name}, entry {i + 1}", "no JSON with a file_name")
        return _example(str(picture), picture.read_bytes, caption, size)

    return Pictures(len(lines), _threaded(one))


def _stream(config: DataConfig, size: int) -> Read:
    try:
        import datasets
    except ImportError:
        raise MegError("datasets is not installed; `pip install 'megjax[train]'`") from None
    name = config.source.removeprefix(HUB)
    try:
        stream = datasets.load_dataset(name, split=config.split, streaming=True)
    except Exception as error:  # the hub's, the network's or the library's
        raise MegError(f"{config.source}: cannot be opened ({str(error).partition(chr(10))[0]})") from None
    if stream.features is not None and isinstance(stream.features.get(config.picture), datasets.Image):
        stream = stream.cast_column(config.picture, datasets.Image(decode=False))
    take = _forwards(lambda start: _large_enough(stream, config, start))

    def read(start: int, stop: int) -> list[Example | Broken]:
        try:
            entries = take(start, stop)
        except Exception as error:  # the same, hours later
            raise MegError(
                f"{config.source}: cannot be read on from picture {start} "
                f"({str(error).partition(chr(10))[0]}); start again: what was read before is kept"
            ) from None
        if len(entries) < stop - start:
            raise MegError(
                f"{config.source}: ends after {start + len(entries)} pictures; lower --data.pictures"
            )
        return _threaded(lambda i: _of_row(entries[i], f"{name}, row {start + i}", config, size))(
            0, len(entries)
        )

    return read


def _large_enough(stream: Iterable[Mapping[str, Any]], config: DataConfig, start: int) -> Iterator[Any]:
    def fits(row: Mapping[str, Any]) -> bool:
        sides = [row[side] for side in ("width", "height") if isinstance(row.get(side), int | float)]
        return min(sides, default=config.min_side) >= config.min_side

    return itertools.islice(filter(fits, stream), start, None)


def _forwards(start_at: Callable[[int], Iterator[Any]]) -> Callable[[int, int], list[Any]]:
    """Read an iterable by ranges that go forwards; going back starts it anew."""
    rows, at = None, 0

    def take(start: int, stop: int) -> list[Any]:
        nonlocal rows, at
        if rows is None or start < at:
            rows, at = start_at(start), start
        taken = list(itertools.islice(rows, start - at, stop - at))
        at = stop
        return taken

    return take


def _of_row(row: Mapping[str, Any], name: str, config: DataConfig, size: int) -> Example | Broken:
    """A row of a data set: the picture's bytes, or its address."""
    value = row.get(config.picture)

    def contents() -> bytes:
        if isinstance(value, str):
            # Some servers refuse a client without a name.
            request = urllib.request.Request(value, headers={"User-Agent": "megjax"})
            # Python would open `file:` too, and with it this machine's own files.
            if request.type not in ("http", "https"):
                raise MegError("only http and https addresses are fetched")
            with urllib.request.urlopen(request, timeout=FETCH_SECONDS) as answer:
                return _bounded(answer)
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        raise MegError(f"column {config.picture!r} holds neither pictures nor addresses")

    where = f"{name} ({value})" if isinstance(value, str) else name
    return _example(where, contents, row.get(config.caption), size)


def _bounded(answer: Any) -> bytes:
    """Read an answer, of a server that may never come to its end."""
    found, until = bytearray(), time.monotonic() + 3 * FETCH_SECONDS
    while part := answer.read1(2**16):
        found += part
        if len(found) > FETCH_BYTES or time.monotonic() > until:
            raise MegError(f"more than {FETCH_BYTES >> 20} MiB, or longer than {3 * FETCH_SECONDS:g} s")
    return bytes(found)


def _example(name: str, contents: Callable[[], bytes], caption: Any, size: int) -> Example | Broken:
    if not isinstance(caption, str) or not caption.strip():
        return Broken(name, "empty caption")
    if not is_text(caption):
        return Broken(name, "a caption that is not Unicode text")
    try:
        return Example(decode_picture(contents(), size), caption.strip())
    # Whatever a damaged file, a dead address or a hostile header makes a decoder raise.
    except Exception as error:
        return Broken(name, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}")


def decode_picture(contents: bytes, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Decode a picture, upright, and return its middle square, resized.

    Args:
        contents: of the file.
        size: pixels a side.

    Raises:
        OSError: not a whole picture.
    """
    image = upright_rgb(Image.open(io.BytesIO(contents)))
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def _threaded(one: Callable[[int], Example | Broken]) -> Read:
    """Read examples side by side, in order."""

    def read(start: int, stop: int) -> list[Example | Broken]:
        numbers = grain.MapDataset.range(start, stop).map(one)
        return list(numbers.to_iter_dataset(grain.ReadOptions(num_threads=16, prefetch_buffer_size=64)))

    return read


@runtime_checkable
class Rows(Protocol):
    """Random access to examples of equal shapes, such as a cache."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: Any) -> Mapping[str, np.ndarray]:
        """The arrays of one."""
        ...


def shuffled_batches(rows: Rows, batch: int, seed: int, part: tuple[int, int] = (0, 1)) -> Any:
    """Draw batches without end, every epoch in another order: Grain's iterator, with its position.

    A batch has the same rows in the same order in any number of parts: of the global batch each gets its
    consecutive rows. The position is the batch's number, so that a run can go on in other parts.

    Args:
        rows: to draw from.
        batch: rows of a global batch.
        seed: of the order.
        part: which part of the batch, of how many; of a mesh it is `megjax.training.sharding.batch_part`'s.

    Returns:
        An iterator with `get_state` and `set_state`, see `megjax.training.loop.Batches`.

    Raises:
        MegError: fewer rows than a batch has, or a batch that does not divide by the parts.
    """
    index, count = part
    if batch % count or len(rows) < batch:
        raise MegError(
            f"batch {batch}: must divide by its {count} parts and be at most the {len(rows)} examples"
        )
    endless = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    # Whole batches alone: of an endless source there are no others, and Grain's count of them would overflow.
    data = endless.batch(batch // count, drop_remainder=True)[index::count]
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))

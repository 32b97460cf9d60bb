"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from megjax.errors import MegError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`, which takes its place once the block ends, and goes if it fails.

    Args:
        path: its folder is made if there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        yield temporary
        # The name must not reach the disk before the contents do.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def writable(path: Path, name: str = "output") -> Path:
    """Return `path` if a file can be written there: asked before anything is computed for it.

    Args:
        path: of the file.
        name: of the argument that gave it.

    Raises:
        MegError: no folder, no permission, or a folder in its place.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise MegError(f"{name} {path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise MegError(f"{name} {path}: is a folder; choose a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise MegError(f"{name} {path}: not writable; choose another file")
    return path

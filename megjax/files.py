"""Files and folders that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
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
        _to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty, hidden folder, which takes `folder`'s place once the block ends, and goes if it fails.

    Killed at the worst moment, it leaves no `folder`, and old and new beside its place: never half of one.

    Args:
        folder: the folder above it is made if there is none.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{uuid.uuid4().hex}-{folder.name}")
    old = folder.with_name(f"{temporary.name}-old")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _to_disk(path)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Wait for a file's contents: its name must not reach the disk before them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


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


def writable_folder(folder: Path, name: str = "out") -> Path:
    """Make a folder and see that it can be written, before anything is computed for it.

    Args:
        folder: that is to receive results.
        name: of the argument that gave it.

    Raises:
        MegError: if it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MegError(
            f"--{name} {folder} cannot be written: {error.strerror or error}; choose another folder"
        ) from None
    return folder

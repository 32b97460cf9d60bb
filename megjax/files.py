"""Files and folders that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from megjax.errors import MegError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`, which takes its place once the block ends, and goes if it fails.

    Args:
        path: its folder is made if there is none; a symbolic link stays, and what it names is replaced.

    Raises:
        MegError: a pipe, a device or a folder in its place, or the system refuses.
    """
    try:
        place = _followed(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        _is_there(place, str(path))
        temporary = _beside(place)
        try:
            yield temporary
            _to_disk(temporary)
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MegError(_refused(path, error)) from error


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty, hidden folder, which takes `folder`'s place once the block ends, and goes if it fails.

    Killed at the worst moment, it leaves no `folder`, and old and new beside its place: never half of one.

    Args:
        folder: the folder above it is made if there is none; a symbolic link stays, and what it names is
            replaced.

    Raises:
        MegError: the system refuses.
    """
    try:
        place = _followed(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(place)
        temporary.mkdir()
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    _to_disk(path)
            _put(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise MegError(_refused(folder, error)) from error


def expanded(path: str | Path) -> Path:
    """Return a path with its `~` or `~user` written out.

    Raises:
        MegError: no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise MegError(f"{path}: {error}") from None


def cache_folder() -> Path | None:
    """Return `$XDG_CACHE_HOME/megjax`, or `~/.cache/megjax`; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megjax"
    except RuntimeError:
        return None


def _put(temporary: Path, place: Path) -> None:
    """Put a folder in another's place, which comes back if that fails."""
    old = place.with_name(f"{temporary.name}-old")
    if place.exists():
        place.rename(old)
    try:
        temporary.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _refused(path: Path, error: OSError) -> str:
    return f"{path} cannot be written: {error.strerror or error}; mend that, or choose another place"


def _followed(path: Path) -> Path:
    """What a symbolic link names: renaming onto the link itself would take its place."""
    return Path(os.path.realpath(path))


def _beside(path: Path) -> Path:
    """A hidden name beside `path`, with as much of its own as leaves it short enough for any file system."""
    return path.with_name(f".{uuid.uuid4().hex}-{path.name[-32:]}")


def _is_there(place: Path, said: str) -> bool:
    """Whether a file is there, which may be replaced; `said` begins the refusal of anything else."""
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise MegError(f"{said}: is a folder; choose a file")
    if not stat.S_ISREG(mode):
        raise MegError(f"{said}: is a pipe or a device, which would be replaced; choose a file")
    return True


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
        MegError: no folder, no permission, a name too long, or a folder, a pipe or a device in its place.
    """
    try:
        place = _followed(path)
        if not place.parent.is_dir():
            shown = place.parent if path.parent.is_dir() else path.parent
            raise MegError(f"{name} {path}: there is no folder {shown}; create it first")
        there = _is_there(place, f"{name} {path}")
    except OSError as error:
        raise MegError(f"{name} {path}: {error.strerror or error}; choose another file") from None
    # The file is replaced, which is for its folder to allow.
    if not os.access(place.parent, os.W_OK | os.X_OK) or (there and not os.access(place, os.W_OK)):
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

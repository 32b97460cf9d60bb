"""Folders of results, seen to before anything is computed for them."""

from __future__ import annotations

from pathlib import Path

from megjax.errors import MegError
from megjax.files import write_file


def prepare(folder: Path, name: str = "out") -> None:
    """Make a folder and see that it can be written.

    Args:
        folder: that is to receive results.
        name: of the argument that gave it.

    Raises:
        MegError: if it cannot.
    """
    try:
        write_file(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise MegError(
            f"--{name} {folder} cannot be written: {error.strerror or error}; choose another folder"
        ) from None

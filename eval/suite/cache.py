"""Stages' results kept by content: the file's name says what went in, its first bytes what came out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import serialization

from megjax.files import write_file

ROOT = Path(__file__).parents[2]


def digest(value: Any) -> str:
    """Return the SHA-256 of a value as JSON has it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def files_digest(paths: list[Path], root: Path) -> str:
    """Return the SHA-256 of files' names and contents."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(str(path.relative_to(root)).encode() + b"\0")
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def source_digest() -> str:
    """Return the digest of the code that results depend on: the package, eval's modules and the presets.

    `present` is left out: it draws what is measured.
    """
    presentation = Path(__file__).parent / "present"
    code = [p for name in ("megjax", "eval", "configs") for p in (ROOT / name).rglob("*.py")]
    data = list((ROOT / "megjax").rglob("hardware.json"))
    return files_digest([p for p in code + data if presentation not in p.parents], ROOT)


def read(path: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return what `write` stored, or None if there is nothing or it is damaged, which is said."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        say(f"cache: {path.name} cannot be read ({error.strerror}); computing it again")
        return None
    if len(content) < 32 or hashlib.sha256(content[32:]).digest() != content[:32]:
        say(f"cache: {path.name} is damaged; computing it again")
        return None
    found: Any = serialization.msgpack_restore(content[32:])
    return found


def write(path: Path, value: dict[str, Any]) -> None:
    """Store nested dicts and lists of numbers, strings and arrays."""
    payload = serialization.msgpack_serialize(_lists(value))
    write_file(path, hashlib.sha256(payload).digest() + payload)


def _lists(value: Any) -> Any:
    """Return a value with lists in place of tuples, which msgpack lacks."""
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value

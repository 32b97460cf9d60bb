"""What a device measured of its link to a server, kept between runs for as long as a link may last."""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import Any

from megjax.client.channel import Throughput
from megjax.errors import MegError
from megjax.files import cache_folder, write_file

FILE = "links.json"

LASTS_S = 600.0
"""A measurement that is older is forgotten."""


def recall(server: str, now_s: float | None = None) -> Throughput:
    """Return what is known of the link to a server; nothing where there is no such file, or not a whole one.

    Args:
        server: its address.
        now_s: seconds since the epoch, if not now.
    """
    now_s = time.time() if now_s is None else now_s
    entry: Any = _read().get(server)
    try:
        bits, seconds, at_s = (float(entry[name]) for name in ("bits", "seconds", "at_s"))
    except (TypeError, KeyError, ValueError, OverflowError):
        return Throughput()
    if not (0 <= now_s - at_s <= LASTS_S and 0 < bits < math.inf and 0 < seconds < math.inf):
        return Throughput()
    return Throughput(bits, seconds)


def remember(server: str, known: Throughput, now_s: float | None = None) -> None:
    """Keep what is known of the link to a server; where nothing can be written, it is not.

    Args:
        server: its address.
        known: see `megjax.client.channel.observed`.
        now_s: seconds since the epoch, if not now.
    """
    now_s = time.time() if now_s is None else now_s
    if known.rate_bps is None:
        return
    entries = {
        name: entry
        for name, entry in _read().items()
        if isinstance(entry, dict)
        and isinstance(entry.get("at_s"), int | float)
        and now_s - entry["at_s"] <= LASTS_S
    }
    entries[server] = {"bits": known.bits, "seconds": known.seconds, "at_s": now_s}
    if (folder := cache_folder()) is not None:
        with contextlib.suppress(MegError):
            write_file(folder / FILE, json.dumps(entries))


def _read() -> dict[str, Any]:
    if (folder := cache_folder()) is None:
        return {}
    try:
        entries = json.loads((folder / FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}

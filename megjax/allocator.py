"""The C library's allocator, told what XLA's CPU backend needs of it."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep what it frees, in one arena, and say whether it is glibc and does.

    XLA's CPU backend allocates a program's temporaries anew at each call. Above 32 MiB glibc takes them from
    the kernel and gives them back every time, and every page is zeroed again: a third of a training step of
    MEG-Tiny. Call it at the start of a program, before JAX makes its threads.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(name, value) for name, value in settings)

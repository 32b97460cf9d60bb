"""Compiled programs, kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def keep_compilations() -> None:
    """Keep all that JAX compiles on disk, unless the environment says where (or that JAX should not).

    A second start then compiles nothing. They lie in `$XDG_CACHE_HOME/megjax/xla`, or `~/.cache/megjax/xla`.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megjax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

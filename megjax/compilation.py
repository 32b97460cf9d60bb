"""Compiled programs, kept between runs."""

from __future__ import annotations

import os

import jax

from megjax.files import cache_folder


def keep_compilations() -> None:
    """Keep all that JAX compiles on disk, unless the environment says where (or that JAX should not).

    A second start then compiles nothing. They lie in `xla` of `megjax.files.cache_folder`, if there is one.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := cache_folder()) is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

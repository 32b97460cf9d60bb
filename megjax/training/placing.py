"""What every process holds whole, put onto a mesh that spans all processes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from megjax.training.sharding import batch_part, batch_sharding, replicated


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Put arrays onto a mesh; `jax.device_put` does so for one process only.

    Args:
        tree: of arrays that are the same on all processes.
        shardings: of each.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf: Any, sharding: Any) -> Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def place_key(key: Key[Array, ""], mesh: Mesh) -> Key[Array, ""]:
    """The same key on all devices."""
    wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(key))
    return jax.jit(wrap, out_shardings=replicated(mesh))(np.asarray(jax.random.key_data(key)))


def place_batch(local: PyTree, mesh: Mesh) -> PyTree:
    """This process's rows as its part of the global batch, see `batch_part`."""
    sharding, (_, parts) = batch_sharding(mesh), batch_part(mesh)

    def put(x: Any) -> Array:
        host = np.asarray(x)
        whole = (parts * len(host), *host.shape[1:])
        return jax.make_array_from_process_local_data(sharding, host, whole)

    return jax.tree.map(put, local)

"""The device's weights in int8, a quarter of float32's bytes; activations stay as they are."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from megjax.errors import MegError
from megjax.models import Params


class Quantised(NamedTuple):
    """A kernel with one scale per output channel, value * scale.

    Args:
        value: int8, in the kernel's shape.
        scale: in the kernel's dtype, (1, ..., 1, channels).
    """

    value: Int8[Array, ...]
    scale: Float[Array, ...]


def quantised(params: Params) -> Params:
    """Round every kernel to int8, symmetrically, its output channels each to a 127th of their largest weight.

    Args:
        params: of a network; norms and biases stay.

    Raises:
        MegError: without qwix.
    """
    if importlib.util.find_spec("qwix") is None:
        raise MegError("int8 weights take qwix: pip install 'megjax[int8]'")
    import qwix

    def kernel(path: Any, leaf: Array) -> Any:
        if path[-1].key != "kernel":
            return leaf
        rounded = qwix.quantize(leaf, jnp.int8, channelwise_axes=(leaf.ndim - 1,))
        return Quantised(rounded.qvalue, rounded.scale)

    return jax.tree_util.tree_map_with_path(kernel, params)


def dequantised(params: Params) -> Params:
    """Kernels as the network reads them; the identity where nothing is quantised."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, Quantised):
            return leaf
        # Or the compiler would fold it into float constants, four times as large.
        value = jax.lax.optimization_barrier(leaf.value)
        return value.astype(leaf.scale.dtype) * leaf.scale

    return jax.tree.map(whole, params, is_leaf=lambda leaf: isinstance(leaf, Quantised))

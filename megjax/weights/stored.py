"""A tensor in a file, known by its header."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {name: np.dtype(getattr(jnp, name)) for name in ("float32", "float16", "bfloat16")}


class Tensor(NamedTuple):
    """A stored tensor: what its header says, and how to read it.

    Args:
        shape: as stored.
        dtype: numpy's name, or the format's own if it's none of `DTYPES`.
        read: returns the values; raises `WeightsError` if the file is shorter than its header says.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file; for a dtype in `DTYPES`."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

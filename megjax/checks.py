"""Checks of settings before anything is computed: errors name the setting, its value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

from megjax.errors import MegError

DTYPES = ("float32", "bfloat16", "float16")
LARGEST_SEED = 2**32 - 1
"""Of JAX's and NumPy's generators alike."""


def within(config: Any, low: int | float, high: int | float, *names: str) -> None:
    """Refuse fields that are not finite numbers from `low` to `high`; None passes, of a tuple each item must.

    Args:
        config: a dataclass.
        low: the least allowed.
        high: the greatest allowed; may be infinite.
        names: of fields.

    Raises:
        MegError: for the first that is not allowed.
    """
    for name in names:
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not (low <= value <= high and value < math.inf):
                allowed = f"at least {_said(low)}" if math.isinf(high) else f"{_said(low)} to {_said(high)}"
                raise MegError(f"{name} {given}: {allowed} is allowed")


def above(config: Any, low: int | float, *names: str) -> None:
    """Refuse fields that are not finite numbers above `low`; None passes.

    Raises:
        MegError: for the first that is not allowed.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not low < value < math.inf:
            raise MegError(f"{name} {value}: above {low:g} is allowed")


def _said(bound: int | float) -> str:
    """A bound in full: `:g` would round whole numbers of more than six digits."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def known_dtype(dtype: str) -> None:
    """Refuse a dtype that networks do not run in.

    Raises:
        MegError: naming those that they do.
    """
    if dtype not in DTYPES:
        raise MegError(f"dtype {dtype}: choose from {', '.join(DTYPES)}")

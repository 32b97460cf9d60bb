"""Low-rank students (LoRA, arXiv 2106.09685): pure functions over parameter trees, W + (alpha/rank) A B."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from megjax.errors import MegError
from megjax.models import Params
from megjax.models.placement import is_stacked
from megjax.training.step import Inputs, Loss, Metrics


def init_lora(key: Key[Array, ""], shapes: Params, rank: int) -> Params:
    """Factors of every kernel: `{..., "kernel": {"a": (.., I, r), "b": (.., r, O)}}`; B starts at zero.

    A convolution's kernel counts as one matrix, its window's and input channels together on one side; layers
    that are stacked on a leading depth axis have factors of their own.

    Args:
        key: of A, drawn with variance 1/I.
        shapes: the network's parameters or their shapes.
        rank: r; a kernel that is no larger on one side keeps its weights.

    Raises:
        MegError: a rank below 1, or one that no kernel exceeds.
    """
    if rank < 1:
        raise MegError(f"LoRA rank {rank}: at least 1 is needed")
    factors: Params = {}
    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(shapes)):
        names = [str(entry.key) for entry in path]
        if names[-1] != "kernel":
            continue
        depth, rows, columns = _matrix(names, leaf.shape)
        if rank >= min(rows, columns):
            continue
        a = jax.random.normal(jax.random.fold_in(key, number), (*depth, rows, rank)) / math.sqrt(rows)
        into = factors
        for name in names[:-1]:
            into = into.setdefault(name, {})
        into["kernel"] = {"a": a, "b": jnp.zeros((*depth, rank, columns))}
    if not factors:
        raise MegError(f"LoRA rank {rank}: no kernel is larger")
    return factors


def merge_lora(params: Params, factors: Params, scale: float = 1.0) -> Params:
    """W + scale A B where there are factors, each in its parameter's dtype; the rest as it is.

    Args:
        params: the frozen weights.
        factors: from `init_lora`.
        scale: alpha/rank.
    """

    def merged(own: Any, of: Any) -> Any:
        if of is None:
            return own
        if not isinstance(own, dict):
            delta = jnp.matmul(of["a"], of["b"], preferred_element_type=jnp.float32)
            return (own.astype(jnp.float32) + scale * delta.reshape(own.shape)).astype(own.dtype)
        return {name: merged(value, of.get(name)) for name, value in own.items()}

    return merged(params, factors)


def lora_loss(loss: Loss, scale: float = 1.0) -> Loss:
    """A loss of the factors; the frozen weights are `Inputs.frozen["teacher"]`.

    Args:
        loss: of the whole parameters, over `Inputs`.
        scale: alpha/rank.
    """

    def of_factors(factors: Any, key: Key[Array, ""], inputs: Inputs) -> tuple[Float[Array, ""], Metrics]:
        return loss(merge_lora(inputs.frozen["teacher"], factors, scale), key, inputs)

    return of_factors


def _matrix(names: list[str], shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """A kernel's depth axis, if it is stacked, then its rows and columns as a matrix."""
    depth = shape[:1] if is_stacked(names) else ()
    rest = shape[len(depth) :]
    return depth, math.prod(rest[:-1]), rest[-1]

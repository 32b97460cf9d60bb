"""The rules by which parameters follow their gradients: optax's, with clipping and a warm-up."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import jax
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, muon

from megjax.errors import MegError
from megjax.models.placement import is_stacked

Rule: TypeAlias = Literal["adamw", "adafactor", "muon"]
"""AdamW(0.9, 0.999); Adafactor (arXiv:1804.04235), with a second moment by rows and columns and no first; or
Muon (arXiv:2502.16982), with a first moment alone, which makes each matrix's update orthogonal."""

Moments: TypeAlias = Literal["float32", "bfloat16"]
"""Of the first moment."""

MIN_SIDE = 16
"""Muon leaves narrower matrices, a network's first and last, to AdamW (with Nesterov's momentum)."""


def make_optimizer(
    learning_rate: float,
    steps: int,
    *,
    warmup: int,
    rule: Rule = "adamw",
    clip: float = 1.0,
    weight_decay: float = 0.01,
    decay: bool = True,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """A rule after clipping by the global norm, with a linear warm-up.

    All rules take the learning rates of AdamW: Adafactor's is not relative to the parameters' size, and
    Muon's updates have the root mean square that AdamW's have in training.

    Args:
        learning_rate: after the warm-up.
        steps: in all.
        warmup: steps of the warm-up; 0 for none.
        rule: which.
        clip: the gradients' largest global norm.
        weight_decay: decoupled, times the learning rate.
        decay: let the learning rate fall to zero by a cosine, else keep it.
        moments: dtype of the first moment.

    Raises:
        MegError: a warm-up below 0; a dtype for Adafactor's first moment.
    """
    if warmup < 0:
        raise MegError(f"warmup {warmup}: must be at least 0")
    if rule == "adafactor" and moments != "float32":
        raise MegError(f"moments {moments}: adafactor keeps no first moment; leave it out")
    if decay:
        schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    elif warmup:
        schedule = optax.linear_schedule(0.0, learning_rate, warmup)
    else:
        # A linear schedule of no steps stays at its start, 0.
        schedule = optax.constant_schedule(learning_rate)
    if rule == "adafactor":
        # Its own decay is not scaled by the learning rate, AdamW's is.
        follow = optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    elif rule == "muon":
        follow = muon(
            schedule,
            weight_decay=weight_decay,
            mu_dtype=moments,
            adam_weight_decay=weight_decay,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        )
    else:
        follow = optax.adamw(schedule, weight_decay=weight_decay, mu_dtype=moments)
    return optax.chain(optax.clip_by_global_norm(clip), follow)


def matrices(params: PyTree) -> PyTree:
    """Which axes of each parameter Muon takes as a matrix's rows and columns; None leaves it to AdamW.

    Each layer of a stack (`megjax.models.layers.stack`) is a matrix of its own.

    Args:
        params: dense kernels (in, out), convolutions' (height, width, in, out), and vectors, each with a
            depth axis before them if they are stacked.
    """

    def axes(path: tuple[Any, ...], p: Any) -> MuonDimensionNumbers | None:
        depth = int(is_stacked(path))
        if p.ndim - depth not in (2, 4) or min(p.shape[-2:]) < MIN_SIDE:
            return None
        return MuonDimensionNumbers(tuple(range(depth, p.ndim - 1)), p.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)

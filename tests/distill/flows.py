"""Flows and networks small enough to know by heart."""

import jax
import jax.numpy as jnp

from megjax.diffusion import Conditioning
from megjax.diffusion.perflow import window_edges
from megjax.distill.perflow import Pairs, chord_target
from megjax.distill.student_loss import Batch


def linear_student(kind, factors, sched):
    """A student whose flow multiplies each window's start by a factor, along a straight line."""

    def student(z, t_B):
        start_B, end_B = window_edges(sched, t_B)
        factor = jnp.asarray(factors)[(1000 - start_B) // 250]
        share = (t_B - start_B).astype(z.dtype) / (end_B - start_B).astype(z.dtype)
        z_s = z / (1 + (factor - 1) * share)[:, None, None, None]
        pairs = Pairs(z_s, z_s * factor[:, None, None, None], start_B, end_B)
        return chord_target(pairs, t_B, sched, kind).target_BxHxWxC

    return student


def toy_unet(params, z, t_B, text, pooled, sizes, token_merge=None):
    """A predictor of one number, that hears the text."""
    return params["w"] * z + params["b"] * jnp.mean(text, axis=(1, 2))[:, None, None, None]


def toy_batch(batch: int) -> Batch:
    def condition(value: float) -> Conditioning:
        return Conditioning(jnp.full((batch, 3, 2), value), jnp.zeros((batch, 2)), jnp.zeros((batch, 6)))

    z0 = jax.random.normal(jax.random.key(3), (batch, 2, 2, 1))
    return Batch({"w": jnp.array(0.5), "b": jnp.array(0.0)}, z0, condition(1.0), condition(0.0))

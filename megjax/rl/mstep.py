"""The M-step of MEG-CVPO: fit the policy to the weighted particles inside a trust region, Eqs. (42)-(47)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from megjax.rl.networks import Gaussian, kl_parts, log_prob

PolicyFn: TypeAlias = Callable[[PyTree], Gaussian]
"""Policy parameters -> pi(.|s) on the batch's states."""


@dataclasses.dataclass(frozen=True)
class TrustRegion:
    """Bounds and dual steps of the M-step."""

    mean_bound: float = 0.005
    """eps_mu."""
    std_bound: float = 0.0005
    """eps_std."""
    dual_lr: float = 0.0
    """Step of the KL bounds' duals, Eq. (47). At 0 `project` alone keeps the bounds; the authors take 0.1."""
    dual_max: float = 0.5
    """Largest dual; read only if `dual_lr` is above 0."""
    iterations: int = 1
    """Gradient steps of an M-step; the authors take 5."""
    project: bool = True
    """Shorten a step that leaves the trust region, instead of trusting the duals alone."""
    box_penalty: float = 1.0
    """Weight of the mean's squared distance from the box [0, 1], outside which it means nothing."""


class MStep(NamedTuple):
    """What an M-step did."""

    params: PyTree
    opt_state: optax.OptState
    beta: Float[Array, " 2"]
    """Duals of the two KL bounds."""
    kl: Float[Array, " 2"]
    """KL of the mean and of the spread after the step."""


def m_step(
    policy: PolicyFn,
    params: PyTree,
    opt_state: optax.OptState,
    beta: Float[Array, " 2"],
    particles_SxKxA: Float[Array, "S K a"],
    weights_SxK: Float[Array, "S K"],
    optimizer: optax.GradientTransformation,
    region: TrustRegion,
) -> MStep:
    """Maximise mean_s sum_k q_k log pi_theta(a_k|s) s.t. KL(pi_old || pi_theta) <= eps, Eq. (42).

    Mean and spread have a bound each (each fitted with the other at its old value). Their duals follow the
    gradient, Eqs. (45)-(47), at the rate `region.dual_lr`, which is 0 unless set. The KL being quadratic in
    the step, Eqs. (43)-(44), a step that is too long by a factor is shortened by its square root if
    `region.project`.
    """
    old = jax.lax.stop_gradient(policy(params))
    bounds = jnp.asarray([region.mean_bound, region.std_bound], old.mean.dtype)

    def kl_of(new: Gaussian) -> Array:
        return jnp.stack([jnp.mean(part) for part in kl_parts(old, new)])

    def loss_of(params: PyTree, beta: Array) -> tuple[Array, Array]:
        new = policy(params)

        def fit(mean: Array, std: Array) -> Array:
            gaussian = Gaussian(mean[:, None, :], std[:, None, :])
            return -jnp.mean(jnp.sum(weights_SxK * log_prob(gaussian, particles_SxKxA), axis=1))

        kl = kl_of(new)
        outside = jnp.maximum(jnp.abs(new.mean - 0.5) - 0.5, 0.0)
        penalty = region.box_penalty * jnp.mean(jnp.sum((outside / old.std) ** 2, axis=-1))
        return fit(new.mean, old.std) + fit(old.mean, new.std) + beta @ (kl - bounds) + penalty, kl

    def iterate(_: Any, carry: tuple) -> tuple:
        params, opt_state, beta = carry
        gradient, kl = jax.grad(loss_of, has_aux=True)(params, beta)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        beta = jnp.clip(beta + region.dual_lr * (kl - bounds), 0.0, region.dual_max)
        return optax.apply_updates(params, updates), opt_state, beta

    start = params
    params, opt_state, beta = jax.lax.fori_loop(0, region.iterations, iterate, (params, opt_state, beta))
    kl = kl_of(policy(params))
    if region.project:

        def shorten(_: Any, carry: tuple) -> tuple:
            params, kl = carry
            share = jnp.minimum(1.0, jnp.sqrt(jnp.min(bounds / jnp.maximum(kl, 1e-12))))
            params = jax.tree.map(lambda old, new: old + share * (new - old), start, params)
            return params, kl_of(policy(params))

        # Thrice: the later corrections are for what the higher orders leave, and mostly do nothing.
        params, kl = jax.lax.fori_loop(0, 3, shorten, (params, kl))
    return MStep(params, opt_state, beta, kl)

"""The learners' small networks as plain parameter trees: a Gaussian policy and critics of (state, action)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Mlp: TypeAlias = tuple[tuple[Array, Array], ...]
"""Weights and biases, layer by layer."""

Squash: TypeAlias = Literal["none", "tanh"]
"""How a policy's mean is kept in [0, 1]: not at all (the environment clips), or by tanh (the authors')."""

MOST_FRAMES = 1e6

Activation: TypeAlias = Callable[[Array], Array]
"""Between layers."""


class Gaussian(NamedTuple):
    """A diagonal Gaussian over actions."""

    mean: Float[Array, "*b a"]
    std: Float[Array, "*b a"]


class Moments(NamedTuple):
    """Running mean and variance of observations."""

    count: Float[Array, ""]
    mean: Float[Array, " o"]
    var: Float[Array, " o"]


def init_mlp(key: PRNGKeyArray, sizes: tuple[int, ...], last_scale: float = 1.0) -> Mlp:
    """Return LeCun-normal layers; the last one's weights are scaled by `last_scale`, all biases are 0."""
    pairs = list(itertools.pairwise(sizes))
    # One draw for all layers: each has its own compiled code, and that takes longer than the run.
    normal = jax.random.normal(key, (sum(fan_in * fan_out for fan_in, fan_out in pairs),))
    layers, start = [], 0
    for i, (fan_in, fan_out) in enumerate(pairs):
        scale = (last_scale if i == len(pairs) - 1 else 1.0) * fan_in**-0.5
        weight = normal[start : start + fan_in * fan_out].reshape(fan_in, fan_out)
        layers.append((scale * weight, jnp.zeros(fan_out)))
        start += fan_in * fan_out
    return tuple(layers)


def mlp(params: Mlp, x: Float[Array, "*b i"], activation: Activation = jax.nn.relu) -> Float[Array, "*b o"]:
    """Apply a multilayer perceptron."""
    for i, (weight, bias) in enumerate(params):
        x = add_bias(x @ weight, bias)
        if i < len(params) - 1:
            x = activation(x)
    return x


def add_bias(x: Float[Array, "*b o"], bias: Float[Array, " o"]) -> Float[Array, "*b o"]:
    """Add a bias along the last axis."""
    return x + jax.lax.expand_dims(bias, range(x.ndim - 1))


def init_policy(key: PRNGKeyArray, observation_size: int, action_size: int, hidden: tuple[int, ...]) -> Mlp:
    """Return a policy network that starts in the middle of the box for every state."""
    return init_mlp(key, (observation_size, *hidden, 2 * action_size), last_scale=0.01)


def policy(
    params: Mlp,
    observation: Float[Array, "*b o"],
    std_range: tuple[Float[Array, ""] | float, Float[Array, ""] | float],
    squash: Squash = "none",
) -> Gaussian:
    """Return pi(.|s); actions mean something in [0, 1].

    The standard deviation runs from the range's low to its high end through a sigmoid, so that a learner may
    anneal either.
    """
    out = mlp(params, observation, jnp.tanh if squash == "none" else jax.nn.relu)
    raw_mean, raw_std = jnp.split(out, 2, axis=-1)
    mean = 0.5 + 0.5 * (jnp.tanh(raw_mean) if squash == "tanh" else raw_mean)
    low, high = std_range
    return Gaussian(mean, low * (high / low) ** jax.nn.sigmoid(raw_std))


def sample(key: PRNGKeyArray, gaussian: Gaussian) -> Float[Array, "*b a"]:
    """Draw an action."""
    return gaussian.mean + gaussian.std * jax.random.normal(key, gaussian.mean.shape)


def log_prob(gaussian: Gaussian, action: Float[Array, "*b a"]) -> Float[Array, "*b"]:
    """Return log pi(a|s)."""
    z = (action - gaussian.mean) / gaussian.std
    return jnp.sum(-0.5 * z**2 - jnp.log(gaussian.std) - 0.5 * jnp.log(2 * jnp.pi), axis=-1)


def kl_parts(old: Gaussian, new: Gaussian) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Return the two terms of KL(old || new): what moving the mean costs, and what changing the spread costs.

    Each at the other's old value, so both are non-negative (the M-step's decoupled bounds).
    """
    mean_part = 0.5 * jnp.sum(((new.mean - old.mean) / old.std) ** 2, axis=-1)
    ratio = old.std / new.std
    std_part = jnp.sum(0.5 * (ratio**2 - 1.0) - jnp.log(ratio), axis=-1)
    return mean_part, std_part


def init_critics(
    key: PRNGKeyArray,
    observation_size: int,
    action_size: int,
    hidden: tuple[int, ...],
    outputs: tuple[int, ...],
    knots: int,
) -> tuple[Mlp, ...]:
    """Return a network with n values for each n in `outputs`: (1, 1, 1) are three critics, (3,) one trunk."""
    size = observation_size + action_size * (1 + knots)
    keys = jax.random.split(key, len(outputs))
    return tuple(init_mlp(k, (size, *hidden, n), last_scale=0.1) for k, n in zip(keys, outputs, strict=True))


def action_features(action: Float[Array, "*b a"], knots: int) -> Float[Array, "*b f"]:
    """Return the action in [-1, 1] and, for each of its entries, the hat functions of a grid of knots on [0,
    1].

    A network of the bare action takes very long to bend sharply (spectral bias); on this basis a jump
    anywhere is linear.
    """
    action = jnp.clip(action, 0.0, 1.0)
    parts = [2.0 * action - 1.0]
    if knots:
        grid = jax.lax.expand_dims(jnp.arange(knots, dtype=action.dtype), range(action.ndim))
        hats = jnp.maximum(1.0 - jnp.abs((knots - 1) * action[..., None] - grid), 0.0)
        parts.append(hats.reshape(*action.shape[:-1], -1))
    return jnp.concatenate(parts, axis=-1)


def critics(
    params: tuple[Mlp, ...], observation: Float[Array, "b o"], action: Float[Array, "b *k a"], knots: int
) -> Float[Array, "b *k q"]:
    """Return every critic's value, reward first, for one or for K actions of each state.

    The state's share of the first layer is computed once a state, not once a particle.
    """
    features = action_features(action, knots)
    values = []
    for network in params:
        (weight, bias), *rest = network
        size = observation.shape[-1]
        state_part = add_bias(observation @ weight[:size], bias)
        if features.ndim == 3:
            state_part = state_part[:, None, :]
        hidden = jax.nn.relu(features @ weight[size:] + state_part)
        values.append(mlp(tuple(rest), hidden))
    return jnp.concatenate(values, axis=-1)


def init_moments(size: int) -> Moments:
    """Return moments of nothing: mean 0, variance 1."""
    return Moments(jnp.zeros(()), jnp.zeros(size), jnp.ones(size))


def update_moments(moments: Moments, observation: Float[Array, "n o"]) -> Moments:
    """Fold a batch into the running moments; past `MOST_FRAMES` the oldest fade away."""
    n = observation.shape[0]
    mean, var = jnp.mean(observation, axis=0), jnp.var(observation, axis=0)
    total = moments.count + n
    delta = mean - moments.mean
    share = n / total
    new_var = moments.var * (1 - share) + var * share + delta**2 * share * (1 - share)
    return Moments(jnp.minimum(total, MOST_FRAMES), moments.mean + share * delta, new_var)


def normalise(moments: Moments, observation: Float[Array, "*b o"]) -> Float[Array, "*b o"]:
    """Return observations of mean 0 and variance 1, clipped at 5 standard deviations."""
    dims = range(observation.ndim - 1)
    mean, std = moments.mean, jnp.sqrt(moments.var) + 1e-3
    return jnp.clip(
        (observation - jax.lax.expand_dims(mean, dims)) / jax.lax.expand_dims(std, dims), -5.0, 5.0
    )

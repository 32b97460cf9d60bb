"""One optimisation step as a pure function of the training state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

Metrics = dict[str, Float[Array, ""]]

Loss = Callable[[PyTree, Key[Array, ""], Any], tuple[Float[Array, ""], Metrics]]
"""(params, key, batch) -> (loss, metrics); pure, so that it runs under jit, shard_map or pmap alike."""

Step = Callable[["TrainState", Key[Array, ""], Any], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """All that a checkpoint holds.

    Args:
        step: updates done so far.
        params: being trained.
        ema: their exponential moving average.
        opt_state: of the optax optimiser.
    """

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: PyTree


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the EMA starts at the parameters."""
    return TrainState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params)
    )


def make_step(loss: Loss, optimizer: optax.GradientTransformation, ema_decay: float) -> Step:
    """The update `(state, key, batch) -> (state, metrics)`; `key` is the run's, folded with the step here.

    The EMA's decay is min(ema_decay, (1 + n)/(10 + n)) (spec section 4): early averages forget the start.
    """

    def step(state: TrainState, key: Key[Array, ""], batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, key, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        n = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda e, p: e + (1 - decay).astype(e.dtype) * (p - e), state.ema, params)
        metrics = {"loss": value, "grad_norm": optax.global_norm(grads), **metrics}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step


def adamw(
    learning_rate: float, steps: int, *, warmup: int, clip: float = 1.0, weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """AdamW(0.9, 0.999) with clipping by the global norm, linear warm-up and cosine decay to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(schedule, weight_decay=weight_decay))

"""One optimisation step as a pure function of the training state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from megjax.errors import MegError


class Share(NamedTuple):
    """A mean over some of a batch's samples, as sum and count: a part of the batch may have none of them.

    Args:
        total: sum over those that there are.
        count: how many.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]


Metrics = dict[str, Float[Array, ""] | Share]
"""Averaged over a batch's parts and a log line's steps; a `Share` by its samples."""

Loss = Callable[[PyTree, Key[Array, ""], Any], tuple[Float[Array, ""], Metrics]]
"""(params, key, batch) -> (loss, metrics); pure, so that it runs under jit, shard_map or pmap alike."""


class Inputs(NamedTuple):
    """A batch, and what its loss needs beside it but does not train.

    Args:
        data: leaves with the batch on their leading axis.
        frozen: a teacher's parameters, say: arguments of the compiled step, not constants inside it.
    """

    data: PyTree
    frozen: PyTree


Step = Callable[["TrainState", Key[Array, ""], Any], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """All that a checkpoint holds.

    Args:
        step: steps done so far, skipped ones included.
        params: being trained.
        ema: their exponential moving average.
        opt_state: of the optax optimiser.
    """

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: PyTree


def scalars(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Metrics as numbers; a `Share` of no sample has none and is left out."""
    found = {}
    for name, metric in metrics.items():
        total, count = metric if isinstance(metric, Share) else (metric, 1.0)
        if divisor := float(np.asarray(count)):
            found[prefix + name] = float(np.asarray(total)) / divisor
    return found


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the EMA starts at the parameters."""
    # Weak types would become strong in the first step, and the second would compile again.
    params = jax.tree.map(lambda p: jnp.asarray(p, p.dtype), params)
    return TrainState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params)
    )


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    *,
    accumulate: int = 1,
    offload_ema: bool = False,
) -> Step:
    """The update `(state, key, batch) -> (state, metrics)`; `key` is the run's, folded with the step here.

    The EMA's decay is min(ema_decay, (1 + n)/(10 + n)): early averages forget the start.
    A loss or gradient that is not finite changes nothing but the step number: metrics are zero then, and
    `skipped` is 1.

    Args:
        loss: of a batch, or of `Inputs`.
        optimizer: of the parameters.
        ema_decay: of the average, once it has run for long.
        accumulate: parts that a batch is cut into, one after the other; losses and gradients are averaged.
            The step needs the memory of one part.
        offload_ema: the average comes from the hosts' memory and goes back there
            (`megjax.training.sharding.state_shardings`).
    """
    value_and_grad = _in_parts(jax.value_and_grad(loss, has_aux=True), accumulate)

    def step(state: TrainState, key: Key[Array, ""], batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if offload_ema:
            state = state._replace(ema=jax.device_put(state.ema, jax.memory.Space.Device))
        (value, metrics), grads = value_and_grad(state.params, key, batch)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        n = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda e, p: e + (1 - decay).astype(e.dtype) * (p - e), state.ema, params)
        new, old = (params, ema, opt_state), (state.params, state.ema, state.opt_state)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        if offload_ema:
            kept = (kept[0], jax.device_put(kept[1], jax.memory.Space.Host), kept[2])
        metrics = {"loss": value, "grad_norm": norm, **metrics}
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), metrics)
        return TrainState(state.step + 1, *kept), {**metrics, "skipped": 1.0 - finite}

    return step


ValueAndGrad = Callable[[PyTree, Key[Array, ""], Any], tuple[tuple[Float[Array, ""], Metrics], PyTree]]


def _in_parts(value_and_grad: ValueAndGrad, parts: int) -> ValueAndGrad:
    """The mean over `parts` of a batch, computed one after the other."""
    if parts == 1:
        return value_and_grad

    def split(x: Any) -> Any:
        if x.shape[0] % parts:
            raise MegError(f"batch of {x.shape[0]}: does not divide into {parts} parts to accumulate")
        # Strided, so that on a mesh each part lies on all devices.
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def averaged(
        params: PyTree, key: Key[Array, ""], batch: Any
    ) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        data = batch.data if isinstance(batch, Inputs) else batch

        def one(i: Array, part: Any) -> Any:
            part = batch._replace(data=part) if isinstance(batch, Inputs) else part
            return value_and_grad(params, jax.random.fold_in(key, i), part)

        data = jax.tree.map(split, data)
        total = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, 0, jax.tree.map(lambda x: x[0], data)))
        total, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, one(*part)), None),
            total,
            (jnp.arange(parts), data),
        )
        return jax.tree.map(lambda x: x / parts, total)

    return averaged

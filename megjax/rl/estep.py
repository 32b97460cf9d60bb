"""The E-step of MEG-CVPO: the best feasible re-weighting of the particles by its dual, Eqs. (32)-(41).

Over the particles a_k ~ pi_old(.|s) of a batch of states, q maximises E_q[Q_r] subject to E_q[Q_i] <= c_i and
KL(q || pi_old) <= eps. Its dual has one variable for the KL bound (eta) and one for each constraint (lam_i):

    A_k(s) = Q_r(s, a_k) - sum_i lam_i Q_i(s, a_k)
    g(eta, lam) = eta eps + sum_i lam_i c_i + eta mean_s log mean_k exp(A_k / eta)    (40)
    q_k(s) = softmax_k(A_k / eta)                                                     (38)-(39)
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped

DualSolver: TypeAlias = Literal["newton", "gradient"]

Real: TypeAlias = float | Shaped[Array, ""]


class Dual(NamedTuple):
    """The dual's variables, in the units of the Q tables."""

    eta: Float[Array, ""]
    """Temperature: the price of the KL bound."""
    lam: Float[Array, " m"]
    """The constraints' multipliers: reward per unit of cost."""


class EStep(NamedTuple):
    """What an E-step found."""

    weights_SxK: Float[Array, "S K"]
    """q_k(s), each row sums to 1."""
    dual: Dual
    kkt: Float[Array, ""]
    """Largest KKT residual: of `e_step_newton` in units of the tables' spread, of `e_step_gradient` in the
    tables' own."""
    iterations: Int[Array, ""]


def dual_value(
    dual: Dual,
    reward_SxK: Float[Array, "S K"],
    cost_SxKxM: Float[Array, "S K m"],
    threshold: Float[Array, " m"],
    kl_bound: Real,
) -> Float[Array, ""]:
    """Return g(eta, lam) of Eq. (40)."""
    a_SxK = reward_SxK - cost_SxKxM @ dual.lam
    log_mean_exp = jax.nn.logsumexp(a_SxK / dual.eta, axis=1) - jnp.log(a_SxK.shape[1])
    return dual.eta * kl_bound + dual.lam @ threshold + dual.eta * jnp.mean(log_mean_exp)


def particle_weights(
    dual: Dual, reward_SxK: Float[Array, "S K"], cost_SxKxM: Float[Array, "S K m"]
) -> Float[Array, "S K"]:
    """Return q of Eqs. (38)-(39). The multipliers act once, on Q tables that nothing else has changed."""
    return jax.nn.softmax((reward_SxK - cost_SxKxM @ dual.lam) / dual.eta, axis=1)


def e_step_newton(
    reward_SxK: Float[Array, "S K"],
    cost_SxKxM: Float[Array, "S K m"],
    threshold: Float[Array, " m"],
    kl_bound: Real,
    initial: Dual | None = None,
    *,
    max_multiplier: float = 1e4,
    max_iterations: int = 60,
    tolerance: float | None = None,
) -> EStep:
    """Return the re-weighting of Eqs. (38)-(41), the dual solved by a projected Newton method.

    Any number of constraints. Where the KL bound forbids every feasible q, the multipliers run to their bound
    and q becomes the cheapest one inside the KL bound: the steepest cost descent, finite and without
    overflow.

    Args:
        reward_SxK: Q_r of each state's particles.
        cost_SxKxM: Q_i of each state's particles.
        threshold: c_i, the most that mean_s E_q[Q_i] may be.
        kl_bound: eps_E > 0.
        initial: where to start, such as the last batch's dual.
        max_multiplier: the multipliers' bound, in units of std(Q_r) / std(Q_i).
        max_iterations: the loop's bound.
        tolerance: KKT residual at which to stop, in units of the tables' spread; default by precision.
    """
    dtype = reward_SxK.dtype
    tolerance = (1e-10 if dtype == jnp.float64 else 1e-5) if tolerance is None else tolerance
    kl_bound = jnp.asarray(kl_bound, dtype)
    # Centred and scaled tables: constants per state do not change q, and all variables come out of the order
    # of 1.
    reward_mean = jnp.mean(reward_SxK, axis=1, keepdims=True)
    cost_mean = jnp.mean(cost_SxKxM, axis=1, keepdims=True)
    reward, cost = reward_SxK - reward_mean, cost_SxKxM - cost_mean
    reward_scale = _spread(reward, reward_mean)
    cost_scale = _spread(cost, cost_mean, axis=(0, 1))
    reward, cost = reward / reward_scale, cost / cost_scale[None, None, :]
    excess = (threshold - jnp.mean(cost_mean, axis=(0, 1))) / cost_scale
    # Particle-major and flat: the products of the loop run along the batch.
    reward_R, cost_MxR = reward.reshape(-1), jnp.moveaxis(cost, -1, 0).reshape(cost.shape[-1], -1)
    shape, m = reward.shape, cost.shape[-1]

    lower = jnp.zeros(m + 1, dtype).at[0].set(1e-4)
    upper = jnp.full(m + 1, max_multiplier, dtype).at[0].set(1e4 * max_multiplier)

    def evaluate(x: Array) -> tuple[Array, Array, Array]:
        """Return g, its gradient and its Hessian: with F = (A / eta, -Q), the Hessian is Cov_q(F) / eta."""
        eta, lam = x[0], x[1:]
        y_R = (reward_R - lam @ cost_MxR) / eta
        y = y_R.reshape(shape)
        log_mean = jax.nn.logsumexp(y, axis=1) - jnp.log(jnp.asarray(shape[1], dtype))
        q = jnp.exp(y - (log_mean + jnp.log(jnp.asarray(shape[1], dtype)))[:, None])
        # d(A/eta)/d(lam_i) = -Q_i / eta and d(A/eta)/d(eta) = -y / eta, hence the features (y, Q_i).
        features = jnp.concatenate([y_R[None], cost_MxR]).reshape(m + 1, *shape)
        mean_FxS = jnp.sum(q[None] * features, axis=2)
        centred = (features - mean_FxS[:, :, None]).reshape(m + 1, -1)
        hessian = (centred * q.reshape(1, -1)) @ centred.T / (eta * shape[0])
        means = jnp.mean(mean_FxS, axis=1)
        value = eta * kl_bound + lam @ excess + eta * jnp.mean(log_mean)
        gradient = jnp.concatenate([(kl_bound + jnp.mean(log_mean) - means[0])[None], excess - means[1:]])
        return value, gradient, hessian

    def residual(x: Array, gradient: Array) -> Array:
        """Return the projected gradient: 0 where a bound holds back a descent direction."""
        held = ((x <= lower) & (gradient > 0)) | ((x >= upper) & (gradient < 0))
        return jnp.where(held, 0.0, gradient)

    def proceed(carry: tuple) -> Array:
        (_, gradient, _), x, _, iteration = carry
        return (jnp.max(jnp.abs(residual(x, gradient))) > tolerance) & (iteration < max_iterations)

    def body(carry: tuple) -> tuple:
        here, x, damping, iteration = carry
        value, gradient, hessian = here
        free = residual(x, gradient) != 0.0
        both = free[:, None] & free[None, :]
        diagonal = jnp.maximum(jnp.diagonal(hessian), jnp.finfo(dtype).tiny ** 0.5)
        matrix = jnp.where(both, hessian, 0.0) + jnp.diag(jnp.where(free, damping * diagonal, 1.0))
        direction = _solve_spd(matrix, jnp.where(free, -gradient, 0.0))
        # eta must stay positive and g bends sharply towards 0; growth is bounded because g is nearly flat
        # along (eta, lam) together, which is where an infeasible problem runs to.
        candidate = jnp.clip(x + direction, lower, upper)
        candidate = candidate.at[0].set(jnp.clip(candidate[0], 0.2 * x[0], 20.0 * x[0]))
        candidate = jnp.clip(candidate, lower, upper)
        there = evaluate(candidate)
        # In float32 a true descent can drown in rounding; then the residual decides.
        noise = 8 * jnp.finfo(dtype).eps * (jnp.abs(value) + candidate[0] + jnp.sum(candidate[1:]))
        better = there[0] <= value - noise
        closer = jnp.max(jnp.abs(residual(candidate, there[1]))) < jnp.max(jnp.abs(residual(x, gradient)))
        accept = (better | ((there[0] <= value + noise) & closer)) & jnp.isfinite(there[0])
        here, x = jax.tree.map(lambda new, old: jnp.where(accept, new, old), (there, candidate), (here, x))
        damping = jnp.clip(
            jnp.where(accept, damping * 0.1, damping * 8.0), 1e-9 if dtype == jnp.float64 else 1e-6, 1e9
        )
        return here, x, damping, iteration + 1

    start_eta = jax.lax.rsqrt(2.0 * kl_bound)  # exact for normal advantages and small bounds
    cold = start = jnp.concatenate([start_eta[None], jnp.zeros(m, dtype)])
    if initial is not None:
        warm = jnp.concatenate([(initial.eta / reward_scale)[None], initial.lam * cost_scale / reward_scale])
        # After an infeasible batch the way back from the bounds would cost more than a fresh start.
        usable = jnp.all(jnp.isfinite(warm)) & (jnp.max(warm[1:], initial=0.0) <= 1e2)
        start = jnp.where(usable, warm, cold)
    start = jnp.clip(start, lower, upper)
    carry = (evaluate(start), start, jnp.asarray(1e-4, dtype), jnp.zeros((), jnp.int32))
    (_, gradient, _), x, _, iterations = jax.lax.while_loop(proceed, body, carry)
    dual = Dual(x[0] * reward_scale, x[1:] * reward_scale / cost_scale)
    weights = jax.nn.softmax(((reward_R - x[1:] @ cost_MxR) / x[0]).reshape(shape), axis=1)
    return EStep(weights, dual, jnp.max(jnp.abs(residual(x, gradient))), iterations)


def e_step_gradient(
    reward_SxK: Float[Array, "S K"],
    cost_SxKxM: Float[Array, "S K m"],
    threshold: Float[Array, " m"],
    kl_bound: Real,
    initial: Dual | None = None,
    *,
    iterations: int = 10,
    learning_rate: float = 0.02,
    max_dual: float = 20.0,
) -> EStep:
    """Return the re-weighting after a few Adam steps on the dual, Eq. (41): the paper's solver.

    Args:
        reward_SxK, cost_SxKxM, threshold, kl_bound, initial: as for `e_step_newton`.
        iterations, learning_rate, max_dual: the steps, their size and the variables' bound.
    """
    dtype, m = reward_SxK.dtype, cost_SxKxM.shape[-1]
    dual = Dual(jnp.ones((), dtype), jnp.ones(m, dtype)) if initial is None else initial
    optimizer = optax.adam(learning_rate)
    gradient_of = jax.grad(dual_value)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        dual, state = carry
        gradient = gradient_of(dual, reward_SxK, cost_SxKxM, threshold, kl_bound)
        updates, state = optimizer.update(gradient, state)
        dual = jax.tree.map(lambda x, dx: x + dx, dual, updates)
        dual = Dual(jnp.clip(dual.eta, 1e-3, max_dual), jnp.clip(dual.lam, 0.0, max_dual))
        return (dual, state), None

    (dual, _), _ = jax.lax.scan(step, (dual, optimizer.init(dual)), None, length=iterations)
    gradient = gradient_of(dual, reward_SxK, cost_SxKxM, threshold, kl_bound)
    kkt = jnp.maximum(
        jnp.abs(gradient.eta), jnp.max(jnp.where(dual.lam > 0, jnp.abs(gradient.lam), -gradient.lam))
    )
    weights = particle_weights(dual, reward_SxK, cost_SxKxM)
    return EStep(weights, dual, jnp.maximum(kkt, 0.0), jnp.asarray(iterations, jnp.int32))


def _spread(centred: Array, mean: Array, axis: tuple[int, ...] | None = None) -> Array:
    """Return the root mean square, kept off 0 so that a constant table divides to zeros, not to noise."""
    rms = jnp.sqrt(jnp.mean(centred**2, axis=axis))
    size = jnp.sqrt(jnp.mean(mean**2, axis=axis))
    return jnp.maximum(rms, 4 * jnp.finfo(rms.dtype).eps * size + jnp.finfo(rms.dtype).tiny ** 0.5)


def _solve_spd(matrix: Float[Array, "n n"], right: Float[Array, " n"]) -> Float[Array, " n"]:
    """Solve a tiny positive definite system by unrolled elimination; LAPACK calls batch badly."""
    n = right.shape[0]
    rows = jnp.concatenate([matrix, right[:, None]], axis=1)
    for i in range(n):
        pivot = rows[i] / rows[i, i]
        rows = rows - jnp.where(jnp.arange(n) == i, 0.0, rows[:, i])[:, None] * pivot[None, :]
        rows = rows.at[i].set(pivot)
    return rows[:, n]

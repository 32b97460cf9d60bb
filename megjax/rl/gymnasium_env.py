"""The environment for everybody else: gymnasium's single and vector interfaces, for FSRL, OmniSafe or SB3.

Needs `gymnasium`, which MegJAX itself does without; it is imported here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import jax
import numpy as np

from megjax.rl.env import REFERENCE, Env, EnvParams, make_env

CostOf = Callable[[np.ndarray], Any]
"""Cost vector(s) [..., m] -> what `info["cost"]` holds; libraries of one constraint want a number."""


class MegEnv(gymnasium.Env):
    """One environment. `info["cost"]` holds the frame's costs."""

    def __init__(
        self, env: Env | None = None, params: EnvParams = REFERENCE, cost_of: CostOf | None = None
    ) -> None:
        """Wrap `env` (the reference problem, left out) under `params`."""
        self._env, self._params = env or make_env(), params
        self._cost_of = cost_of or (lambda costs: costs)
        self._step, self._reset = jax.jit(self._env.step), jax.jit(self._env.reset)
        self._key: jax.Array | None = None
        self.observation_space, self.action_space = _spaces(self._env)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode; a seed makes this and all that follows repeatable."""
        super().reset(seed=seed)
        self._key, key = _split(_drawn_key(self.np_random))
        observation, self._state = self._reset(key, self._params)
        return np.asarray(observation, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Send one frame."""
        self._key, key = _split(self._key)
        action = np.asarray(action, np.float32)
        _, self._state, reward, terminated, truncated, info = self._step(
            key, self._state, action, self._params
        )
        # The state is already the next episode's if this one ended; gymnasium wants the last one's
        # observation.
        observation = np.asarray(info.pop("final_observation"), np.float32)
        info = {name: np.asarray(value) for name, value in info.items()}
        info["cost"] = self._cost_of(info["cost"])
        return observation, float(reward), bool(terminated), bool(truncated), info


class MegVectorEnv(gymnasium.vector.VectorEnv):
    """Many environments as one compiled step, resetting in the step that ends an episode.

    `info` is laid out as gymnasium's own, an array over the copies and under `_name` whose entries count;
    `cost` and the rest hold the frame of every copy, ended or not.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}

    def __init__(
        self,
        num_envs: int,
        env: Env | None = None,
        params: EnvParams = REFERENCE,
        cost_of: CostOf | None = None,
    ) -> None:
        """Wrap `num_envs` copies of `env` (the reference problem, left out) under `params`."""
        self.num_envs = num_envs
        self._env, self._params = env or make_env(), params
        self._cost_of = cost_of or (lambda costs: costs)
        reset = jax.vmap(self._env.reset, (0, None))
        step = jax.vmap(self._env.step, (0, 0, 0, None))
        self._reset = jax.jit(lambda key: reset(jax.random.split(key, num_envs), params))
        self._step = jax.jit(
            lambda key, state, action: step(jax.random.split(key, num_envs), state, action, params)
        )
        self._key: jax.Array | None = None
        self.single_observation_space, self.single_action_space = _spaces(self._env)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start every copy's episode; seeds as in `MegEnv.reset`."""
        super().reset(seed=seed)
        self._key, key = _split(_drawn_key(self.np_random))
        observation, self._state = self._reset(key)
        return np.asarray(observation, np.float32), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Send one frame in every copy."""
        self._key, key = _split(self._key)
        observation, self._state, reward, terminated, truncated, info = self._step(
            key, self._state, np.asarray(actions, np.float32)
        )
        info = {name: np.asarray(value) for name, value in info.items()}
        info["cost"] = np.asarray(self._cost_of(info["cost"]))
        final = info.pop("final_observation").astype(np.float32)
        ended = np.asarray(terminated | truncated)
        infos: dict[str, Any] = _masked(info, np.ones(self.num_envs, bool))
        if ended.any():
            rows = np.empty(self.num_envs, object)
            for i in np.flatnonzero(ended):
                rows[i] = final[i]
            infos |= {"final_obs": rows, "_final_obs": ended}
            infos |= {"final_info": _masked(info, ended), "_final_info": ended}
        ends = np.asarray(terminated), np.asarray(truncated)
        return np.asarray(observation, np.float32), np.asarray(reward), *ends, infos


def _drawn_key(rng: np.random.Generator) -> jax.Array:
    """Return an episode's key from gymnasium's generator, which without a seed has its own entropy."""
    return jax.random.key(int(rng.integers(2**31)))


def _split(key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return the key to go on with and one to use now."""
    if key is None:
        raise gymnasium.error.ResetNeeded("call reset first")
    following, own = jax.random.split(key)
    return following, own


def _masked(info: dict[str, np.ndarray], counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the entries of the copies that count, 0 for the others, and under `_name` which do."""
    found = {}
    for name, value in info.items():
        found[name] = np.zeros_like(value)
        found[name][counts] = value[counts]
        found[f"_{name}"] = counts.copy()
    return found


def _spaces(env: Env) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    observation = gymnasium.spaces.Box(-np.inf, np.inf, (env.observation_size,), np.float32)
    return observation, gymnasium.spaces.Box(0.0, 1.0, (env.action_size,), np.float32)

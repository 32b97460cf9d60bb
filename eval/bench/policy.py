"""The constrained-learning code's speed on one CPU core against its peers.

    python -m eval.bench.policy env      # frames a second, against numpy under gymnasium
    python -m eval.bench.policy update   # an update at the authors' sizes, against PyTorch's forward pass
    python -m eval.bench.policy bars     # final policies over fresh seeds against the optimum

Run it pinned: `OMP_NUM_THREADS=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 1 python -m ...`.
Times are in processor seconds, which other load disturbs less than the clock. `env` needs gymnasium (extra
`rl`), `update` torch (extra `parity`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from configs.policy import CONDITIONED, DEFAULT, PAPER, PPO, PPO_PLAIN
from eval.bench import save, start, timed
from megjax.checks import within
from megjax.errors import MegError
from megjax.rl.cvpo import CvpoConfig, make_cvpo
from megjax.rl.env import REFERENCE, make_env
from megjax.rl.optimum import best_constant
from megjax.rl.problem import ANALYTIC, tabulate
from megjax.rl.training import train_policies

PRESETS = {
    "default": DEFAULT,
    "conditioned": CONDITIONED,
    "paper": PAPER,
    "ppo": PPO,
    "ppo-plain": PPO_PLAIN,
}

PEERS = {"env": ("gymnasium", "rl"), "update": ("torch", "parity")}
"""The package that a comparison needs, and the extra that has it."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time or to train."""

    what: tyro.conf.Positional[Literal["env", "update", "bars"]]
    rounds: int = 5
    preset: Literal["default", "conditioned", "paper", "ppo", "ppo-plain"] = "default"
    """Of `bars`."""
    limits: tuple[tuple[float, float], ...] = ((3.0, 1.8), (2.5, 1.8), (4.0, 1.0))
    """Of `bars`; the preset `conditioned` has its own."""
    first_seed: int = 1000
    seeds: int = 10
    folder: Path = Path("runs/bars")
    json: Path | None = None


def main(config: Config) -> None:
    """Run the comparison that is asked for.

    Raises:
        MegError: its peer is not installed; fewer than one round.
    """
    within(config, 1, math.inf, "rounds")
    package, extra = PEERS.get(config.what, (None, None))
    if package and importlib.util.find_spec(package) is None:
        raise MegError(f"{package} not installed: pip install 'megjax[{extra}]'")
    found = {"env": env_speed, "update": update_cost, "bars": bars}[config.what](config)
    print(json.dumps(found))
    save(config.json, found)


def env_speed(config: Config) -> dict[str, Any]:
    """Return frames a second of 4096 compiled copies and of sixteen numpy ones under gymnasium."""
    copies, frames = 4096, 1024
    env = make_env()
    first_actions = jax.random.uniform(jax.random.key(0), (copies, 2))

    @jax.jit
    def run(key: jax.Array, first_actions: jax.Array) -> jax.Array:
        _, state = jax.vmap(env.reset, (0, None))(jax.random.split(key, copies), REFERENCE)

        def frame(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
            state, total = carry
            keys = jax.random.split(jax.random.fold_in(key, step), copies)
            # New actions each frame, or the compiler would take what depends on them alone out of the loop.
            actions = jnp.mod(first_actions + 0.618 * step, 1.0)
            observation, state, reward, _, truncated, info = jax.vmap(env.step, (0, 0, 0, None))(
                keys, state, actions, REFERENCE
            )
            # Everything that a learner would read is used, or the compiler would leave it out.
            used = jnp.sum(observation) + jnp.sum(reward) + jnp.sum(truncated) + jnp.sum(info["cost"])
            return (state, total + used), None

        return jax.lax.scan(frame, (state, jnp.zeros(())), jnp.arange(frames))[0][1]

    numpy_env = numpy_copies()
    numpy_env.reset(seed=0)
    action = np.full((16, 2), 0.3, np.float32)

    def numpy_run(frames: int = 2000) -> None:
        for _ in range(frames):
            numpy_env.step(action)

    jax.block_until_ready(run(jax.random.key(0), first_actions))
    ours, theirs = [], []
    for i in range(config.rounds):
        ours.append(
            copies
            * frames
            / timed(lambda i=i: jax.block_until_ready(run(jax.random.key(i), first_actions)))[1].cpu_s
        )
        theirs.append(16 * 2000 / timed(numpy_run)[1].cpu_s)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "megjax_frames_per_s": statistics.median(ours),
        "numpy_frames_per_s": statistics.median(theirs),
        "ratio": ratio,
    }


def numpy_copies() -> Any:
    """Return sixteen synchronous copies of the reference problem in plain numpy under gymnasium."""
    import gymnasium

    class Frames(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        action_space = gymnasium.spaces.Box(0.0, 1.0, (2,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            super().reset(seed=seed)
            self.time, self.last = 0, (0.0, 0.0)
            return self.observe(), {}

        def observe(self) -> np.ndarray:
            self.snr_db = 124.0 - 35.3 - 37.6 * np.log10(self.np_random.uniform(200.0, 300.0))
            return np.array([self.snr_db, *self.last], np.float32)

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            steps, ratio = min(4 + int(9 * action[0]), 12), float(action[1])
            seconds = 65536 * 16 * (1 - ratio + ratio / 16) / (1e6 * np.log2(1 + 10 ** (self.snr_db / 10)))
            self.last = (0.3007 * steps + 0.826 + seconds, 0.13 * steps + 0.25 + seconds / 1000)
            mse = 0.008 + 0.012 * np.exp((4 - steps) / 2.5) + 0.02 * ratio**2
            self.time += 1
            return self.observe(), -np.log(mse), False, self.time >= 64, {"cost": self.last}

    return gymnasium.vector.SyncVectorEnv([Frames] * 16)


def update_cost(config: Config) -> dict[str, Any]:
    """Return milliseconds of one update at the authors' sizes and of PyTorch's pass over its rows."""
    import torch

    learner = PAPER.learner
    assert isinstance(learner, CvpoConfig)
    updates = 20
    learner = dataclasses.replace(learner, updates_per_epoch=updates, epochs=100)
    env = make_env()
    algorithm = make_cvpo(learner, env)
    key = jax.random.key(0)
    state = jax.jit(algorithm.init)(key, REFERENCE)
    epoch = jax.jit(algorithm.epoch)
    state, _ = jax.block_until_ready(epoch(key, state, REFERENCE))

    torch.set_num_threads(1)

    def critic() -> torch.nn.Module:
        layers = [torch.nn.Linear(5, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(128, 1))

    critics, rows = [critic() for _ in range(3)], torch.randn(256 * 32, 5)

    @torch.no_grad()
    def forward() -> None:
        for _ in range(updates):
            for network in critics:
                network(rows)

    forward()
    ours, theirs = [], []
    for _ in range(config.rounds):
        (state, _), timing = timed(lambda s=state: jax.block_until_ready(epoch(key, s, REFERENCE)))
        ours.append(timing.cpu_s / updates * 1e3)
        theirs.append(timed(forward)[1].cpu_s / updates * 1e3)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "update_ms": statistics.median(ours),
        "torch_forward_ms": statistics.median(theirs),
        "ratio": ratio,
    }


def bars(config: Config) -> dict[str, Any]:
    """Train fresh seeds at every limit; print each final policy's distance from optimum and limits."""
    preset = PRESETS[config.preset]
    limits = preset.limits if preset.conditioned else config.limits
    seeds = tuple(range(config.first_seed, config.first_seed + config.seeds))
    run = dataclasses.replace(preset, limits=limits, seeds=seeds, folder=config.folder / config.preset)
    results, timing = timed(lambda: train_policies(run))
    for result in results:
        print(json.dumps({k: v for k, v in result.items() if k != "policy"}))
    # A fine grid of ratios: the best constant has no neighbour to mix with.
    table = tabulate(ANALYTIC, ratios=4001)
    print(HEADER)
    for pair in limits:
        constant = best_constant(table, pair)[0]
        own = [result for result in results if tuple(result["limits"]) == pair]
        print(row(config.preset, pair, own, constant))
    # A conditioned policy has a result for each of its limits.
    cpu_s = timing.cpu_s / len({result["policy"] for result in results})
    print(f"{cpu_s:.1f} processor seconds a policy, compilation included")
    return {"runs": results, "cpu_s_per_policy": cpu_s, "wall_s": timing.wall_s}


HEADER = """
| preset | limits | optimum | best constant | reward (lowest) | latency, s (highest) | energy, kJ (highest) \
| latency sampled, s (highest) | frames over a limit | seeds in the bar |
|---|---|---|---|---|---|---|---|---|---|"""


def row(name: str, limits: tuple[float, float], results: list[dict[str, Any]], constant: float) -> str:
    """Return a line on all seeds of one limit: deterministic policies, unless it says sampled."""
    reward = np.array([r["deterministic"]["reward"] for r in results])
    costs = np.array([r["deterministic"]["costs"] for r in results])
    sampled = np.array([r["sampled"]["costs"] for r in results])
    violations = np.max([r["deterministic"]["violations"] for r in results], axis=1)
    gap = results[0]["optimum"] - reward
    held = np.all(costs <= 1.003 * np.asarray(limits), axis=1)
    held &= np.all(sampled <= 1.01 * np.asarray(limits), axis=1) & (gap <= 0.03)
    cells = [
        name,
        f"{limits[0]:g} s, {limits[1]:g} kJ",
        f"{results[0]['optimum']:.4f}",
        f"{constant:.4f}",
        f"{reward.mean():.4f} ({reward.min():.4f})",
        f"{costs[:, 0].mean():.4f} ({costs[:, 0].max():.4f})",
        f"{costs[:, 1].mean():.4f} ({costs[:, 1].max():.4f})",
        f"{sampled[:, 0].mean():.4f} ({sampled[:, 0].max():.4f})",
        f"{100 * violations.mean():.0f} %",
        f"{held.sum()} of {len(results)}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    start(main, Config, "eval.bench.policy")

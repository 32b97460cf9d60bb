"""Training policies: many limits and seeds as one compiled program; curves, checkpoints, saved policies."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megjax.errors import MegError
from megjax.rl import networks, optimum
from megjax.rl.algorithm import Algorithm, PolicyParams
from megjax.rl.cvpo import CvpoConfig, make_cvpo
from megjax.rl.env import REFERENCE, Env, EnvParams, make_env
from megjax.rl.evaluate import Evaluation, evaluate
from megjax.rl.policy import Policy, PolicyInfo, gaussian, save_policy, stacked
from megjax.rl.ppo import PpoConfig, make_ppo

Batching: TypeAlias = Literal["auto", "map", "vmap"]
"""How runs share the device: one after the other (faster on CPUs), or side by side; auto asks the device."""


@dataclasses.dataclass(frozen=True)
class PolicyRunConfig:
    """What `python -m train.policy` trains."""

    learner: CvpoConfig | PpoConfig = dataclasses.field(default_factory=CvpoConfig)
    limits: tuple[tuple[float, float], ...] = ((3.0, 1.8),)
    """Mean latency (s) and energy (kJ) per frame; every pair is trained, with every seed."""
    seeds: tuple[int, ...] = (0,)
    conditioned: bool = False
    """One policy that observes its limits and is trained on all of them at once."""
    folder: Path = Path("runs/policy")
    chunks: int = 20
    """Parts of a run: after each, curves are written and a checkpoint is saved."""
    episodes: int = 1000
    """Fresh episodes on which the final policies are evaluated."""
    batching: Batching = "auto"


class Runs(NamedTuple):
    """The runs of a config: one entry each."""

    limits_RxGxM: np.ndarray
    seeds_R: np.ndarray


def train_policies(
    config: PolicyRunConfig, env: Env | None = None, params: EnvParams = REFERENCE, table: Any = None
) -> list[dict[str, Any]]:
    """Train every limit with every seed; return what each final policy is worth.

    The folder then holds `curves.jsonl`, `curves.png`, `results.json` and a policy file for each run. An
    interrupted call continues from its last checkpoint.

    Args:
        config: what to train.
        env: the environment; left out, the reference problem.
        params: its numbers; the limits come from `config`.
        table: its `optimum.Tables`, for the feasibility check and the optimum; left out, those of `params`.

    Raises:
        MegError: limits that no policy can meet, named with the lowest reachable values, or a folder of
            another run.
    """
    env = env or make_env(observe_limits=config.conditioned)
    table = optimum.tables(params) if table is None else table
    best = {limits: optimum.solve(table, limits).reward for limits in config.limits}
    runs, learner = _runs(config), _learner(config)
    algorithm = _algorithm(learner, env)
    _claim(config)
    states = _fit(config, algorithm, params, runs, best)
    policies = jax.device_get(jax.vmap(algorithm.policy)(states))
    judge = _judge(config, env, params, learner.squash)
    results = []
    for run, seed in enumerate(runs.seeds_R):
        policy = stacked(policies, run)
        limits = tuple((float(latency), float(energy)) for latency, energy in runs.limits_RxGxM[run])
        info = PolicyInfo(
            limits,
            config.conditioned,
            int(params.min_steps),
            int(params.max_steps),
            learner.squash,
            len(learner.hidden),
        )
        name = "conditioned" if config.conditioned else "limit_" + "_".join(f"{x:g}" for x in limits[0])
        save_policy(config.folder / f"{name}_seed{seed}.safetensors", Policy(policy, info))
        for pair in limits:
            found = judge(policy, pair, int(seed))
            results.append({"limits": pair, "seed": int(seed), "optimum": best[pair], **found})
    _write(config.folder / "results.json", json.dumps(results, indent=2))
    return results


def _runs(config: PolicyRunConfig) -> Runs:
    if config.conditioned:
        limits = np.asarray([config.limits] * len(config.seeds))
        return Runs(limits, np.asarray(config.seeds))
    pairs = [(pair, seed) for pair in config.limits for seed in config.seeds]
    return Runs(np.asarray([[pair] for pair, _ in pairs]), np.asarray([seed for _, seed in pairs]))


def _learner(config: PolicyRunConfig) -> CvpoConfig | PpoConfig:
    groups = len(config.limits) if config.conditioned else 1
    return dataclasses.replace(config.learner, groups=groups)


def _algorithm(learner: CvpoConfig | PpoConfig, env: Env) -> Algorithm:
    return make_cvpo(learner, env) if isinstance(learner, CvpoConfig) else make_ppo(learner, env)


def _over_runs(config: PolicyRunConfig) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the transformation that makes one program of all runs."""
    side_by_side = jax.default_backend() != "cpu" if config.batching == "auto" else config.batching == "vmap"
    if side_by_side:
        return jax.vmap
    return lambda run: lambda *args: jax.lax.map(lambda one: run(*one), args)


def _fit(
    config: PolicyRunConfig, algorithm: Algorithm, params: EnvParams, runs: Runs, best: dict[tuple, float]
) -> Any:
    """Train to the end, resuming from the folder's checkpoint."""
    over_runs = _over_runs(config)
    chunk = -(-algorithm.epochs // config.chunks)
    keys = jax.vmap(jax.random.key)(jnp.asarray(runs.seeds_R))
    limits = jnp.asarray(runs.limits_RxGxM)

    def init(key: jax.Array, limits: jax.Array) -> Any:
        return algorithm.init(jax.random.fold_in(key, 0), dataclasses.replace(params, limits=limits))

    def advance(key: jax.Array, limits: jax.Array, state: Any, count: jax.Array) -> tuple[Any, Any]:
        """Run `count` epochs; return the state and the metrics' means."""
        own = dataclasses.replace(params, limits=limits)

        def epoch(state: Any) -> tuple[Any, dict[str, jax.Array]]:
            return algorithm.epoch(jax.random.fold_in(key, 1), state, own)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(epoch, state)[1])

        def body(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, metrics = epoch(carry[0])
            return state, jax.tree.map(lambda total, x: total + x / count, carry[1], metrics)

        return jax.lax.fori_loop(0, count, body, (state, zeros))

    states = jax.jit(over_runs(init))(keys, limits)
    advance = jax.jit(over_runs(advance), donate_argnums=2)
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    log_path = config.folder / "curves.jsonl"
    with ocp.CheckpointManager((config.folder / "checkpoints").absolute(), options=options) as manager:
        leaves, structure = jax.tree.flatten(states)
        if (latest := manager.latest_step()) is not None:
            leaves = manager.restore(latest, args=ocp.args.StandardRestore(leaves))
            states = jax.tree.unflatten(structure, leaves)
        first = 0 if latest is None else latest
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns) as progress, log_path.open("a" if first else "w") as log:
            task = progress.add_task(f"{len(keys)} runs", total=config.chunks, completed=first, note="")
            for part in range(first, -(-algorithm.epochs // chunk)):
                start = time.perf_counter()
                count = min(chunk, algorithm.epochs - part * chunk)
                states, metrics = advance(keys, limits, states, jnp.full(len(keys), count))
                metrics = jax.device_get(metrics)
                seconds = time.perf_counter() - start
                _log(log, metrics, runs, min((part + 1) * chunk, algorithm.epochs), seconds, best)
                manager.save(part + 1, args=ocp.args.StandardSave(jax.tree.leaves(states)))
                reward, cost = np.mean(metrics["reward"]), np.mean(metrics["cost"], axis=(0, 1))
                note = f"reward {reward:.3f}, {cost[0]:.3f} s, {cost[1]:.3f} kJ"
                progress.update(task, completed=part + 1, note=note)
        manager.wait_until_finished()
    draw(log_path, config.folder / "curves.png")
    return states


def _log(log: Any, metrics: dict, runs: Runs, epoch: int, seconds: float, best: dict[tuple, float]) -> None:
    """Write a line for each run and group."""
    scalars = {k: v for k, v in metrics.items() if v.ndim == 1}
    for run, seed in enumerate(runs.seeds_R):
        for group, limits in enumerate(runs.limits_RxGxM[run]):
            pair = tuple(limits.tolist())
            record = {
                "epoch": epoch,
                "seed": int(seed),
                "limits": pair,
                "optimum": best[pair],
                "chunk_s": seconds,
            }
            record |= {k: metrics[k][run, group].tolist() for k in ("reward", "cost", "lam", "mean_signal")}
            record |= {k: float(v[run]) for k, v in scalars.items()}
            log.write(json.dumps(record) + "\n")
    log.flush()


def draw(log_path: Path, path: Path) -> None:
    """Draw every run's reward, latency and energy with the optimum and the limits (Figs. 6 and 7)."""
    try:
        import matplotlib.figure  # an extra, and only the picture needs it
    except ImportError:
        return
    records = [json.loads(line) for line in log_path.read_text().splitlines()]
    figure = matplotlib.figure.Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    pairs = sorted({tuple(r["limits"]) for r in records})
    for colour, pair in enumerate(pairs):
        own = [r for r in records if tuple(r["limits"]) == pair]
        for seed in sorted({r["seed"] for r in own}):
            curve = [r for r in own if r["seed"] == seed]
            epochs = [r["epoch"] for r in curve]
            label = f"{pair[0]:g} s, {pair[1]:g} kJ" if seed == own[0]["seed"] else None
            signals = [[r["reward"] for r in curve], *zip(*(r["cost"] for r in curve), strict=True)]
            for axis, values in zip(axes, signals, strict=True):
                axis.plot(epochs, values, color=f"C{colour}", alpha=0.7, label=label)
        for axis, level in zip(axes, (own[0]["optimum"], *pair), strict=True):
            axis.axhline(level, color=f"C{colour}", linestyle="--", linewidth=1)
    for axis, name in zip(axes, ("reward", "latency, s", "energy, kJ"), strict=True):
        axis.set_xlabel("epoch")
        axis.set_ylabel(name)
    figure.legend(
        *axes[0].get_legend_handles_labels(), title="limits (dashed: optimum, limit)", loc="outside right"
    )
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)


def _judge(
    config: PolicyRunConfig, env: Env, params: EnvParams, squash: networks.Squash
) -> Callable[[PolicyParams, tuple[float, ...], int], dict[str, Any]]:
    """Return (policy, limits, seed) -> the worth of its mean and of its samples, compiled once for all."""

    @jax.jit
    def worth(policy: PolicyParams, limits: jax.Array, key: jax.Array, sampled: jax.Array) -> Evaluation:
        def act(key: jax.Array, observation: jax.Array) -> jax.Array:
            found = gaussian(policy, observation, squash)
            return jnp.where(sampled, networks.sample(key, found), found.mean)

        return evaluate(key, env, act, dataclasses.replace(params, limits=limits), config.episodes)

    def judge(policy: PolicyParams, limits: tuple[float, ...], seed: int) -> dict[str, Any]:
        key = jax.random.key(10**6 + seed)
        found = {}
        for name, sampled in (("deterministic", False), ("sampled", True)):
            numbers = worth(policy, jnp.asarray(limits), key, jnp.asarray(sampled))._asdict()
            found[name] = {k: np.asarray(v).tolist() for k, v in numbers.items()}
        return found

    return judge


def _claim(config: PolicyRunConfig) -> None:
    """Note in the folder what it trains, and refuse one that trains something else."""
    config.folder.mkdir(parents=True, exist_ok=True)
    path = config.folder / "config.json"
    fields = {
        k: v for k, v in dataclasses.asdict(config).items() if k not in ("folder", "batching", "episodes")
    }
    text = json.dumps({"learner": type(config.learner).__name__, **fields}, indent=2)
    if path.exists() and path.read_text() != text:
        raise MegError(
            f"{config.folder} holds a run with other settings: choose another --folder or remove it"
        )
    _write(path, text)


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)

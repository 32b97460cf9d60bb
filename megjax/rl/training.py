"""Training policies: many limits and seeds as one compiled program; curves, checkpoints, saved policies."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megjax.checks import LARGEST_SEED, within
from megjax.errors import MegError
from megjax.files import replacing, writable_folder, write_file
from megjax.link import profiles
from megjax.rl import networks, optimum
from megjax.rl.algorithm import Algorithm, PolicyParams
from megjax.rl.cvpo import CvpoConfig, make_cvpo
from megjax.rl.env import Env, EnvParams
from megjax.rl.evaluate import Evaluation, evaluate
from megjax.rl.policy import Policy, PolicyInfo, gaussian, save_policy, stacked
from megjax.rl.ppo import PpoConfig, make_ppo
from megjax.rl.problem import ANALYTIC, Problem, environment, in_the_mean, measured, tabulate
from megjax.rl.quality import load_table
from megjax.training.checkpoints import open_checkpoints, restore, save, seal

Batching: TypeAlias = Literal["auto", "map", "vmap"]
"""How the runs of one device share it: one after the other (faster on CPUs) or side by side; auto asks it."""

Report: TypeAlias = Callable[[float, str], None]
"""(share of the training done, one line on where it stands)."""


@dataclasses.dataclass(frozen=True)
class PolicyRunConfig:
    """What `python -m train.policy` trains."""

    learner: CvpoConfig | PpoConfig = dataclasses.field(default_factory=CvpoConfig)
    limits: tuple[tuple[float, float], ...] = ((3.0, 1.8),)
    """Mean latency (s) and energy (kJ) per frame; every pair is trained, with every seed."""
    seeds: tuple[int, ...] = (0,)
    conditioned: bool = False
    """One policy that observes its limits and is trained on all of them at once."""
    table: str | None = None
    """Train on measured quality, with SDXL's costs: `tiny`, or a file of `python -m eval.quality_table`. Left
    out, on the reference problem `analytic`."""
    profile: str = "paper"
    """Hardware profile behind the costs; read with `table` only."""
    psnr_db: float = 10.0
    """PSNR of the received features; read with `table` only."""
    folder: Path = Path("runs/policy")
    chunks: int = 20
    """Parts of a run: after each, curves are written."""
    checkpoint_every: int = 1
    """Parts between checkpoints; the last part has one."""
    episodes: int = 1000
    """Fresh episodes on which the final policies are evaluated."""
    batching: Batching = "auto"


class Runs(NamedTuple):
    """The runs of a config: one entry each."""

    limits_RxGxM: np.ndarray
    seeds_R: np.ndarray


def problem_of(config: PolicyRunConfig) -> Problem:
    """Return the problem that a config names: `analytic`, or a measured table under SDXL's costs.

    Raises:
        MegError: a table or a profile that cannot be read, or see `megjax.rl.problem.measured`.
    """
    if config.table is None:
        return ANALYTIC
    return measured(load_table(config.table), profiles.load(config.profile), config.psnr_db)


def train_policies(
    config: PolicyRunConfig,
    problem: Problem | None = None,
    table: optimum.Tables | None = None,
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """Train every limit with every seed; return what each final policy is worth.

    All runs are one compiled program, on every local device. The folder then holds `curves.jsonl`,
    `curves.png`, `results.json` and a policy file for each run. An interrupted call continues from its last
    checkpoint.

    Args:
        config: what to train.
        problem: what to solve; left out, the one that the config names.
        table: the problem's tables, for the feasibility check and the optimum; left out, they are computed.
        report: told how far the training is; left out, a progress bar is shown.

    Returns:
        One record a run and limit: `limits`, `seed`, `policy` (its file), `optimum` (reward), and
        `deterministic` and `sampled`, each with the entries of `Evaluation`; of a measured table rewards are
        means over its pictures.

    Raises:
        MegError: limits that no policy can meet, named with the lowest reachable values; a setting out of its
            range, or a folder of another run.
    """
    problem = problem_of(config) if problem is None else problem
    params, env = problem.params, environment(problem, observe_limits=config.conditioned)
    _check(config)
    runs, learner = _runs(config), _learner(config)
    algorithm = _algorithm(learner, env)
    table = tabulate(problem) if table is None else table
    best = {limits: optimum.solve(table, limits).reward for limits in config.limits}
    _claim(config, table)
    with _progress(f"{len(runs.seeds_R)} runs") if report is None else contextlib.nullcontext(report) as tell:
        states = _fit(config, algorithm, params, runs, best, tell)
    policies = jax.device_get(jax.vmap(algorithm.policy)(states))
    # A picture's quality varies far more than policies differ, and is no policy's doing.
    exact = environment(in_the_mean(problem), observe_limits=config.conditioned)
    judge = _judge(config, exact, params, learner.squash)
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
        path = config.folder / f"{name}_seed{seed}.safetensors"
        save_policy(path, Policy(policy, info))
        for pair in limits:
            found = judge(policy, pair, int(seed))
            record = {"limits": pair, "seed": int(seed), "policy": str(path), "optimum": best[pair]}
            results.append(record | found)
    write_file(config.folder / "results.json", json.dumps(results, indent=2))
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


def _over_runs(config: PolicyRunConfig, count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the transformation that makes one program of `count` runs, spread over the local devices."""
    side_by_side = jax.default_backend() != "cpu" if config.batching == "auto" else config.batching == "vmap"

    def on_a_device(run: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(run) if side_by_side else lambda *args: jax.lax.map(lambda one: run(*one), args)

    devices = jax.local_devices()[:count]
    if len(devices) == 1:
        return on_a_device
    mesh = jax.make_mesh((len(devices),), ("runs",), (AxisType.Auto,), devices=devices)
    spec = PartitionSpec("runs")
    # The devices take equal shares: the first runs fill the places that are left over, and are dropped after.
    places = jnp.arange(-(-count // len(devices)) * len(devices)) % count

    def over_devices(run: Callable[..., Any]) -> Callable[..., Any]:
        spread = jax.shard_map(on_a_device(run), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

        def all_runs(*args: Any) -> Any:
            filled = jax.tree.map(lambda x: x[places], args)
            return jax.tree.map(lambda x: x[:count], spread(*filled))

        return all_runs

    return over_devices


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=1.0, note="")
        yield lambda share, note: progress.update(task, completed=share, note=note)


def _fit(
    config: PolicyRunConfig,
    algorithm: Algorithm,
    params: EnvParams,
    runs: Runs,
    best: dict[tuple, float],
    report: Report,
) -> Any:
    """Train to the end, resuming from the folder's checkpoint."""
    over_runs = _over_runs(config, len(runs.seeds_R))
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
    log_path = config.folder / "curves.jsonl"
    say = functools.partial(print, file=sys.stderr)
    with open_checkpoints(config.folder / "checkpoints", say, keep=2, best=None) as manager:
        leaves, structure = jax.tree.flatten(states)
        first = 0
        if restored := restore(manager, leaves, say):
            states, first = jax.tree.unflatten(structure, restored.state), restored.step
        parts = -(-algorithm.epochs // chunk)
        _keep_lines(log_path, min(first * chunk, algorithm.epochs))
        with log_path.open("a") as log:
            for part in range(first, parts):
                start = time.perf_counter()
                count = min(chunk, algorithm.epochs - part * chunk)
                states, metrics = advance(keys, limits, states, jnp.full(len(keys), count))
                metrics = jax.device_get(metrics)
                seconds = time.perf_counter() - start
                _log(log, metrics, runs, min((part + 1) * chunk, algorithm.epochs), seconds, best)
                if (part + 1) % config.checkpoint_every == 0 or part + 1 == parts:
                    seal(manager)
                    save(manager, part + 1, jax.tree.leaves(states))
                reward, cost = np.mean(metrics["reward"]), np.mean(metrics["cost"], axis=(0, 1))
                report((part + 1) / parts, f"reward {reward:.3f}, {cost[0]:.3f} s, {cost[1]:.3f} kJ")
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


def _keep_lines(path: Path, epoch: int) -> None:
    """Drop what an interrupted run logged after its last checkpoint, a line cut short included."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["epoch"] <= epoch:
                kept.append(line + "\n")
    write_file(path, "".join(kept))


def draw(log_path: Path, path: Path) -> None:
    """Draw every run's reward, latency and energy with the optimum and the limits (Figs. 6 and 7)."""
    import matplotlib.figure  # takes a second, and only the picture needs it

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
    handles, labels = axes[0].get_legend_handles_labels()
    place: Any = "outside right"  # newer than the types of some releases
    figure.legend(handles=handles, labels=labels, title="limits (dashed: optimum, limit)", loc=place)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


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


def _check(config: PolicyRunConfig) -> None:
    """Refuse what cannot be trained."""
    if not config.limits or not config.seeds:
        raise MegError("limits and seeds: give at least one of each")
    for pair in config.limits:
        if not all(np.isfinite(x) and x > 0 for x in pair):
            raise MegError(f"limits {pair}: a mean latency (s) and energy (kJ), finite and above 0")
    if len(set(config.limits)) < len(config.limits) or len(set(config.seeds)) < len(config.seeds):
        raise MegError("limits and seeds: each may be given once")
    within(config, 0, LARGEST_SEED, "seeds")
    if config.learner.groups != 1:
        raise MegError(f"learner.groups {config.learner.groups}: leave it at 1; `conditioned` sets it")
    within(config, 1, math.inf, "chunks", "checkpoint_every", "episodes")
    if not np.isfinite(config.psnr_db):
        raise MegError(f"psnr_db {config.psnr_db}: must be a finite number")


def _claim(config: PolicyRunConfig, table: optimum.Tables) -> None:
    """Note in the folder what it trains, and refuse one that trains something else."""
    path = writable_folder(config.folder, "folder") / "config.json"
    fields = {
        k: v for k, v in dataclasses.asdict(config).items() if k not in ("folder", "batching", "episodes")
    }
    fields |= {"kind": type(config.learner).__name__, "problem": _some_numbers(table)}
    here = json.loads(json.dumps(fields))
    if path.exists():
        try:
            there = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise MegError(f"{path}: not valid JSON; mend it, or choose another --folder") from None
        if isinstance(there.get("kind"), dict):  # of a former version, which kept a hash of the problem
            there |= {"kind": there["kind"].get("learner"), "problem": here["problem"]}
        if different := sorted(name for name in here.keys() | there if not _same(here, there, name)):
            raise MegError(
                f"{config.folder} holds a run with other settings ({', '.join(different)}): choose another "
                "--folder or remove it"
            )
    write_file(path, json.dumps(here, indent=2))


def _some_numbers(table: optimum.Tables) -> list[float]:
    """Rewards and costs of some actions: they say which problem it is, however it was given."""
    means_AxQ = np.concatenate([table.rewards_SxA[..., None], table.costs_SxAxM], axis=-1).mean(axis=0)
    some = np.linspace(0, len(means_AxQ) - 1, 16).astype(int)
    return np.asarray(means_AxQ[some], np.float64).ravel().tolist()


def _same(here: dict[str, Any], there: dict[str, Any], name: str) -> bool:
    """Whether two runs agree in a setting; the problem's numbers differ a little between machines."""
    ours, theirs = here.get(name), there.get(name)
    if name != "problem":
        return ours == theirs
    if not isinstance(theirs, list) or len(theirs) != len(here[name]):
        return False
    return np.allclose(np.asarray(theirs, float), np.asarray(ours, float), rtol=1e-4, atol=1e-6)

"""The learning problem on measured quality, its limits and optimum, and training in further processes."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from configs import policy as presets
from eval.suite import physical
from eval.suite.config import MAX_STEPS, MIN_STEPS, SuiteConfig
from eval.suite.context import Context, Stage, key_of
from eval.suite.measure import sweep
from megjax.errors import MegError
from megjax.link.cost import Compute
from megjax.link.profiles import load
from megjax.pipeline.load import sdxl
from megjax.rl import optimum
from megjax.rl.cvpo import CvpoConfig
from megjax.rl.env import EnvParams
from megjax.rl.policy import act, load_policy
from megjax.rl.ppo import Pid, PpoConfig
from megjax.rl.problem import Problem, tabulate, wire_payload
from megjax.rl.quality import make_table
from megjax.rl.training import PolicyRunConfig, train_policies
from megjax.training.checkpoints import NoCheckpointLeft

Learner: TypeAlias = Literal["cvpo", "ppo"]
LEARNERS: dict[Learner, str] = {"cvpo": "MEG-CVPO", "ppo": "PPO-Lagrangian"}

STEPS = tuple(range(MIN_STEPS, MAX_STEPS + 1))
SLACK = 1.05
"""A limit that does not bind: what the best policy without limits costs, and a little."""
TIGHT = 1.1
"""The tightest limit over the lowest reachable mean."""
EPISODE = 64
"""Frames, whose costs the authors' controller sees as one sum."""
PAPER_PPO = dataclasses.replace(
    PpoConfig(),
    envs=4,
    greedy_envs=0,
    collect_steps=64,
    epochs=100,
    discount=0.99,
    lr=5e-4,
    final_lr_share=1.0,
    hidden=(128, 128),
    pid=Pid(
        proportional=0.05 * EPISODE,
        integral=0.0005 * EPISODE,
        derivative=0.1 * EPISODE,
        max_error=1e6,
        units=(1.0, 0.1),
    ),
    mean_memory=1.0,
    std_start=(0.02, 4.5),
    std_end=(0.02, 4.5),
    squash="tanh",
    box_penalty=0.0,
)
"""The authors' PPO-Lagrangian, Eq. (24), as MegJAX reads it, over as many frames as their MEG-CVPO.

FSRL's gains (0.05, 0.0005, 0.1) act on an episode's sum less its limit, 64 (J - d), in seconds and in the
authors' unit of 100 J; the error that they sum up is not clipped. As published the multiplier stays at 0: the
authors' collector gives means a frame, which are held against 64 d.
"""
CHUNKS = 40
"""Points of a training curve."""


def counts(config: SuiteConfig) -> Stage:
    """Return the stage of the FLOPs of a frame: full SDXL's, or the model's own."""
    settings = {"physical": config.physical, "tome": config.tome}
    return Stage(f"counting FLOPs, {config.physical}", settings, _counts, model=config.physical == "tiny")


def _counts(context: Context, settings: Mapping[str, Any]) -> dict[str, Any]:
    pipeline = sdxl() if settings["physical"] == "sdxl" else context.pipeline
    return physical.count(pipeline, settings["tome"])


def problem(config: SuiteConfig) -> Stage:
    """Return the stage of problem (23) on the measured table: numbers, limits, optima, fronts."""
    profile = dataclasses.asdict(load(config.profile))
    settings = {"profile": profile, "rules": config.rules, "psnr_db": config.feature_psnr_db}
    needs = (counts(config), *quality(config))
    return Stage("limits and optimum", settings, lambda *args: _problem(config, *args), needs)


def quality(config: SuiteConfig) -> tuple[Stage, ...]:
    """Return the stages of MEG's MSE at every T and ratio."""
    return tuple(sweep(config, "meg", steps, config.ratios, (config.feature_psnr_db,)) for steps in STEPS)


def training(config: SuiteConfig, learner: Learner) -> Stage:
    """Return the stage of one algorithm's policies, every limit with every seed."""
    found = learner_config(config, learner)
    settings = {
        "learner": learner,
        "hyper_parameters": dataclasses.asdict(found),
        "seeds": [config.seed + i for i in range(config.seeds)],
        "channels": [config.seed, config.pictures],
    }
    label = f"training {LEARNERS[learner]}, {config.seeds} seeds"
    return Stage(label, settings, _training, (problem(config),))


def choice(config: SuiteConfig, learner: Learner, limit: int) -> Stage:
    """Return the stage of what a limit's first policy chooses for every picture's channel."""
    settings = {"limit": limit}
    label = f"{LEARNERS[learner]}, limit {limit + 1}, choices"
    return Stage(label, settings, _choice, (training(config, learner),))


def _choice(context: Context, settings: Mapping[str, Any], trained: Any) -> dict[str, Any]:
    runs = [run for run in trained["runs"] if run["limit"] == settings["limit"]]
    return {"steps": runs[0]["steps"], "ratios": runs[0]["ratios"]}


def learner_config(config: SuiteConfig, learner: Learner) -> Any:
    """Return an algorithm's hyper-parameters under the rules in force: a `CvpoConfig` or a `PpoConfig`."""
    epochs = config.cvpo_epochs if learner == "cvpo" else config.ppo_epochs
    if config.rules == "paper":
        found = presets.PAPER.learner if learner == "cvpo" else PAPER_PPO
    else:
        found = presets.DEFAULT.learner if learner == "cvpo" else presets.PPO.learner
    return found if epochs is None else dataclasses.replace(found, epochs=epochs)


def _problem(
    config: SuiteConfig, context: Context, settings: Mapping[str, Any], counted: Any, *sweeps: Any
) -> dict[str, Any]:
    scale = physical.scale(config.physical, counted, config.guidance)
    compute = physical.computation(load(config.profile), scale, tome=True)
    record = {
        # P x T x R x S
        "mse": np.stack([found["mse"] for found in sweeps]).transpose(3, 0, 1, 2),
        "steps": list(STEPS),
        "ratios": list(config.ratios),
        "psnr_db": settings["psnr_db"],
        "compute": [physical.real(x) for x in compute],
        "tokens": scale.grid[0] * scale.grid[1],
        "channels": 4 * scale.latent[2],
        "rules": settings["rules"],
    }
    table = tabulate(problem_of(record))
    lowest = optimum.reach(table, (1e9, 1e9)).lowest
    free = optimum.solve(table, (1e9, 1e9)).costs
    loose, tight = SLACK * free, TIGHT * lowest
    middle = (loose + tight) / 2
    limits = [_rounded(pair) for pair in (
        loose, (middle[0], loose[1]), (tight[0], loose[1]), (loose[0], middle[1]), (loose[0], tight[1]),
    )]  # fmt: skip
    found = [optimum.solve(table, pair) for pair in limits]
    return {
        "record": record,
        "lowest": lowest.tolist(),
        "free": free.tolist(),
        "limits": [list(pair) for pair in limits],
        "optimum": [
            {"reward": o.reward, "costs": o.costs.tolist(), "prices": o.prices.tolist()} for o in found
        ],
        "fronts": [_front(table, lowest, loose, which) for which in (0, 1)],
    }


def _rounded(pair: Any) -> tuple[float, float]:
    # Four digits, upwards, so that a limit prints as it is and stays reachable.
    digits = [3 - math.floor(math.log10(x)) for x in pair]
    return tuple(math.ceil(x * 10**d) / 10**d for x, d in zip(pair, digits, strict=True))  # type: ignore[return-value]


def _front(table: optimum.Tables, lowest: np.ndarray, loose: np.ndarray, which: int) -> dict[str, Any]:
    """Return the optimum and the best policy blind to the channel, from the lowest limit to a loose one."""
    # Dense, as chords of a bent front lie below it.
    limits = np.linspace(1.01 * lowest[which], loose[which], 64)
    best, constant = [], []
    for limit in limits:
        pair = np.where(np.arange(2) == which, limit, loose)
        best.append(optimum.solve(table, pair).reward)
        try:
            constant.append(optimum.best_constant(table, pair)[0])
        except MegError:
            constant.append(None)
    return {"limits": limits.tolist(), "optimum": best, "constant": constant}


def problem_of(record: Mapping[str, Any]) -> Problem:
    """Return the problem that a record of numbers means."""
    table = make_table(record["mse"], record["steps"], record["ratios"], [record["psnr_db"]])
    params = EnvParams(
        compute=Compute(*record["compute"]),
        psnr_db=record["psnr_db"],
        min_steps=record["steps"][0],
        max_steps=record["steps"][-1],
    )
    return Problem(params, table, wire_payload(record["tokens"], record["channels"], record["rules"]))


class Job(NamedTuple):
    """A training in a process of its own, and how far it is."""

    process: Any
    reports: Any
    """The connection's reading end: (share, note)."""


JOBS: dict[str, Job] = {}
"""Trainings under way, by their stage's key."""


def start(context: Context, stage: Stage, found: Any) -> None:
    """Start a training beside this process, on the host's CPU, unless it is under way."""
    key = key_of(context, stage)
    if key in JOBS:
        return
    settings = stage.settings
    folder = context.folder / f"policies-{settings['learner']}-{key[:16]}"
    arguments = (
        found["record"],
        found["limits"],
        dict(settings),
        learner_config(context.config, settings["learner"]),
    )
    spawn = multiprocessing.get_context("spawn")
    reading, writing = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_train, args=(*arguments, folder, writing), daemon=True)
    # A small network's steps gain nothing from more threads, and the accelerator is the pictures'.
    alone = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "OMP_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in alone}
    os.environ.update(alone)
    try:
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    writing.close()
    JOBS[key] = Job(process, reading)


def _training(context: Context, settings: Mapping[str, Any], found: Any) -> dict[str, Any]:
    stage = training(context.config, settings["learner"])
    start(context, stage, found)
    process, reports = JOBS.pop(key_of(context, stage))
    result = None
    while result is None:
        try:
            report = reports.recv()
        except EOFError:
            process.join()
            raise MegError(f"{stage.name} ended with exit code {process.exitcode}") from None
        if isinstance(report, str):
            raise MegError(f"{stage.name}: {report}")
        if isinstance(report, dict):
            result = report
        else:
            context.on_share(*report)
    process.join()
    return result


def _train(
    record: dict[str, Any],
    limits: list[list[float]],
    settings: dict[str, Any],
    learner: CvpoConfig | PpoConfig,
    folder: Path,
    reports: Any,
) -> None:
    """Train in this process; send shares, then the result or the error's message."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until a run that was killed is gone
            reports.send(_trained(record, limits, settings, learner, folder, reports))
    except MegError as error:
        reports.send(str(error))


def _trained(
    record: dict[str, Any],
    limits: list[list[float]],
    settings: dict[str, Any],
    learner: CvpoConfig | PpoConfig,
    folder: Path,
    reports: Any,
) -> dict[str, Any]:
    begun = time.perf_counter()
    pairs = tuple((latency, energy) for latency, energy in limits)
    config = PolicyRunConfig(
        learner=learner,
        limits=pairs,
        seeds=tuple(settings["seeds"]),
        folder=folder / "run",
        chunks=CHUNKS,
        checkpoint_every=4,
    )
    given = problem_of(record)

    def train() -> list[dict[str, Any]]:
        return train_policies(config, given, None, lambda share, note: reports.send((share, note)))

    try:
        results = train()
    except NoCheckpointLeft:
        print(f"cache: {config.folder} cannot be continued; training again", file=sys.stderr)
        shutil.rmtree(config.folder)
        results = train()
    lines = [json.loads(line) for line in (config.folder / "curves.jsonl").read_text().splitlines()]
    snr_P = physical.draw_channels(*settings["channels"])
    runs = []
    for found in results:
        pair = tuple(found["limits"])
        own = [x for x in lines if tuple(x["limits"]) == pair and x["seed"] == found["seed"]]
        # Pictures are drawn of the first seed's choices alone.
        first = found["seed"] == config.seeds[0]
        steps, ratios = _choices(Path(found["policy"]), given, snr_P) if first else ([], [])
        runs.append(
            {
                "limit": pairs.index(pair),
                "seed": found["seed"],
                "deterministic": found["deterministic"],
                "sampled": found["sampled"],
                "epochs": [x["epoch"] for x in own],
                "reward": [x["reward"] for x in own],
                "costs": [x["cost"] for x in own],
                "steps": steps,
                "ratios": ratios,
            }
        )
    shutil.rmtree(config.folder / "checkpoints", ignore_errors=True)
    frames = learner.envs * learner.collect_steps
    return {
        "runs": runs,
        "frames_per_epoch": frames,
        # Of this process: the one that waits for it has others.
        "cost": {
            "seconds": time.perf_counter() - begun,
            "processor_seconds": time.process_time(),
            "device": f"CPU, {platform.machine()}",
        },
    }


def _choices(path: Path, given: Problem, snr_P: np.ndarray) -> tuple[list[int], list[float]]:
    """Return the policy's T and r for frames that follow one another, each over its own channel."""
    policy, before = load_policy(path), (0.0, 0.0)
    steps, ratios = [], []
    for snr in snr_P:
        chosen = act(policy, float(10 * np.log10(snr)), *before)
        bits = given.payload(jnp.asarray(chosen.ratio, jnp.float32))
        cost = physical.costs(given.params.compute, chosen.steps, float(bits), np.asarray([snr]))
        before = (float(cost["latency_s"][0]), float(cost["energy_j"][0]) / 1e3)
        steps.append(chosen.steps)
        ratios.append(chosen.ratio)
    return steps, ratios


def _end_with_parent() -> None:
    """End this process soon after the one that started it, however that ended."""
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        time.sleep(0.5)
    os._exit(1)

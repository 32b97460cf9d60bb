"""A run so small that tests can start it often: a noisy quadratic; its weights tell a wrong key or batch."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from megjax.training.loop import fit
from megjax.training.optimizer import make_optimizer
from megjax.training.step import init_state, make_step

OPTIMIZER = make_optimizer(0.1, 1000, warmup=2)
KEY = jax.random.key(5)


class Counting:
    """Batches 0, 1, 2, ...: an iterator whose position matters."""

    def __init__(self):
        self.at = 0

    def __next__(self):
        self.at += 1
        return jnp.full(3, float(self.at % 7))

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def loss(params, key, batch):
    noise = 0.1 * jax.random.normal(key, params["x"].shape)
    return jnp.sum(jnp.square(params["x"] - batch + noise)), {}


def start():
    return init_state({"x": jnp.arange(3.0), "y": jnp.ones((40, 5))}, OPTIMIZER)


@functools.cache  # so that `jax.jit` knows it again
def step_of(loss):
    return make_step(loss, OPTIMIZER, 0.9)


def run(folder: Path, steps: int, **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    kwargs.setdefault("batches", Counting())
    given = {"key": KEY, "every": 3, "checkpoint_every": 2, **kwargs}
    step = given.pop("step", None) or step_of(given.pop("loss", loss))
    return fit(step, start(), steps=steps, folder=folder, name="run", **given)


def records(folder: Path):
    return [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]


def events(folder: Path):
    return [record["event"] for record in records(folder) if "event" in record]

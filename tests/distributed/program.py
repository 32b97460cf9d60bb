"""The same run on one device, on several, cut over them, or over processes; started by test_meshes.py.

    python -m tests.distributed.program LAYOUT FOLDER [--optimizer sgd] [--steps 20] [--network mlp]

Writes `FOLDER/run.jsonl` with a loss a step.
"""

import argparse
import os
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("layout", choices=["one", "data", "fsdp", "tensor"])
parser.add_argument("folder", type=Path)
parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adamw", "muon"])
parser.add_argument("--network", default="mlp", choices=["mlp", "unet"])
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--process", type=int, default=0)
parser.add_argument("--port", type=int, default=0)
parser.add_argument("--terminate-at", type=int, default=-1)
args = parser.parse_args()

import jax  # noqa: E402

if args.processes > 1:
    jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.process)

import signal  # noqa: E402

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from megjax.data.loader import shuffled_batches  # noqa: E402
from megjax.training.loop import fit  # noqa: E402
from megjax.training.optimizer import make_optimizer  # noqa: E402
from megjax.training.sharding import (  # noqa: E402
    batch_part,
    make_mesh,
    param_shardings,
    replicated,
    state_shardings,
)
from megjax.training.step import init_state, make_step  # noqa: E402
from tests.distributed.problem import init, loss, rows  # noqa: E402

optimizer = (
    optax.sgd(0.05) if args.optimizer == "sgd" else make_optimizer(3e-3, 1000, warmup=2, rule=args.optimizer)
)
devices = jax.devices()[:1] if args.layout == "one" else jax.devices()
axes = {args.layout: len(devices)} if args.layout in ("fsdp", "tensor") else {}
mesh = make_mesh(**axes, devices=devices)
params = init(args.network)
shapes = jax.eval_shape(lambda: init_state(params, optimizer))
start = jax.jit(
    lambda: init_state(init(args.network), optimizer), out_shardings=state_shardings(shapes, mesh)
)


def everywhere(tree, shardings):
    def put(leaf, sharding):
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


with jax.set_mesh(mesh):
    state = start()
if args.layout == "fsdp":
    assert any(len(set(leaf.sharding.spec) - {None}) for leaf in jax.tree.leaves(state.params))
frozen = init(args.network, seed=1)
batches = shuffled_batches(rows(args.network), 16, 3, batch_part(mesh))


class Terminating:
    """SIGTERM to this process before a step."""

    def __init__(self):
        self.set_state, self.get_state, self.taken = batches.set_state, batches.get_state, 0

    def __next__(self):
        self.taken += 1
        if self.taken == args.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(batches)


args.folder.mkdir(parents=True, exist_ok=True)
fit(
    make_step(loss(args.network), optimizer, 0.99),
    state,
    key=jax.random.key(7),
    steps=args.steps,
    folder=args.folder,
    name="run",
    batches=Terminating(),
    frozen=everywhere(frozen, param_shardings(frozen, mesh)),
    mesh=mesh,
    every=1,
    checkpoint_every=10,
)
print("finished", jnp.zeros(()).devices(), replicated(mesh).mesh.shape)

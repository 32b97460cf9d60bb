"""The same losses on one device, on eight, cut over eight, and on two processes of four; also under pmap."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megjax.errors import MegError
from megjax.training.sharding import _even_axes, _part

BOUND = {"sgd": 1e-5, "adamw": 1e-4, "muon": 1e-4}


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    # Each process compiles for itself, for longer than it trains.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | quick


def launch(layout, folder, devices, **kwargs):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in kwargs.items()]
    command = [sys.executable, "-m", "tests.distributed.program", layout, str(folder), *options]
    return subprocess.Popen(
        command, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(*processes):
    # All are read at once: one that waits for a reader keeps the others waiting at their last barrier.
    with ThreadPoolExecutor(len(processes)) as readers:
        said = list(readers.map(lambda process: process.communicate(timeout=900), processes))
    for process, (out, error) in zip(processes, said, strict=True):
        # The cause comes first; what the coordination service says of it is long.
        cause = "Traceback" + error.partition("Traceback")[2] if "Traceback" in error else error
        assert process.returncode == 0, f"{out[-500:]}\n{cause[:4000]}"


def losses(folder, name="run"):
    records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def on_two_processes(folder, layout="fsdp", **kwargs):
    port = free_port()
    finish(*(launch(layout, folder, 4, processes=2, process=i, port=port, **kwargs) for i in range(2)))
    return losses(folder)


def compare(tmp_path, optimizer, network, layouts):
    finish(launch("one", tmp_path / "one", 8, optimizer=optimizer, network=network))
    alone = losses(tmp_path / "one")
    assert len(alone) == 20
    assert len(set(alone)) == 20
    for layout in layouts:
        finish(launch(layout, tmp_path / layout, 8, optimizer=optimizer, network=network))
        np.testing.assert_allclose(losses(tmp_path / layout), alone, rtol=BOUND[optimizer])
    several = on_two_processes(tmp_path / "two", optimizer=optimizer, network=network)
    np.testing.assert_allclose(several, alone, rtol=BOUND[optimizer])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_all_layouts_have_the_same_losses(tmp_path, optimizer):
    compare(tmp_path, optimizer, "mlp", ["data", "fsdp"])


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_all_layouts_have_the_same_losses_with_a_unet(tmp_path, optimizer):
    compare(tmp_path, optimizer, "unet", ["data", "fsdp"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses on one device, by plain gradient descent."""
    folder = tmp_path_factory.mktemp("one")
    finish(launch("one", folder, 1))
    return losses(folder)


def test_a_run_goes_on_on_another_number_of_devices(tmp_path, alone):
    folder = tmp_path / "moved"
    finish(launch("fsdp", folder, 8, steps=10))
    on_two_processes(folder, "data", steps=15)
    finish(launch("one", folder, 1))
    np.testing.assert_allclose(losses(folder), alone, rtol=BOUND["sgd"])


def test_a_tensor_group_over_two_processes_has_one_batch(tmp_path, alone):
    several = on_two_processes(tmp_path / "two", "tensor")
    np.testing.assert_allclose(several, alone, rtol=BOUND["sgd"])


@pytest.mark.parametrize(
    ("processes", "parts"),
    [
        ([[0], [0], [1], [1]], {0: (0, 2), 1: (1, 2)}),
        ([[1], [0], [1], [0]], {0: (1, 2), 1: (0, 2)}),
        ([[0, 1], [2, 3]], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
        ([[0, 1, 2, 3]], dict.fromkeys(range(4), (0, 1))),
        ([[0, 1], [0, 1]], {0: (0, 1), 1: (0, 1)}),
    ],
)
def test_which_processes_hold_the_same_rows(processes, parts):
    assert {process: _part(processes, process) for process in parts} == parts


@pytest.mark.parametrize(
    ("rows", "axes"),
    [(16, ("data", "fsdp")), (8, ("data", "fsdp")), (12, ("fsdp",)), (6, ("data",)), (3, ())],
)
def test_rows_that_do_not_divide_lie_over_the_axes_that_do(rows, axes):
    assert _even_axes(rows, {"data": 2, "fsdp": 4, "tensor": 1}) == axes


@pytest.mark.parametrize("processes", [[[0, 0, 1], [1, 2, 2]], [[0], [0], [1]]])
def test_rows_shared_by_some_devices_of_a_process_are_refused(processes):
    with pytest.raises(MegError, match="groups share some"):
        _part(processes, 0)


def test_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path, alone):
    folder = tmp_path / "stopped"
    on_two_processes(folder, terminate_at=4)
    stopped = len(losses(folder))
    assert 4 <= stopped < 20
    assert (folder / "run" / str(stopped)).is_dir()
    on_two_processes(folder)
    np.testing.assert_allclose(losses(folder), alone, rtol=BOUND["sgd"])


PMAP = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from megjax.training.step import Inputs
from tests.distributed.problem import init, loss, rows

one = loss("mlp")

@partial(jax.pmap, axis_name="replica", in_axes=(None, 0, 0, None))
def replicas(params, key, data, teacher):
    (value, _), grads = jax.value_and_grad(one, has_aux=True)(params, key, Inputs(data, teacher))
    return jax.lax.pmean((value, grads), "replica")

@jax.jit
def alone(params, key, data, teacher):
    (value, _), grads = jax.value_and_grad(one, has_aux=True)(params, key, Inputs(data, teacher))
    return value, grads

source, teacher = rows("mlp"), init("mlp", seed=1)
a = b = init("mlp")
for step in range(5):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 8)
    each = [source[step * 16 + i] for i in range(16)]
    data = {k: np.stack([row[k] for row in each]).reshape(8, 2, *each[0][k].shape) for k in each[0]}
    value, grads = jax.tree.map(lambda x: x[0], replicas(a, keys, data, teacher))
    parts = [alone(b, keys[i], {k: v[i] for k, v in data.items()}, teacher) for i in range(8)]
    np.testing.assert_allclose(value, np.mean([v for v, _ in parts]), rtol=1e-5)
    a = jax.tree.map(lambda p, g: p - 0.05 * g, a, grads)
    b = jax.tree.map(lambda p, *g: p - 0.05 * sum(g) / 8, b, *[g for _, g in parts])
"""


def test_the_loss_runs_under_pmap_with_an_axis_name():
    run = subprocess.run([sys.executable, "-c", PMAP], env=environment(8), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]

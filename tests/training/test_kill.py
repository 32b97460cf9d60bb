"""SIGKILL at random moments, checkpoint writing included: every restart goes on, the weights are the same."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

PROGRAM = """
import sys, time
from pathlib import Path
import jax, numpy as np
from tests.training.runs import Counting, run

class Slow(Counting):
    def __next__(self):
        time.sleep(0.01)
        return super().__next__()

folder = Path(sys.argv[1])
state = run(folder, int(sys.argv[2]), batches=Slow(), checkpoint_every=1)
np.savez(folder / "final.npz", *jax.tree.leaves(state))
"""


def start(folder, steps):
    command = [sys.executable, "-c", PROGRAM, str(folder), str(steps)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def newest(folder):
    steps = [int(path.name) for path in folder.glob("run/*") if path.name.isdigit()]
    return max(steps, default=0)


def killed_run(folder, steps, kills, seed):
    """Kill as soon as a random number of further checkpoints is there, and a random moment later."""
    rng = random.Random(seed)
    moments = []
    for left in range(kills, 0, -1):
        process = start(folder, steps)
        reached = newest(folder)
        target = reached + 1 + rng.randrange(max(1, (steps - reached) // left - 1))
        while newest(folder) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL or newest(folder) == steps
        writing = bool(list(folder.glob("run/*tmp*")))
        moments.append((newest(folder), writing))
    process = start(folder, steps)
    _, error = process.communicate()
    assert process.returncode == 0, error[-2000:]
    return moments


def check(tmp_path, steps, kills, seed):
    whole = start(tmp_path / "whole", steps)
    _, error = whole.communicate()
    assert whole.returncode == 0, error[-2000:]
    moments = killed_run(tmp_path / "killed", steps, kills, seed)
    with np.load(tmp_path / "whole" / "final.npz") as a, np.load(tmp_path / "killed" / "final.npz") as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])
    print(moments)
    return moments


def test_killed_twice(tmp_path):
    assert len(check(tmp_path, 24, 2, seed=0)) == 2


@pytest.mark.long
def test_killed_twenty_times(tmp_path):
    moments = check(tmp_path, 200, 20, seed=1)
    assert sum(writing for _, writing in moments) >= 3  # in the middle of writing a checkpoint

"""The trainer itself as two processes: the same losses as one process with as many devices."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.distributed.test_meshes import environment, finish, free_port, losses
from tests.small import save_random


def launch(backbone, folder, devices, *options, **variables):
    command = [sys.executable, "-m", "train.distill_diffuser", "debug", "--model", str(backbone)]
    command += [
        "--folder",
        str(folder),
        "--cache",
        str(folder.parent / "cache"),
        "--replicas",
        "1",
        "--fsdp",
        "2",
    ]
    return subprocess.Popen(
        [*command, *options],
        env=environment(devices) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_two_processes_are_one_run(tmp_path):
    backbone = save_random(tmp_path / "model")
    finish(launch(backbone, tmp_path / "one" / "run", 2))
    variables = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    folder = tmp_path / "two" / "run"
    finish(
        *(launch(backbone, folder, 1, "--distributed", **variables, JAX_PROCESS_ID=str(i)) for i in range(2))
    )
    several, alone = (losses(tmp_path / name / "run", "student") for name in ("two", "one"))
    assert len(alone) == 2
    np.testing.assert_allclose(several, alone, rtol=1e-4)
    assert (folder / "model" / "unet_student" / "flow.json").is_file()


def test_processes_that_find_no_others_say_what_to_set(tmp_path):
    found = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "OMPI_"))}
    command = [
        sys.executable,
        "-m",
        "train.distill_diffuser",
        "debug",
        "--distributed",
        "--folder",
        str(tmp_path),
    ]
    run = subprocess.run(command, env=found | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert run.returncode == 2
    assert "error: distributed:" in run.stderr
    assert "JAX_NUM_PROCESSES" in run.stderr
    assert "Traceback" not in run.stderr

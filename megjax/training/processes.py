"""Several processes as one run."""

from __future__ import annotations

import itertools
import os

import jax
from orbax.checkpoint import multihost

from megjax.errors import MegError

PATIENCE_S = 24 * 3600
"""For the slowest process."""

_MEETINGS = itertools.count()
"""A barrier serves once."""


def join_processes() -> None:
    """Join the other processes of the run, before anything else asks JAX for its devices.

    JAX finds them under Slurm, Open MPI, Kubernetes and on Cloud TPUs. Anywhere else the environment tells
    each process: JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        MegError: no other processes are found, or they cannot be joined.
    """
    number, own = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(num_processes=number, process_id=own, local_device_ids=_local())
    except (ValueError, RuntimeError) as error:
        raise MegError(
            f"distributed: {error} Start it with srun, mpirun, on Kubernetes or on a Cloud TPU, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process"
        ) from error


def together(what: str) -> None:
    """Wait until all processes are here. One that ends while another writes for minutes would end it, too.

    By the coordination service: a collective gives up on a process that compiles or writes for longer.

    Args:
        what: has been done; the same on all.
    """
    if (count := jax.process_count()) > 1:
        name = f"megjax: {what}, {next(_MEETINGS)}"
        multihost.sync_global_processes(name, processes=set(range(count)), timeout=PATIENCE_S)


def _local() -> list[int] | None:
    """The devices to take, where the launcher shows a process its own GPU alone (Slurm's --gpus-per-task).

    JAX would count the machine's, of which it cannot see the others.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    alone = visible and "," not in visible and "JAX_LOCAL_DEVICE_IDS" not in os.environ
    return [0] if alone else None


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise MegError(f"{name}={text}: a whole number from 0 up is allowed")
    return int(text)

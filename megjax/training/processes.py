"""Several processes as one run."""

from __future__ import annotations

import os

import jax

from megjax.errors import MegError


def join_processes() -> None:
    """Join the other processes of the run, before anything else asks JAX for its devices.

    JAX finds them under Slurm, Open MPI, Kubernetes and on Cloud TPUs. Anywhere else the environment tells
    each process: JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        MegError: no other processes are found, or they cannot be joined.
    """
    number, own = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(num_processes=number, process_id=own)
    except (ValueError, RuntimeError) as error:
        raise MegError(
            f"distributed: {error} Start it with srun, mpirun, on Kubernetes or on a Cloud TPU, or set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process"
        ) from error


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise MegError(f"{name}={text}: a whole number from 0 up is allowed")
    return int(text)

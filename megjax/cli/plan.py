"""`megjax plan BACKBONE --topology v5e:4x4`: does it fit, and how fast should it be, with no chip present?"""

from __future__ import annotations

import sys

import tyro

from megjax.errors import MegError
from megjax.files import writable
from megjax.plan.config import PlanConfig

DOES_NOT_FIT = 3
"""Exit code."""


def plan_command(args: tyro.conf.OmitArgPrefixes[PlanConfig]) -> None:
    """Compile the programs, print a table for each, and exit with 3 if one does not fit."""
    for name in ("images", "accumulate", "steps", "solver_steps"):
        if getattr(args, name) < 1:
            raise MegError(f"{name} {getattr(args, name)}: at least 1 is needed")
    for name in ("replicas", "fsdp", "tensor"):
        if getattr(args, name) < 1 and getattr(args, name) != -1:
            raise MegError(f"{name} {getattr(args, name)}: at least 1, or -1 for the devices that are left")
    if args.json is not None:
        writable(args.json, "json")
    # Trainers and their libraries take seconds to import, which other commands need not wait for.
    from megjax.cli.planning import plan

    if not plan(args):
        sys.exit(DOES_NOT_FIT)

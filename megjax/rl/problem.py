"""A constrained problem as one record, from which come its environment and the tables of its optimum."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from megjax.errors import MegError
from megjax.link import profiles
from megjax.link.cost import SDXL, SDXL_UNMERGED, calls_per_step
from megjax.link.counts import largest_ratio
from megjax.link.payload import PayloadRules, payload_bits, rounds_of
from megjax.rl.env import REFERENCE, Env, EnvParams, Payload, analytic_payload, make_env
from megjax.rl.optimum import Tables, tables
from megjax.rl.quality import QualitySource, Table, analytic_mse, mean_table


class Problem(NamedTuple):
    """Problem (23) less its limits, which belong to a run. Its defaults are the reference problem."""

    params: EnvParams = REFERENCE
    """Link, computation and range of the steps; every number may differ between runs of one program."""
    quality: QualitySource = analytic_mse
    payload: Payload = analytic_payload
    tied_psnr: bool = False
    """The features' PSNR follows the link's SNR; `params.psnr_db` is then the margin over it."""


ANALYTIC = Problem()

SDXL_GRID = (64, 64)
"""Tokens of SDXL's latent, 2 x 2 values each."""


def environment(problem: Problem, *, observe_limits: bool = False) -> Env:
    """Return the problem's environment."""
    return make_env(
        problem.quality,
        problem.payload,
        observe_limits=observe_limits,
        tied_psnr=problem.tied_psnr,
    )


def in_the_mean(problem: Problem) -> Problem:
    """Return the problem whose rewards are means over a table's pictures, not draws of one."""
    quality = problem.quality
    return problem._replace(quality=mean_table(quality)) if isinstance(quality, Table) else problem


def tabulate(problem: Problem, bins: int = 200, ratios: int = 401, quality_draws: int = 256) -> Tables:
    """Return the problem's tables for `optimum.solve`.

    Args:
        problem: whose link, costs and quality are tabulated.
        bins, ratios: as for `optimum.tables`.
        quality_draws: over which the reward is averaged; a `Table` and the analytic surface have exact means.
    """
    quality = in_the_mean(problem).quality
    if isinstance(quality, Table) or quality is analytic_mse:
        quality_draws = 1
    return tables(
        problem.params,
        quality,
        problem.payload,
        bins,
        ratios,
        quality_draws,
        tied_psnr=problem.tied_psnr,
    )


def measured(table: Table, profile: profiles.AnyProfile, psnr_db: float) -> Problem:
    """Return the problem on a table's quality, as it was measured, with SDXL's costs.

    Args:
        table: its record says by which rules messages were made, under which guidance, and how many tokens
            the U-Net merged.
        profile: the hardware.
        psnr_db: of the received features; dB.

    Raises:
        MegError: a PSNR that was not measured, ratios that do not reach from 0 to the most that merges, or a
            U-Net whose costs are not known.
    """
    settings = table.about.get("settings", {})
    rules, tome_ratio = settings.get("rules", "default"), settings.get("tome_ratio", 0.5)
    low, high = table.psnrs_db[[0, -1]]
    if not low <= psnr_db <= high:
        raise MegError(f"psnr_db {psnr_db:g}: the table was measured from {low:g} to {high:g} dB")
    least, most = table.ratios[[0, -1]]
    wanted = largest_ratio(SDXL_GRID, rounds_of(rules))
    if least > 0 or most < wanted:
        raise MegError(
            f"the table's ratios go from {least:g} to {most:g}: measure from 0 to {wanted:g}, "
            "which policies choose from"
        )
    if tome_ratio not in (0.0, 0.5):
        raise MegError(
            f"the table was measured with tome_ratio {tome_ratio:g}: SDXL's costs are known for 0 and 0.5"
        )
    workload = SDXL if tome_ratio else SDXL_UNMERGED
    workload = workload._replace(calls_per_step=calls_per_step(settings.get("guidance", 2.5)))
    params = EnvParams(
        compute=profiles.compute(profile, workload, tome=tome_ratio > 0),
        psnr_db=psnr_db,
        min_steps=int(table.steps[0]),
        max_steps=int(table.steps[-1]),
    )
    return Problem(params, table, wire_payload(rules=rules))


def wire_payload(tokens: int = 4096, channels: int = 16, rules: PayloadRules = "default") -> Payload:
    """Return the bits of a message of the wire format at a traced ratio; SDXL's latent, left out."""

    def payload(ratio: Float[Array, ""]) -> Shaped[Array, ""]:
        return jnp.asarray(payload_bits(ratio, tokens, channels, rules=rules))

    return payload

"""A constrained problem as one record, from which come its environment and the tables of its optimum."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from megjax.link.payload import PayloadRules, payload_bits
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


def environment(problem: Problem, *, observe_limits: bool = False) -> Env:
    """Return the problem's environment."""
    return make_env(
        problem.quality,
        problem.payload,
        observe_limits=observe_limits,
        tied_psnr=problem.tied_psnr,
    )


def tabulate(problem: Problem, bins: int = 200, ratios: int = 401, quality_draws: int = 256) -> Tables:
    """Return the problem's tables for `optimum.solve`.

    Args:
        problem: whose link, costs and quality are tabulated.
        bins, ratios: as for `optimum.tables`.
        quality_draws: over which the reward is averaged; a `Table` and the analytic surface have exact means.
    """
    quality = mean_table(problem.quality) if isinstance(problem.quality, Table) else problem.quality
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


def wire_payload(tokens: int = 4096, channels: int = 16, rules: PayloadRules = "default") -> Payload:
    """Return the bits of a message of the wire format at a traced ratio; SDXL's latent, left out."""

    def payload(ratio: Float[Array, ""]) -> Shaped[Array, ""]:
        return jnp.asarray(payload_bits(ratio, tokens, channels, rules=rules))

    return payload

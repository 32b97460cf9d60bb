"""Steps and ratio by a policy, for requests that name limits alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megjax.errors import MegError
from megjax.link import channel
from megjax.rl.policy import Choice, Policy, act, keeps, limit_range

MOST_SNR_DB = 30.0
"""A policy has seen nothing beyond, nor below its negative: a better channel counts as this one."""


def covering(policies: Sequence[Policy], limits: tuple[float, float]) -> Policy:
    """The first policy that keeps these limits: latency (s) and energy (kJ).

    Raises:
        MegError: there is none; naming what is kept.
    """
    if not policies:
        raise MegError("limits: no policy is loaded here; give steps and ratio")
    kept = []
    for policy in policies:
        if keeps(policy, limits):
            return policy
        ends = [f"{pair[0]:g} s and {pair[1] * 1000:g} J ({pair[1]:g} kJ)" for pair in limit_range(policy)]
        kept.append(ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}")
    raise MegError(f"limits: the policies here keep {'; '.join(kept)}")


def choose(policies: Sequence[Policy], limits: tuple[float, float], rate_bps: float) -> Choice:
    """A frame's steps and ratio by the device's report of its rate; the first frame of an episode.

    Raises:
        MegError: see `covering`.
    """
    return act(covering(policies, limits), snr_db_of(rate_bps), limits=limits)


def snr_db_of(rate_bps: float) -> float:
    """The signal-to-noise ratio in dB that gives a rate over the paper's bandwidth, by Eq. (4)."""
    nepers = min(rate_bps / float(channel.DEFAULT_LINK.bandwidth_hz), 100.0) * math.log(2)
    return min(max(10 * math.log10(max(math.expm1(nepers), 1e-30)), -MOST_SNR_DB), MOST_SNR_DB)

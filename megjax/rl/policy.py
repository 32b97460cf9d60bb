"""Trained policies: act on a channel state, save to one file, load it again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float, PRNGKeyArray

from megjax.errors import MegError
from megjax.files import write_file
from megjax.rl import networks
from megjax.rl.algorithm import PolicyParams
from megjax.rl.env import EnvParams, denoising_steps
from megjax.rl.networks import Moments, Squash

FORMAT = "megjax-policy-1"


class PolicyInfo(NamedTuple):
    """What a policy's file says besides its numbers."""

    limits: tuple[tuple[float, float], ...]
    """Limits (s, kJ) that it was trained under; several if it is conditioned on them."""
    conditioned: bool
    """Whether it observes the limits, and obeys whatever it is given."""
    min_steps: int
    max_steps: int
    squash: Squash = "none"
    hidden_layers: int = 2


class Policy(NamedTuple):
    """A policy as it is used."""

    params: PolicyParams
    info: PolicyInfo


class Choice(NamedTuple):
    """What a policy chose for one frame."""

    steps: int
    ratio: float


def gaussian(
    params: PolicyParams, observation: Float[Array, "*b o"], squash: Squash = "none"
) -> networks.Gaussian:
    """Return pi(.|s) on raw observations."""
    seen = networks.normalise(params.moments, observation)
    return networks.policy(params.actor, seen, params.std_range, squash)


def keeps(policy: Policy, limits: tuple[float, float]) -> bool:
    """Whether a policy keeps a mean latency (s) and energy (kJ): its own, or a conditioned one any between.

    A thousandth more or less is the same: limits come back from conversions and files.
    """
    low, high = limit_range(policy)
    return bool(np.all(limits >= 0.999 * low) and np.all(limits <= 1.001 * high))


def limit_range(policy: Policy) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """The lowest and the highest limits that a policy was trained for; the same unless it is conditioned."""
    trained = np.asarray(policy.info.limits, float)
    return trained.min(axis=0), trained.max(axis=0)


def act(
    policy: Policy,
    snr_db: float,
    latency_s: float = 0.0,
    energy_kj: float = 0.0,
    limits: tuple[float, float] | None = None,
    key: PRNGKeyArray | None = None,
) -> Choice:
    """Return the steps and the ratio for the next frame.

    Args:
        policy: from `load_policy`.
        snr_db: the channel's gain-to-noise ratio now, in dB.
        latency_s, energy_kj: of the previous frame; 0 for the first.
        limits: mean latency (s) and energy (kJ) to keep. A conditioned policy takes any between its lowest
            and highest (left out, the middle ones of its list), any other only those it was trained for.
        key: draw from the policy; left out, its mean is taken.

    Raises:
        MegError: a number that is not finite, limits that are no pair, or that the policy does not keep.
    """
    numbers = (snr_db, latency_s, energy_kj, *(() if limits is None else limits))
    if not np.all(np.isfinite(numbers)):
        raise MegError(f"policy: SNR, latency, energy and limits must be finite, got {numbers}")
    if limits is not None and len(limits) != 2:
        raise MegError(f"limits {tuple(limits)}: give two, a mean latency (s) and a mean energy (kJ)")
    trained = policy.info.limits
    observation = [snr_db, latency_s, energy_kj]
    if policy.info.conditioned:
        limits = limits if limits is not None else trained[len(trained) // 2]
        lowest, highest = limit_range(policy)
        if not keeps(policy, limits):
            raise MegError(
                f"this policy keeps limits from {tuple(lowest.tolist())} to {tuple(highest.tolist())}, "
                f"not {tuple(limits)}"
            )
        # What all its limits share it has never seen differ: there a thousandth would be an outlier.
        observation += np.clip(limits, lowest, highest).tolist()
    elif limits is not None and not keeps(policy, limits):
        raise MegError(f"this policy was trained for the limits {trained[0]}, not {tuple(limits)}")
    found = gaussian(policy.params, jnp.asarray(observation, jnp.float32), policy.info.squash)
    action = jnp.clip(found.mean if key is None else networks.sample(key, found), 0.0, 1.0)
    params = EnvParams(min_steps=policy.info.min_steps, max_steps=policy.info.max_steps)
    return Choice(int(denoising_steps(action[0], params)), float(action[1]))


def save_policy(path: Path, policy: Policy) -> None:
    """Write a policy as one safetensors file, atomically."""
    tensors = {"moments.mean": policy.params.moments.mean, "moments.var": policy.params.moments.var}
    tensors["std_range"] = jnp.stack(policy.params.std_range)
    for i, (weight, bias) in enumerate(policy.params.actor):
        tensors |= {f"actor.{i}.weight": weight, f"actor.{i}.bias": bias}
    metadata = {"format": FORMAT, "info": json.dumps(policy.info._asdict())}
    data = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata)
    write_file(path, data)


def load_policy(path: Path) -> Policy:
    """Read a policy that `save_policy` wrote.

    Raises:
        MegError: the file is missing, damaged or something else, or its numbers cannot act.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: jnp.asarray(file.get_tensor(name)) for name in list(file.keys())}
        if metadata.get("format") != FORMAT:
            raise MegError(
                f"{path} is not a MegJAX policy: format {metadata.get('format')!r}, not {FORMAT!r}"
            )
        fields = json.loads(metadata["info"])
        fields["limits"] = tuple(tuple(pair) for pair in fields["limits"])
        info = PolicyInfo(**fields)
        layers = range(info.hidden_layers + 1)
        actor = tuple((tensors[f"actor.{i}.weight"], tensors[f"actor.{i}.bias"]) for i in layers)
        moments = Moments(jnp.ones(()), tensors["moments.mean"], tensors["moments.var"])
        low, high = tensors["std_range"]
        policy = Policy(PolicyParams(actor, moments, (low, high)), info)
        _check(policy)
    except MegError:
        raise
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise MegError(f"{path} is not a MegJAX policy: {error}") from error
    return policy


def _check(policy: Policy) -> None:
    """Raise a ValueError for what `act` could not use."""
    (actor, moments, std_range), info = policy
    size = 5 if info.conditioned else 3
    widths = [size, *(bias.size for _, bias in actor[:-1]), 4]
    layers = [shape for i, o in itertools.pairwise(widths) for shape in ((i, o), (o,))]
    numbers = jax.tree.leaves((actor, moments.mean, moments.var, std_range))
    shapes, expected = [x.shape for x in numbers], [*layers, (size,), (size,), (), ()]
    if shapes != expected:
        raise ValueError(f"tensors of shapes {shapes}, not {expected}")
    if not all(np.all(np.isfinite(x)) for x in numbers) or np.any(moments.var < 0) or min(std_range) <= 0:
        raise ValueError("weights, moments and standard deviations must be finite, the last above 0")
    limits = np.asarray(info.limits, float)
    if limits.shape != (max(len(limits), 1), 2) or not np.all(np.isfinite(limits) & (limits > 0)):
        raise ValueError(f"limits {info.limits}: must be pairs of finite numbers above 0, at least one")
    if not 1 <= info.min_steps <= info.max_steps or info.squash not in get_args(Squash):
        raise ValueError(f"steps {info.min_steps} to {info.max_steps}, squash {info.squash!r}")


def stacked(params: PolicyParams, index: int) -> PolicyParams:
    """Return one policy of a batch of runs."""
    return jax.tree.map(lambda x: x[index], params)

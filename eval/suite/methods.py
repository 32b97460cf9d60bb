"""The baselines: which token merging, message and decoder each of them is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

from jaxtyping import Array

from eval.merging import methods as rivals
from eval.suite.physical import SDXL_LATENT
from megjax.distill.decoder import gated, magnitude_pruned
from megjax.distill.pruning import kept_count
from megjax.errors import MegError
from megjax.link.counts import largest_ratio
from megjax.link.features import FeatureRules
from megjax.link.payload import PayloadRules, payload_bits, rounds_of
from megjax.merging import token_grid
from megjax.models import Params
from megjax.pipeline.load import Pipeline
from megjax.pipeline.split import Unit, noise_unit, send

Shape: TypeAlias = tuple[int, int, int]
Send: TypeAlias = Callable[[Array, Array, Array, Array], Array]
"""(key, latent of one picture, level, psnr_db) to the latent that the device decodes; the level is traced."""
Name: TypeAlias = Literal["split", "split_finetune", "pruning", "pruning_magnitude", "meg", "meg_plain"]

LABELS: dict[Name, str] = {
    "split": "MEG-Split",
    "split_finetune": "MEG-Split-Finetune",
    "pruning": "MEG-Pruning",
    "pruning_magnitude": "MEG-Pruning, magnitude",
    "meg": "MEG",
    "meg_plain": "MEG without ToMe",
}
TOME: dict[Name, bool] = {
    "split": False,
    "split_finetune": False,
    "pruning": True,
    "pruning_magnitude": True,
    "meg": True,
    "meg_plain": False,
}
"""Who merges tokens inside the U-Net, which all methods otherwise share."""
PRUNINGS: tuple[Name, ...] = ("pruning", "pruning_magnitude")


class Method(NamedTuple):
    """A baseline, or MEG."""

    send: Send
    decoder: Params


def method(pipeline: Pipeline, name: Name, rules: FeatureRules = "default") -> Method:
    """Return what a baseline does on the air and which decoder it has.

    A backbone that lacks a distilled decoder has the undistilled one in its place.

    Args:
        pipeline: whose parameters are taken.
        name: of the baseline; the two that send all are MEG's way at level 0.
        rules: of the messages.

    Raises:
        MegError: `pruning` without a learned gate: by magnitude it would send an index map that `bits` does
            not charge.
    """
    unit = noise_unit(rules, pipeline.vae_decoder.config)
    decoders = pipeline.params.get("decoders", {})
    frozen = pipeline.params["vae_decoder"]
    pruning = decoders.get("pruning", frozen)
    tuned: dict[Name, Params] = {
        "split": frozen,
        "split_finetune": decoders.get("split_finetune", frozen),
        "pruning": pruning,
        "pruning_magnitude": decoders.get("magnitude_pruning", pruning),
        "meg": decoders.get("meg", frozen),
        "meg_plain": decoders.get("meg", frozen),
    }
    if name not in PRUNINGS:
        return Method(_merged(rules, unit), tuned[name])
    gate = pipeline.params.get("gate")
    if name == "pruning" and gate is None:
        raise MegError(f"{pipeline.name}: has no learned gate to prune by; take pruning_magnitude")
    degrade = gated(0.0, unit) if name == "pruning" else magnitude_pruned(unit)

    def pruned(key: Array, z_HxWxC: Array, level: Array, psnr_db: Array) -> Array:
        return degrade({"gate": gate}, key, z_HxWxC, level, psnr_db)[0]

    return Method(pruned, tuned[name])


@functools.cache
def _merged(rules: FeatureRules, unit: Unit) -> Send:
    """Return merging's way over the air: one function, hence one executable, for all methods that merge."""

    def merged(key: Array, z_HxWxC: Array, ratio: Array, psnr_db: Array) -> Array:
        return send(key, z_HxWxC[None], ratio, psnr_db, rules=rules, unit=unit).z_BxHxWxC[0]

    return merged


def bits(name: Name, shape: Shape, level: float, rules: PayloadRules = "default") -> int:
    """Return the bits of one message, side information included.

    Args:
        name: of the baseline.
        shape: of the latent.
        level: merging or pruning ratio.
        rules: what merging's side information costs; pruning's gate has none, its magnitudes a map.
    """
    h, w, c = shape
    if name == "pruning":
        return 16 * int(kept_count(level, h * w * c))
    if name == "pruning_magnitude":
        return rivals.pruned().bits(shape, level)
    grid = token_grid(h, w)
    ratio = min(level, largest_ratio(grid, rounds_of(rules)))
    return int(payload_bits(ratio, grid[0] * grid[1], 4 * c, rules=rules, grid=grid))


def level_at(name: Name, shape: Shape, wanted_bits: int, rules: PayloadRules = "default") -> float | None:
    """Return the least level whose message is no longer than `wanted_bits`, to a part in 4096.

    Returns:
        The level, or None if even the shortest message is longer.
    """
    lowest, highest = 0, 4096
    if bits(name, shape, 1.0, rules) > wanted_bits:
        return None
    if bits(name, shape, 0.0, rules) <= wanted_bits:
        return 0.0  # A map begins with the first that is left out, and would make a little less longer.
    while lowest < highest:
        middle = (lowest + highest) // 2
        if bits(name, shape, middle / 4096, rules) <= wanted_bits:
            highest = middle
        else:
            lowest = middle + 1
    return highest / 4096


def level_of(name: Name, ratio: float) -> float:
    """Return a method's level at a ratio: magnitudes send as much, with their map, as the gate does."""
    if name != "pruning_magnitude":
        return ratio
    level = level_at(name, SDXL_LATENT, bits("pruning", SDXL_LATENT, ratio))
    assert level is not None  # one scalar and its place are shorter than any gate's message
    return level

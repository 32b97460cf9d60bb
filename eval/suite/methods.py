"""The baselines (spec section 9): which token merging, message and decoder each of them is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array

from eval.merging import methods as rivals
from megjax.distill.decoder import gated, magnitude_pruned
from megjax.distill.pruning import kept_count
from megjax.link.features import FeatureRules
from megjax.link.payload import PayloadRules, payload_bits
from megjax.merging import token_grid
from megjax.models import Params
from megjax.pipeline.load import Pipeline
from megjax.pipeline.split import send

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


class Method(NamedTuple):
    """A baseline, or MEG."""

    send: Send
    decoder: Params


def method(pipeline: Pipeline, name: Name, rules: FeatureRules = "default") -> Method:
    """Return what a baseline does on the air and which decoder it has.

    A backbone that lacks a distilled decoder has the undistilled one in its place; without the learned gate,
    MEG-Pruning prunes by magnitude.

    Args:
        pipeline: whose parameters are taken.
        name: of the baseline.
        rules: of the messages.
    """
    decoders = pipeline.params.get("decoders", {})
    frozen = pipeline.params["vae_decoder"]
    gate = pipeline.params.get("gate")
    degrade = magnitude_pruned if gate is None else gated(0.0)

    def merged(key: Array, z_HxWxC: Array, ratio: Array, psnr_db: Array) -> Array:
        return send(key, z_HxWxC[None], ratio, psnr_db, rules=rules).z_BxHxWxC[0]

    def whole(key: Array, z_HxWxC: Array, level: Array, psnr_db: Array) -> Array:
        return merged(key, z_HxWxC, jnp.zeros_like(level), psnr_db)

    def pruned(key: Array, z_HxWxC: Array, level: Array, psnr_db: Array) -> Array:
        return degrade({"gate": gate}, key, z_HxWxC, level, psnr_db)[0]

    def strongest(key: Array, z_HxWxC: Array, level: Array, psnr_db: Array) -> Array:
        return magnitude_pruned({}, key, z_HxWxC, level, psnr_db)[0]

    ways: dict[Name, Send] = {
        "split": whole,
        "split_finetune": whole,
        "pruning": pruned,
        "pruning_magnitude": strongest,
        "meg": merged,
        "meg_plain": merged,
    }
    pruning = decoders.get("pruning", frozen)
    tuned: dict[Name, Params] = {
        "split": frozen,
        "split_finetune": decoders.get("split_finetune", frozen),
        "pruning": pruning,
        "pruning_magnitude": decoders.get("magnitude_pruning", pruning),
        "meg": decoders.get("meg", frozen),
        "meg_plain": decoders.get("meg", frozen),
    }
    return Method(ways[name], tuned[name])


def bits(name: Name, shape: Shape, level: float, rules: PayloadRules = "default") -> int:
    """Return the bits of one message, side information included.

    Args:
        name: of the baseline.
        shape: of the latent.
        level: merging or pruning ratio; not read by the two that send all.
        rules: what merging's side information costs; pruning's gate has none, its magnitudes a map.
    """
    h, w, c = shape
    if name == "pruning":
        return 16 * int(kept_count(level, h * w * c))
    if name == "pruning_magnitude":
        return rivals.pruned().bits(shape, level)
    grid = token_grid(h, w)
    # The payload's own limits: two rounds reach 15/16, one round clips by itself.
    ratio = min(level, 15 / 16 if rules == "default" else 1.0) if name in ("meg", "meg_plain") else 0.0
    return int(payload_bits(ratio, grid[0] * grid[1], 4 * c, rules=rules, grid=grid))


def level_at(name: Name, shape: Shape, wanted_bits: int, rules: PayloadRules = "default") -> float:
    """Return the least level whose message is no longer than `wanted_bits`, to a part in 4096."""
    lowest, highest = 0, 4096
    while lowest < highest:
        middle = (lowest + highest) // 2
        if bits(name, shape, middle / 4096, rules) <= wanted_bits:
            highest = middle
        else:
            lowest = middle + 1
    return highest / 4096

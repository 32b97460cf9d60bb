"""Table I: the parameters in force, the paper's, and where these are from."""

from __future__ import annotations

import math
from typing import Any

from eval.suite import methods, physical
from eval.suite.config import MAX_STEPS, MIN_STEPS
from eval.suite.context import Context, get
from eval.suite.numbers import Record, Tag, number
from eval.suite.paper import SDXL_FLOPS
from eval.suite.policies import counts, learner_config
from megjax.link.channel import DEFAULT_LINK
from megjax.link.profiles import StepProfile, load
from megjax.rl.env import REFERENCE

STATED, READ, DERIVED, INFERRED = "stated in the paper", "the authors' code", "derived", "inferred"


def table1(context: Context) -> Record:
    """Return Table I."""
    config, link = context.config, DEFAULT_LINK
    scale = physical.scale(config.physical, get(context, counts(config)), config.guidance)
    cvpo = learner_config(config, "cvpo")
    rows = [
        _row("distance, from", link.min_distance_m, 200, READ, "m"),
        _row("distance, to", link.max_distance_m, 300, READ, "m"),
        _row("path loss at 1 m", link.path_loss_intercept_db, 35.3, READ, "dB"),
        _row("path loss a decade", link.path_loss_slope_db, 37.6, READ, "dB"),
        _row("noise power", link.noise_power_dbm, -94, READ, "dBm"),
        _row("transmit power", link.tx_power_dbm, 30, READ, "dBm"),
        _row("bandwidth", link.bandwidth_hz / 1e6, 1, READ, "MHz"),
        _row("bits per scalar", methods.bits("split", scale.latent, 0.0) / math.prod(scale.latent), 16, READ),
        _row("tokens of a latent", scale.grid[0] * scale.grid[1], 4096, READ),
        _row("values of a token", 4 * scale.latent[2], 16, READ),
        _row("fewest steps", MIN_STEPS, 4, READ),
        _row("most steps", MAX_STEPS, 12, READ),
        _row("guidance", config.guidance, 2.5, STATED),
        _row("tokens merged in the U-Net", config.tome, 0.5, STATED),
        _row("PSNR of the features", config.feature_psnr_db, 10 if config.rules == "default" else 20,
             STATED if config.rules == "default" else READ, "dB"),
        *_flops(scale),
        *_profile(config.profile),
        _row("frames of an episode", REFERENCE.max_steps_in_episode, 64, READ),
        _row("particles K", cvpo.particles, 32, READ),
        _row("trust region of the E-step", cvpo.kl_bound, 0.02, READ),
        _row("actor's learning rate", cvpo.actor_lr, 5e-4, READ),
        _row("critics' learning rate", cvpo.critic_lr, 1e-3, READ),
        _row("discount", cvpo.discount, 0.97, READ),
        _row("batch of states", cvpo.policy_batch, 256, READ),
    ]  # fmt: skip
    return {
        "text": [],
        "tables": [
            {
                "id": "table1",
                "title": "Parameters",
                "caption": "What this run used, beside the paper's value and where that is from. Where both "
                "differ, MegJAX departs on purpose: the documentation says why.",
                "columns": [
                    {"key": "used", "label": "in force", "unit": "", "digits": 4},
                    {"key": "paper", "label": "paper", "unit": "", "digits": 4},
                    {"key": "unit", "label": "unit", "unit": "", "digits": 0},
                    {"key": "source", "label": "paper's value is", "unit": "", "digits": 0},
                ],
                "rows": rows,
            }
        ],
        "figures": [],
    }


def _row(
    label: str, used: Any, paper: float | None, source: str, unit: str = "", tag: Tag = "setting"
) -> Record:
    cells: Record = {"used": number(float(used), tag, unit), "unit": unit, "source": source}
    if paper is not None:
        cells["paper"] = number(paper, "paper", unit)
    return {"label": label, "cells": cells}


def _flops(scale: physical.Scale) -> list[Record]:
    used = {
        "text encoders": (scale.plain.text_encoder_flops, "text_encoder_flops"),
        "VAE encoder (image-to-image only)": (scale.plain.vae_encoder_flops, "vae_encoder_flops"),
        "U-Net call": (scale.plain.unet_call_flops, "unet_call_flops"),
        "U-Net call with token merging": (scale.tome.unet_call_flops, "unet_call_tome_flops"),
        "VAE decoder": (scale.plain.vae_decoder_flops, "vae_decoder_flops"),
    }
    return [
        _row(
            f"FLOPs, {label}",
            physical.real(flops) / 1e12,
            SDXL_FLOPS[key] / 1e12,
            DERIVED,
            "TFLOP",
            "measured",
        )
        for label, (flops, key) in used.items()
    ]


def _profile(name: str) -> list[Record]:
    profile = load(name)
    if isinstance(profile, StepProfile):
        return [_row("seconds a step with token merging", profile.tome_step_s, None, profile.source, "s")]
    server, device = profile.server, profile.device
    return [
        _row("server", server.flops_per_s / 1e12, 58, INFERRED, "TFLOP/s"),
        _row("device", device.flops_per_s / 1e12, 29, INFERRED, "TFLOP/s"),
        _row("server's energy", server.j_per_flop * 1e12, 5.2, INFERRED, "J/TFLOP"),
        _row("device's energy", device.j_per_flop * 1e12, 6.5, INFERRED, "J/TFLOP"),
    ]

"""The paper's own numbers (arXiv 2407.07245), and what of them is stated, read in its code or inferred."""

from __future__ import annotations

from typing import NamedTuple

from eval.suite.methods import Name


class Row(NamedTuple):
    """One column of the paper's Table II, with the settings behind it."""

    label: str
    method: Name | None
    """None is centralised generation."""
    steps: int
    """Inferred from the other figures where the text lost it."""
    ratio: float
    tome: bool
    mse: float
    transmission_s: float
    computation_s: float


TABLE_II = (
    Row("Centralized", None, 12, 0.0, False, 0.0, 60.4680, 7.5806),
    Row("MEG-Split", "split", 8, 0.0, False, 0.2842, 1.2598, 5.2122),
    Row("MEG-Split-Finetune", "split_finetune", 8, 0.0, False, 0.0106, 1.2598, 5.2122),
    Row("MEG-Pruning", "pruning", 7, 0.1, True, 0.0153, 1.1337, 3.2316),
    Row("MEG, 7 steps", "meg", 7, 0.4, True, 0.0095, 0.7547, 3.2316),
    Row("MEG, 4 steps", "meg", 4, 0.4, True, 0.0246, 0.7547, 2.0287),
)

FIG5_RATIOS: dict[Name, tuple[float, ...]] = {
    "split": (0.0,),
    "split_finetune": (0.0,),
    "pruning": (0.1, 0.2),
    "meg": (0.1, 0.5, 0.8),
    "meg_plain": (0.5,),
}
"""The last is not the paper's: what token merging inside the U-Net costs."""

SDXL_FLOPS = {
    "text_encoder_flops": 0.11e12,
    "vae_encoder_flops": 4.9e12,
    "unet_call_flops": 6.76e12,
    "unet_call_tome_flops": 5.73e12,
    "vae_decoder_flops": 10.5e12,
}
"""Derived for 1024 x 1024: the check of the counts."""

"""Diffusion: the noise schedule, the solvers and their guidance."""

from megjax.diffusion.ddim import (
    Denoise,
    Schedule,
    Spacing,
    ddim,
    ddim_timesteps,
    noised,
    read_schedule,
    schedule,
)
from megjax.diffusion.guidance import Conditioning, conditioned, encode_text, guided
from megjax.diffusion.perflow import Flow, Parametrisation, perflow, perflow_timesteps, read_flow

__all__ = [
    "Conditioning",
    "Denoise",
    "Flow",
    "Parametrisation",
    "Schedule",
    "Spacing",
    "conditioned",
    "ddim",
    "ddim_timesteps",
    "encode_text",
    "guided",
    "noised",
    "perflow",
    "perflow_timesteps",
    "read_flow",
    "read_schedule",
    "schedule",
]

"""Diffusion: the noise schedule, the solvers and their guidance."""

from megjax.diffusion.ddim import Denoise, Schedule, ddim, ddim_timesteps, noised, schedule
from megjax.diffusion.guidance import Conditioning, conditioned, guided

__all__ = [
    "Conditioning",
    "Denoise",
    "Schedule",
    "conditioned",
    "ddim",
    "ddim_timesteps",
    "guided",
    "noised",
    "schedule",
]

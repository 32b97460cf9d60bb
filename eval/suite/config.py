"""What the suite runs, and what its items are called."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from megjax.checks import LARGEST_SEED, within
from megjax.errors import MegError
from megjax.link.counts import largest_ratio
from megjax.link.features import PSNR_DB, FeatureRules
from megjax.link.payload import rounds_of
from megjax.link.profiles import load
from megjax.rl.problem import SDXL_GRID

Physical: TypeAlias = Literal["sdxl", "tiny"]
"""Whose bits and FLOPs are charged: full SDXL's at 1024 x 1024, or those of the model that draws."""
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]

ITEMS = {
    "claims": "What the paper claims, and what holds",
    "table1": "Table I: the parameters in force",
    "table2": "Table II: every method at its setting",
    "fig3": "Fig. 3: latency against FLOPs",
    "fig4": "Fig. 4: one prompt, every method",
    "fig5": "Fig. 5: MSE against steps",
    "fig6": "Fig. 6: learning under latency limits",
    "fig7": "Fig. 7: learning under energy budgets",
    "pareto": "The front of quality against latency and energy",
    "noise": "MSE against the channel's noise",
    "payload": "MSE against the message's length",
}
"""What `--only` takes, in the report's order."""

MIN_STEPS, MAX_STEPS = 4, 12
SAMPLE = "a large red circle left of a small blue square on a white background"


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """What `python -m eval.suite` measures."""

    only: str = ""
    """Items to make, separated by commas: table1, table2, fig3 ... fig7, pareto, noise, payload, claims. All
    if empty."""
    out: Path = Path("runs/suite")
    """Receives report.html, results.json, figures, tables and the cache."""
    rules: FeatureRules = "default"
    """MegJAX's rules, or `paper`, the authors': noise, layout, side information, thresholds."""
    physical: Physical = "sdxl"
    """Whose bits and FLOPs are charged; `tiny` charges the model's own."""
    profile: str = "paper"
    """Hardware of the modelled columns and of the learning problem: a name or a .json of `eval.profile`."""
    seeds: int = 3
    """Of each policy."""
    model: str = "tiny"
    """An embedded backbone, a folder in diffusers layout or a hub id."""
    dtype: Dtype = "float32"
    """Of the networks' activations and parameters."""
    prompts: Path | None = None
    """A text file, one prompt a line; left out, fresh captions of `scenes`."""
    pictures: int = 64
    """Prompts, each with its own noise, partition and channel, the same ones for every method."""
    batch: int = 32
    """Pictures computed at once."""
    guidance: float = 2.5
    psnr_db: float | None = None
    """Of the features on the air; left out, 10, or under the rules `paper` 20, their deviation of 0.1."""
    tome: float = 0.5
    """Share of the tokens merged inside the U-Net by the methods that use it."""
    ratios: tuple[float, ...] = (0.0, 0.1, 0.3, 0.4, 0.5, 0.65, 0.8, 0.9375)
    """Merging ratios at which MEG is measured."""
    noise_psnrs_db: tuple[float, ...] = (0.0, 5.0, 10.0, 15.0, 20.0, 30.0)
    """The noise levels of the robustness curve."""
    sample: str | None = None
    """The prompt of Fig. 4, which is the first; left out, the file's first, or one of `scenes`."""
    cvpo_epochs: int | None = None
    """Of MEG-CVPO's training; left out, the presets' own."""
    ppo_epochs: int | None = None
    """Likewise of PPO-Lagrangian's."""
    seed: int = 0
    """Of prompts, noise, channels and, with those after it, of the policies."""

    @property
    def feature_psnr_db(self) -> float:
        """The noise level in force."""
        return PSNR_DB[self.rules] if self.psnr_db is None else self.psnr_db

    @property
    def charged(self) -> str:
        """What bits, latency and energy are of, for captions."""
        return "full SDXL at 1024 x 1024" if self.physical == "sdxl" else f"{self.model} itself"


def items(config: SuiteConfig) -> tuple[str, ...]:
    """Return the items asked for, in the report's order.

    Raises:
        MegError: an unknown one.
    """
    wanted = [name.strip() for name in config.only.split(",") if name.strip()]
    for name in wanted:
        if name not in ITEMS:
            raise MegError(f"unknown figure or table {name!r}: choose from {', '.join(ITEMS)}")
    return tuple(name for name in ITEMS if not wanted or name in wanted)


def check(config: SuiteConfig) -> None:
    """Refuse what cannot be measured.

    Raises:
        MegError: naming the value and what is allowed.
    """
    items(config)
    if config.pictures < 2 or config.batch < 1 or config.pictures % config.batch:
        raise MegError(
            f"pictures {config.pictures}, batch {config.batch}: at least 2 pictures, a multiple of the batch"
        )
    within(config, 1, LARGEST_SEED + 1, "seeds", "cvpo_epochs", "ppo_epochs")
    within(config, 0, LARGEST_SEED + 1 - config.seeds, "seed")
    ratios = config.ratios
    increasing = all(a < b for a, b in itertools.pairwise(ratios))  # which NaN is not
    least, most = (largest_ratio(SDXL_GRID, rounds) for rounds in (rounds_of(config.rules), 2))
    if len(ratios) < 2 or not increasing or ratios[0] != 0 or not least <= ratios[-1] <= most:
        # Policies choose from all of them, and outside of what was measured there is no quality.
        raise MegError(f"ratios {ratios}: at least two, increasing from 0 to {least:g} are allowed")
    levels = (config.feature_psnr_db, *config.noise_psnrs_db)
    if not all(map(math.isfinite, levels)) or not config.noise_psnrs_db:
        raise MegError(f"psnr_db {levels}: finite numbers of dB are allowed, at least one of noise")
    if config.dtype not in get_args(Dtype):
        raise MegError(f"dtype {config.dtype!r}: choose from {', '.join(get_args(Dtype))}")
    if not math.isfinite(config.guidance) or config.guidance < 0:
        raise MegError(f"guidance {config.guidance}: finite numbers from 0 on are allowed")
    if not 0 <= config.tome <= 0.75:
        raise MegError(f"tome {config.tome}: from 0 to 0.75 are allowed")
    load(config.profile)

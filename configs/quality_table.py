"""Presets of `python -m eval.quality_table`."""

from pathlib import Path

from eval.quality_table.table import QualityTableConfig

TINY = QualityTableConfig()
"""MEG-Tiny, 48 pictures: `python -m eval.quality_table tiny`, one CPU core, minutes.

`--output megjax/assets/tiny/quality.npz` makes the table that ships, about 80 kB.
"""

SMOKE = QualityTableConfig(
    pictures=4,
    steps=(4, 8, 12),
    ratios=(0.0, 0.5, 0.9375),
    psnrs_db=(10.0,),
    draws=1,
    output=Path("smoke.npz"),
)
"""Whether it runs: `python -m eval.quality_table smoke`, one CPU core, a minute."""

PRESETS = {"tiny": ("MEG-Tiny on fresh scenes.", TINY), "smoke": ("A few entries of it.", SMOKE)}
"""By the name on the command line."""

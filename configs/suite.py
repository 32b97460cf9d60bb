"""Presets of `python -m eval.suite`.

    python -m eval.suite                     # MEG-Tiny, two CPU cores, eight to ten minutes
    python -m eval.suite --only table2       # under 90 seconds
    python -m eval.suite --seeds 10          # the long form
    python -m eval.suite --rules paper       # the authors' rules
    python -m eval.suite sdxl --out runs/sdxl

writes report.html, results.json, figures and tables. A second run takes what it can from its cache.
"""

from pathlib import Path

from eval.suite.config import SuiteConfig

TINY = SuiteConfig()
"""MEG-Tiny's pictures, full SDXL's costs. Expect the methods that merge tokens inside the U-Net (MEG, the
prunings) to err most, about ten times MEG-Split-Finetune; without that (`--tome 0`) MEG at T = 7, r = 0.4
errs 1.2 times as much, and MEG-Split most. Expect MEG-CVPO within every limit."""

SDXL = SuiteConfig(
    model="stabilityai/stable-diffusion-xl-base-1.0",
    dtype="bfloat16",
    pictures=16,
    batch=2,
    out=Path("runs/suite-sdxl"),
)
"""SDXL at 1024 x 1024 on one accelerator of 40 GiB or more; captions of `scenes` unless `--prompts` gives
others. Without a distilled student and decoders (`--model FOLDER`) it samples by DDIM, undistilled."""

PRESETS = {
    "tiny": ("MEG-Tiny, which ships with the package, on two CPU cores.", TINY),
    "sdxl": ("SDXL at 1024 x 1024 on an accelerator.", SDXL),
}
"""By the name on the command line."""

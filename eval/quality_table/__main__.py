"""`python -m eval.quality_table tiny`: a backbone's quality as a table, for training policies on it."""

from __future__ import annotations

import sys

import tyro

from configs.quality_table import PRESETS
from eval.quality_table.table import QualityTableConfig, measure, summary
from megjax.errors import MegError
from megjax.pipeline import load_pipeline
from megjax.rl.quality import save_table


def main(config: QualityTableConfig) -> None:
    """Measure, save, print."""
    try:
        table = measure(load_pipeline(config.model), config)
        save_table(config.output, table)
    except MegError as error:
        sys.exit(f"error: {error}")
    print(summary(table))
    print(f"written to {config.output}: {config.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS))

"""`python -m eval.quality_table tiny`: a backbone's quality as a table, for training policies on it."""

from __future__ import annotations

import tyro

from configs.quality_table import PRESETS
from eval.quality_table.table import QualityTableConfig, measure, summary
from megjax.errors import one_line_errors
from megjax.files import writable
from megjax.models import Options
from megjax.pipeline import load_pipeline
from megjax.rl.quality import save_table


@one_line_errors()
def main(config: QualityTableConfig) -> None:
    """Measure, save, print."""
    writable(config.output)
    table = measure(load_pipeline(config.model, Options(config.dtype, config.dtype)), config)
    save_table(config.output, table)
    print(summary(table))
    print(f"written to {config.output}: {config.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, prog="python -m eval.quality_table"))

"""`python -m eval.merging tiny`: what should be merged, and how?"""

from __future__ import annotations

import tyro

from configs.merging import PRESETS
from eval.merging.study import MergingStudyConfig, run, table
from megjax.allocator import keep_freed_memory
from megjax.errors import one_line_errors


@one_line_errors()
def main(config: MergingStudyConfig) -> None:
    """Run the study and print its tables."""
    keep_freed_memory()
    print(table(run(config)))


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, prog="python -m eval.merging"))

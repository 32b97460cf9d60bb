"""`python -m train.distill_diffuser tiny`: distil a backbone's U-Net into a few-step student."""

from __future__ import annotations

import tyro

from configs.distill_diffuser import PRESETS
from megjax.allocator import keep_freed_memory
from megjax.compilation import keep_compilations
from megjax.distill.diffuser import DiffuserConfig, train_diffuser
from megjax.errors import one_line_errors
from megjax.training.processes import join_processes


def main(config: DiffuserConfig) -> None:
    """Train; resumes from the newest checkpoint in `config.folder`."""
    keep_freed_memory()
    keep_compilations()
    with one_line_errors():
        if config.distributed:
            join_processes()
        print(train_diffuser(config))


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            PRESETS, prog="python -m train.distill_diffuser", config=(tyro.conf.AvoidSubcommands,)
        )
    )

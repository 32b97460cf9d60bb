"""`python -m train.distill_decoder tiny`: distil the device's decoder."""

from __future__ import annotations

import tyro

from configs.distill_decoder import PRESETS
from megjax.allocator import keep_freed_memory
from megjax.compilation import keep_compilations
from megjax.distill.decoder_run import DecoderConfig, train_decoder
from megjax.errors import one_line_errors
from megjax.training.processes import join_processes


def main(config: DecoderConfig) -> None:
    """Train; resumes from the newest checkpoint in `config.folder`."""
    keep_freed_memory()
    keep_compilations()
    with one_line_errors():
        if config.distributed:
            join_processes()
        print(train_decoder(config))


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            PRESETS, prog="python -m train.distill_decoder", config=(tyro.conf.AvoidSubcommands,)
        )
    )

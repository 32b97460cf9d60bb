"""`python -m train.distill_decoder tiny`: distil the device's decoder."""

from __future__ import annotations

import sys

import tyro

from configs.distill_decoder import PRESETS
from megjax.allocator import keep_freed_memory
from megjax.compilation import keep_compilations
from megjax.distill.decoder_run import DecoderConfig, train_decoder
from megjax.errors import MegError


def main(config: DecoderConfig) -> None:
    """Train; resumes from the newest checkpoint in `config.folder`."""
    keep_freed_memory()
    keep_compilations()
    try:
        print(train_decoder(config))
    except MegError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, config=(tyro.conf.AvoidSubcommands,)))

"""`python -m train.pretrain tiny`: train a small backbone from nothing on `scenes`."""

from __future__ import annotations

import tyro

from configs.pretrain import PRESETS
from megjax.allocator import keep_freed_memory
from megjax.compilation import keep_compilations
from megjax.errors import one_line_errors
from megjax.training.pretrain import PretrainConfig, pretrain


def main(config: PretrainConfig) -> None:
    """Train, then print the model's folder."""
    keep_freed_memory()
    keep_compilations()
    with one_line_errors():
        print(pretrain(config))


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS, prog="python -m train.pretrain"))

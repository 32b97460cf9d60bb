"""Presets of `python -m train.distill_decoder`: decoders that undo merging, pruning and noise.

The `tiny` ones learn from the same cached latents, with the same updates, and a sample counts by the
logarithm of its error. With that, the authors' weight of the gate's penalty, 8e-6, doubled a trained gate's
error in 350 updates, so `tiny-pruning` takes a hundredth of it:

    python -m train.distill_decoder tiny                 # MEG: any ratio, any noise
    python -m train.distill_decoder tiny-split-finetune  # noise alone
    python -m train.distill_decoder tiny-pruning         # the variational gate of MEG-Pruning
    python -m train.distill_decoder tiny-magnitude       # the largest scalars alone

On one CPU core, reckoned from shorter runs, the latents take over an hour, once for all, and then each
decoder an hour and a half. `paper` trains under the authors' rules: strips, one round, noise of 0.05 to 0.32
on un-normalised latents, drawn evenly in dB. `sdxl` takes SDXL's decoder on one GPU, `sdxl-thin` a decoder
of a tenth of the FLOPs. `--model` is a backbone with a student, such as `runs/diffuser/tiny/model`. `debug`
trains two steps, `debug-resume` two more.
"""

import dataclasses
from pathlib import Path

from megjax.data.loader import DataConfig
from megjax.distill.decoder_run import DecoderConfig

TINY = DecoderConfig(folder=Path("runs/decoder/tiny"), objective="quality")

PAPER = DecoderConfig(folder=Path("runs/decoder/paper"), rules="paper", psnr_db=(10.0, 26.0))

SDXL = DecoderConfig(
    model="runs/diffuser/sdxl/model",
    data=DataConfig(pictures=8000),
    folder=Path("runs/decoder/sdxl"),
    batch=8,
    accumulate=8,
    dtype="bfloat16",
    remat=True,
    sample_batch=4,
    held_out=16,
    tensorboard=True,
)

DEBUG = DecoderConfig(
    data=DataConfig(pictures=32),
    folder=Path("runs/decoder/debug"),
    steps=2,
    batch=4,
    warmup=1,
    sample_batch=16,
    held_out=8,
    test_ratios=(0.0, 0.4),
    every=1,
    checkpoint_every=1,
    evaluate_every=2,
)


PRESETS = {
    "tiny": ("MEG: merging and noise.", TINY),
    "tiny-split-finetune": (
        "MEG-Split-Finetune: noise alone.",
        dataclasses.replace(TINY, method="split_finetune"),
    ),
    "tiny-pruning": (
        "MEG-Pruning: the variational gate.",
        dataclasses.replace(TINY, method="pruning", kl_weight=8e-8),
    ),
    "tiny-magnitude": ("Pruning by magnitude.", dataclasses.replace(TINY, method="magnitude_pruning")),
    "paper": ("MEG under the authors' rules.", PAPER),
    "sdxl": ("SDXL's decoder, one GPU.", SDXL),
    "sdxl-thin": (
        "A tenth of SDXL's decoder.",
        dataclasses.replace(SDXL, width=0.3, folder=Path("runs/decoder/sdxl-thin")),
    ),
    "debug": ("Two steps on MEG-Tiny.", DEBUG),
    "debug-resume": ("Two steps more.", dataclasses.replace(DEBUG, steps=4)),
}

"""Presets of `python -m train.distill_diffuser`: a few-step student by piecewise rectified flow.

`tiny` makes a student of MEG-Tiny, on one CPU core in a hundred minutes; the teacher solves its windows
beforehand, in half the paper's steps but to second order, and the noisiest, where one call decides the
picture, is learned most:

    python -m train.distill_diffuser tiny
    python -m eval.distillation --model runs/diffuser/tiny/model --captions 500 --pictures 0

Expected: 61.6, 63.8, 65.6, 66.4 % of captions drawn right in 4, 6, 8, 12 steps (the teacher's 50: 65.0 %),
and 4 steps 1.4 times as near to the teacher's pictures as its own DDIM. What ships learned longer.

`sdxl` distils SDXL as the paper does; `sdxl-lora` fits one GPU of 80 GB. Both read LAION-COCO-aesthetic from
the hub, at least 1024 pixels a side, and keep latents and embeddings in `runs/cache`, 0.45 MB a picture.
Behind many of its addresses there is nothing any more, hence the high share of broken pictures allowed:

    python -m train.distill_diffuser sdxl --folder /shared/sdxl --cache /shared/cache

`debug` trains two steps and `debug-resume` goes on from there for two more: the whole way in a minute or two.
Every preset resumes when it is run again. docs/training.md tells how to run on many machines.
"""

import dataclasses
from pathlib import Path

from megjax.data.loader import DataConfig
from megjax.distill.diffuser import DiffuserConfig

LAION = DataConfig(
    source="hf:guangyil/laion-coco-aesthetic",
    pictures=500_000,
    picture="url",
    caption="caption",
    min_side=1024,
    max_broken=0.5,
)

TINY = DiffuserConfig(
    data=DataConfig(pictures=8192),
    folder=Path("runs/diffuser/tiny"),
    steps=6000,
    learning_rate=4e-4,
    decay=True,
    measure="velocity",
    solve_once=True,
    solver_steps=5,
    solver_order=2,
    window_draws=(4, 1, 1, 1),
    start_share=0.5,
    pure_noise=True,
    guidance=3.0,
)

SDXL = DiffuserConfig(
    model="stabilityai/stable-diffusion-xl-base-1.0",
    data=LAION,
    folder=Path("runs/diffuser/sdxl"),
    steps=20_000,
    batch=128,
    dtype="bfloat16",
    remat=True,
    replicas=1,
    fsdp=-1,
    encode_batch=8,
    held_out=32,
    every=20,
    tensorboard=True,
)

SDXL_LORA = dataclasses.replace(
    SDXL,
    folder=Path("runs/diffuser/sdxl-lora"),
    data=dataclasses.replace(LAION, pictures=50_000),
    batch=16,
    accumulate=8,
    lora_rank=64,
    held_out=8,
)

DEBUG = DiffuserConfig(
    data=DataConfig(pictures=64),
    folder=Path("runs/diffuser/debug"),
    steps=2,
    batch=4,
    held_out=8,
    solver_steps=2,
    encode_batch=16,
    grid_prompts=2,
    every=1,
    checkpoint_every=1,
    evaluate_every=2,
)

PRESETS = {
    "tiny": ("MEG-Tiny's student, one CPU core.", TINY),
    "sdxl": ("SDXL over all devices, states cut over them.", SDXL),
    "sdxl-lora": ("SDXL on one GPU, factors of rank 64.", SDXL_LORA),
    "debug": ("Two steps on MEG-Tiny.", DEBUG),
    "debug-resume": ("Two steps more.", dataclasses.replace(DEBUG, steps=4)),
}

"""`megjax serve`: the edge server over HTTP."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megjax.errors import MegError
from megjax.link import profiles
from megjax.models import Options
from megjax.pipeline import load_pipeline
from megjax.rl.policy import load_policy


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve pictures to devices: prompts in, merged latents in the wire format out.

    It takes its address, loads, compiles every batch size, and then is ready (`/readyz`). SIGTERM finishes
    what was accepted. Off loopback a token is required.
    """

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """0 takes a free one."""
    token: str | None = None
    """That every request must carry; better given as MEGJAX_TOKEN, which other users cannot list."""
    model: str = "tiny"
    """`tiny`, a folder in diffusers layout, or a hub id of an SDXL model."""
    policy: tuple[Path, ...] = ()
    """Files of policies from `python -m train.policy`, for requests that name limits alone."""
    profile: str = "paper"
    """Hardware profile that latency and energy are charged by."""
    tome_ratio: float = 0.0
    """Of the tokens merged inside the U-Net's self-attention."""
    sizes: tuple[str, ...] = ()
    """Heights and widths of pictures, such as `64x64`; the model's own if not given."""
    batch_sizes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (1, 2, 4, 8)
    """Compiled at start."""
    max_steps: int = 12
    """Most denoising steps of a request."""
    queue: int = 64
    """Requests that may wait; one more is answered 429."""
    deadline_s: float = 60.0
    """Longest time from a request to its answer."""
    drain_s: float = 60.0
    """After SIGTERM, how long what was accepted may take."""
    log_prompts: bool = False
    """Write prompts to the log."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and activations."""


def serve_command(args: tyro.conf.OmitArgPrefixes[Serve]) -> None:
    """Serve pictures to devices: prompts in, merged latents in the wire format out."""
    try:
        from megjax.serve.config import ServeConfig
        from megjax.serve.server import listen, run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "megjax":
            raise
        raise MegError(f"megjax serve needs {error.name}: pip install 'megjax[serve]'") from None
    config = ServeConfig(
        host=args.host,
        port=args.port,
        token=args.token or os.environ.get("MEGJAX_TOKEN") or None,
        policies=args.policy,
        profile=args.profile,
        tome_ratio=args.tome_ratio,
        sizes=tuple(_size(text) for text in args.sizes),
        batch_sizes=args.batch_sizes,
        max_steps=args.max_steps,
        queue=args.queue,
        deadline_s=args.deadline_s,
        drain_s=args.drain_s,
        log_prompts=args.log_prompts,
    )
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("megjax.serve").setLevel(logging.INFO)
    # What needs no model, before one is loaded.
    profiles.load(config.profile)
    for path in config.policies:
        load_policy(path)
    listener = listen(config)
    pipeline = load_pipeline(args.model, Options(dtype=args.dtype, param_dtype=args.dtype))
    if not run(pipeline, config, listener):
        sys.exit(1)


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isascii() and height.isdigit() and width.isascii() and width.isdigit()):
        raise MegError(f"size {text!r}: give height and width, such as 64x64")
    return int(height), int(width)

"""SDXL's U-Net on one CPU core in float32, against PyTorch diffusers.

    python -m eval.bench.unet [--latent 32] [--batch 1] [--rounds 3] [--json OUT.json]

Both sides have random weights of the full size: 10.3 GB each, so they run one at a time, in alternating
processes pinned to one core. Prints the seconds of a call, one line a process, and the median of the paired
ratios, MegJAX over torch: by the clock, and in processor seconds, which other load disturbs less. Needs
the extra `parity`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eval.bench import alternate, median_timing, ratios, save, start

TEXT_LENGTH = 77


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Args:
        latent: latents' height and width.
        batch: pictures a call.
        calls: timed calls a process; their median counts.
        rounds: pairs of processes.
        core: the CPU core.
        json: where to write the figures, if anywhere.
        side: run one side in this process and print its figures as JSON.
    """

    latent: int = 32
    batch: int = 1
    calls: int = 3
    rounds: int = 3
    core: int = 0
    json: Path | None = None
    side: Literal["megjax", "torch"] | None = None


def main(config: Config) -> None:
    """Time both sides, or the one that is asked for."""
    if config.side is not None:
        call = {"megjax": megjax_call, "torch": torch_call}[config.side](config)
        print(json.dumps(median_timing(call, config.calls)._asdict()))
        return
    args = [f"--{name}={getattr(config, name)}" for name in ("latent", "batch", "calls")]
    results = alternate("eval.bench.unet", ("megjax", "torch"), config.rounds, core=config.core, args=args)
    medians = {name: statistics.median(ratios(results, name)) for name in ("wall_s", "cpu_s")}
    print(
        f"MegJAX / torch: {medians['wall_s']:.3f} by the clock, {medians['cpu_s']:.3f} in processor seconds"
    )
    save(config.json, {"latent": config.latent, "batch": config.batch, "ratios": medians, "runs": results})


def megjax_call(config: Config) -> Callable[[], Any]:
    """A call of our U-Net, compiled, with its weights and inputs."""
    import jax
    import jax.numpy as jnp

    from megjax.models import UNetConfig, time_ids, unet

    net = unet(UNetConfig())
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(random_weight(str(path[-1].key), leaf.shape)), net.shapes
    )
    z, text, pooled = map(jnp.asarray, inputs(config, channels_last=True))
    t, sizes = jnp.full((config.batch,), 999.0), time_ids(1024, 1024, config.batch)
    forward = jax.jit(lambda *args: net(*args))
    return lambda: forward(params, z, t, text, pooled, sizes).block_until_ready()


def torch_call(config: Config) -> Callable[[], Any]:
    """A call of diffusers' U-Net with its weights and inputs."""
    import torch
    from diffusers import UNet2DConditionModel

    from megjax.models import UNetConfig, to_dict

    torch.set_num_threads(1)
    with torch.device("meta"):
        net: Any = UNet2DConditionModel.from_config(to_dict(UNetConfig()))
    net = net.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, leaf in net.named_parameters():
            leaf.copy_(torch.from_numpy(random_weight(name, leaf.shape)))
    z, text, pooled = map(torch.from_numpy, inputs(config, channels_last=False))
    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * config.batch)

    @torch.inference_mode()
    def call() -> Any:
        return net(z, 999, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample

    return call


def inputs(config: Config, *, channels_last: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents, text and pooled text, normal and float32."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((config.batch, config.latent, config.latent, 4), np.float32)
    text = rng.standard_normal((config.batch, TEXT_LENGTH, 2048), np.float32)
    pooled = rng.standard_normal((config.batch, 1280), np.float32)
    return z if channels_last else np.ascontiguousarray(z.transpose(0, 3, 1, 2)), text, pooled


def random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms' gains of about one, all else small and normal: no denormal numbers, which would be slow.

    A block of random numbers is repeated, since drawing 2.6 billion takes minutes.
    """
    block = np.random.default_rng(len(name)).standard_normal(2**16 + 1, np.float32)
    gain = name == "scale" or (len(shape) == 1 and name.endswith("weight"))
    return np.resize(1 + 0.02 * block if gain else 0.02 * block, shape)


if __name__ == "__main__":
    start(main, Config, "eval.bench.unet", "torch", "diffusers")

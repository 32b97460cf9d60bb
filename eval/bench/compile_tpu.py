"""SDXL's U-Net compiled for one TPU chip without having one, against Flax diffusers.

    python -m eval.bench.compile_tpu [--sides megjax flax-diffusers] [--topology v5e:2x2] [--json OUT.json]
    python -m eval.bench.compile_tpu --program gradient --batch 1 --sides megjax

Compiles the forward pass in bfloat16, guided (batch 2), at 1024 x 1024 with the TPU compiler on the CPU, both
sides in one run, each in a process of its own; or loss and gradients with rematerialisation. No weights are
allocated. Prints for each side the seconds that compiling took, by the clock and of the processor, and what
one chip needs: temporaries, peak memory, bytes accessed, FLOPs and the compiler's estimate of the seconds,
with loops counted as often as they run. Takes minutes of one core. Needs libtpu (extra `tpu`), and the other
side diffusers (extra `parity`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from eval.bench import child, save, start, timed
from megjax.errors import MegError
from megjax.files import writable_folder

Side = Literal["megjax", "flax-diffusers"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile.

    Args:
        program: the forward pass, or loss and gradients, rematerialised (MegJAX's side alone).
        sides: whose U-Net, in turn.
        topology: a TPU topology that libtpu knows; the program runs on its first chip.
        latent: latents' height and width.
        batch: pictures a call; guidance takes two.
        core: pin to this CPU core; -1 for any.
        quick: MegJAX's side with the compiler's least effort, as `megjax plan --quick`.
        tuned: compile MegJAX's side with `megjax.plan.chips.TPU_OPTIONS`; the peer has libtpu's own.
        hlo: folder for the compiled programs, if wanted.
        json: where to write the figures, if anywhere.
        side: compile one side in this process and print its figures as JSON.
    """

    program: Literal["forward", "gradient"] = "forward"
    sides: tuple[Side, ...] = ("megjax", "flax-diffusers")
    topology: str = "v5e:2x2"
    latent: int = 128
    batch: int = 2
    core: int = -1
    tuned: bool = True
    quick: bool = False
    hlo: Path | None = None
    json: Path | None = None
    side: Side | None = None


def main(config: Config) -> None:
    """Compile each side, or the one that is asked for, and print what the compiler says."""
    if config.side is not None:
        program = {"megjax": megjax_unet, "flax-diffusers": flax_diffusers_unet}[config.side]
        print(json.dumps(compiled(config, *program(config))))
        return
    if config.program == "gradient" and "flax-diffusers" in config.sides:
        raise MegError(
            "--program gradient: of --sides megjax alone; diffusers' class has no rematerialisation"
        )
    if config.hlo is not None:
        writable_folder(config.hlo, "hlo")
    report = {}
    for side in config.sides:
        report[side] = run(config, side)
        print(side, json.dumps(report[side]), flush=True)
    if set(report) == {"megjax", "flax-diffusers"}:
        ours, peer = report["megjax"], report["flax-diffusers"]
        quotients = {name: ours[name] / peer[name] for name in ours if peer[name]}
        print("MegJAX / Flax diffusers: " + ", ".join(f"{k} {v:.3f}" for k, v in quotients.items()))
    save(config.json, report)


def run(config: Config, side: Side) -> dict[str, float]:
    """Compile one side in a fresh process; libtpu takes one compilation at a time on a machine."""
    env = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    args = [f"--{name}={getattr(config, name)}" for name in ("program", "topology", "latent", "batch")]
    args += [f"--{'' if getattr(config, name) else 'no-'}{name}" for name in ("tuned", "quick")]
    args += [] if config.hlo is None else [f"--hlo={config.hlo}"]
    core = None if config.core < 0 else config.core
    text = child("eval.bench.compile_tpu", "--side", side, *args, env=env, core=core)
    return json.loads(text.splitlines()[-1])


def compiled(config: Config, fn: Callable[..., Any], args: tuple) -> dict[str, float]:
    """Compile `fn(*args)` for the topology's first chip; seconds, GiB, GB and TFLOP."""
    import jax

    from megjax.plan.account import account
    from megjax.plan.chips import QUICK, TPU_OPTIONS, topology

    chips = topology(config.topology)
    chip = jax.sharding.SingleDeviceSharding(chips.devices[0])
    lowered = jax.jit(fn, in_shardings=chip).lower(*args)
    options: dict[str, Any] = {}
    if config.side == "megjax":
        options = {**(TPU_OPTIONS if config.tuned else {}), **(QUICK if config.quick else {})}
    executable, timing = timed(lambda: lowered.compile(compiler_options=options))
    text = executable.as_text()
    if config.hlo is not None:
        (config.hlo / f"{config.side}-{config.program}.hlo").write_text(text)
    memory, cost = executable.memory_analysis(), account(text, chips.chip)
    return {
        "compile_s": timing.wall_s,
        "compile_cpu_s": timing.cpu_s,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30,
        "peak_gib": memory.peak_memory_in_bytes / 2**30,
        "accessed_gb": cost.bytes_accessed / 1e9,
        "tflop": cost.flops / 1e12,
        "estimate_s": cost.seconds,
        "kernels": cost.kernels,
    }


def megjax_unet(config: Config) -> tuple[Callable[..., Any], tuple]:
    """Our U-Net and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp

    from megjax.models import Options, UNetConfig, unet

    gradient = config.program == "gradient"
    net = unet(UNetConfig(), Options(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=gradient))
    args = (net.shapes, *shapes(config, channels_last=True))
    if gradient:
        return jax.value_and_grad(lambda *args: jnp.mean(jnp.square(net(*args)))), args
    return lambda *args: net(*args), args


def flax_diffusers_unet(config: Config) -> tuple[Callable[..., Any], tuple]:
    """The U-Net of diffusers' Flax classes, which were removed in 0.40, and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp
    from diffusers import FlaxUNet2DConditionModel
    from diffusers.utils import logging

    from megjax.models import UNetConfig

    logging.set_verbosity_error()
    names = {field.name for field in dataclasses.fields(FlaxUNet2DConditionModel)}
    given = {name: value for name, value in dataclasses.asdict(UNetConfig()).items() if name in names}
    net = FlaxUNet2DConditionModel(**given, addition_embed_type="text_time", dtype=jnp.bfloat16)
    params = jax.eval_shape(net.init_weights, jax.eval_shape(lambda: jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    z, t, text, pooled, sizes = shapes(config, channels_last=False)

    def forward(params: Any, z: Any, t: Any, text: Any, pooled: Any, sizes: Any) -> Any:
        added = {"text_embeds": pooled, "time_ids": sizes}
        return net.apply({"params": params}, z, t, text, added_cond_kwargs=added, return_dict=False)[0]

    return forward, (params, z, t, text, pooled, sizes)


def shapes(config: Config, *, channels_last: bool) -> tuple:
    """Latents, timesteps, text, pooled text and sizes."""
    import jax
    import jax.numpy as jnp

    picture = (config.latent, config.latent, 4) if channels_last else (4, config.latent, config.latent)
    bf16 = [(config.batch, *picture), (config.batch, 77, 2048), (config.batch, 1280)]
    z, text, pooled = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in bf16)
    t, sizes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(config.batch,), (config.batch, 6)])
    return z, t, text, pooled, sizes


if __name__ == "__main__":
    start(main, Config, "eval.bench.compile_tpu", "diffusers")

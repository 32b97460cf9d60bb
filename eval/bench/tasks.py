"""Whole tasks on one CPU core in float32, against PyTorch diffusers.

    python -m eval.bench.tasks decode      # SDXL's decoder, one picture of 256 x 256
    python -m eval.bench.tasks generate    # MEG-Tiny's networks: 8 guided DDIM steps and decoding, 4 pictures
    python -m eval.bench.tasks step        # their distillation step: solver, student, AdamW, EMA; 8 pictures

Both sides have random weights of the same networks and run in alternating processes pinned to one core.
Prints the seconds of a call, and of the first one from the process's start: imports, and what is compiled,
which the first process does and later ones find in JAX's compilation cache; and the process's peak memory.
The quotients are MegJAX over torch, pair by pair. Needs the extra `parity`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from eval.bench import alternate, median_timing, ratios, save, start

SOLVER_STEPS, STEPS, GUIDANCE = 10, 8, 2.5
BATCH = {"decode": 1, "generate": 4, "step": 8}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Args:
        task: see above.
        calls: timed calls a process; their median counts.
        rounds: pairs of processes.
        core: the CPU core.
        json: where to write the figures, if anywhere.
        side: run one side in this process and print its figures as JSON.
    """

    task: tyro.conf.Positional[Literal["decode", "generate", "step"]]
    calls: int = 3
    rounds: int = 3
    core: int = 0
    json: Path | None = None
    side: Literal["megjax", "torch"] | None = None


def main(config: Config) -> None:
    """Time both sides, or the one that is asked for."""
    if config.side is not None:
        print(json.dumps(figures(config)))
        return
    args = [config.task, f"--calls={config.calls}"]
    results = alternate("eval.bench.tasks", ("megjax", "torch"), config.rounds, core=config.core, args=args)
    medians = {name: statistics.median(ratios(results, name)) for name in ("wall_s", "cpu_s", "peak_mb")}
    # The first process compiles; the others find what it compiled.
    for name, pairs in {"cold_first_cpu_s": results[:2], "warm_first_cpu_s": results[2:] or results}.items():
        medians[name] = statistics.median(ratios(pairs, "first_cpu_s"))
    print(f"{config.task}, MegJAX / torch: " + ", ".join(f"{k} {v:.3f}" for k, v in medians.items()))
    save(config.json, {"task": config.task, "ratios": medians, "runs": results})


def figures(config: Config) -> dict[str, float]:
    """One side's seconds and megabytes."""
    call = {"megjax": megjax_call, "torch": torch_call}[config.side or "megjax"](config.task)
    call()
    first = {"first_s": _age_s(), "first_cpu_s": time.process_time()}
    timing = median_timing(call, config.calls)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return timing._asdict() | first | {"peak_mb": peak_mb}


def _age_s() -> float:
    """Seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def arrays(task: str, *, channels_last: bool) -> dict[str, np.ndarray]:
    """Noise or latents, text and pooled text, and the empty prompt's."""
    from configs.pretrain import TINY

    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    side, batch = 32 if task == "decode" else TINY.unet.sample_size, BATCH[task]
    z = draw((batch, side, side, 4))
    length = TINY.text_encoder.max_position_embeddings
    width, pooled = TINY.unet.cross_attention_dim, TINY.unet.pooled_dim
    return {
        "z": z if channels_last else np.ascontiguousarray(z.transpose(0, 3, 1, 2)),
        "text": draw((batch, length, width)),
        "pooled": draw((batch, pooled)),
        "no_text": draw((batch, length, width)),
        "no_pooled": draw((batch, pooled)),
        "sizes": np.tile(np.array([64, 64, 0, 0, 64, 64], np.float32), (batch, 1)),
    }


def megjax_call(task: str) -> Callable[[], Any]:
    """Our task, compiled, with its weights and inputs."""
    import jax
    import jax.numpy as jnp

    from configs.pretrain import TINY
    from megjax.diffusion import Conditioning, ddim, guided, schedule
    from megjax.distill.student_loss import Batch, perflow_loss
    from megjax.models import VAEConfig, unet, vae_decoder
    from megjax.training.optimizer import make_optimizer
    from megjax.training.step import init_state, make_step

    x = {name: jnp.asarray(array) for name, array in arrays(task, channels_last=True).items()}
    decoder = vae_decoder(VAEConfig() if task == "decode" else TINY.vae)
    if task == "decode":
        weights = decoder.init(jax.random.key(0))
        decode = jax.jit(lambda weights, z: decoder(weights, z))
        return lambda: decode(weights, x["z"]).block_until_ready()
    net, sched = unet(TINY.unet), schedule()
    weights = net.init(jax.random.key(0))
    prompt = Conditioning(x["text"], x["pooled"], x["sizes"])
    empty = Conditioning(x["no_text"], x["no_pooled"], x["sizes"])
    if task == "generate":
        decoding = decoder.init(jax.random.key(1))

        @jax.jit
        def generate(weights: Any, decoding: Any, z: Any, steps: Any) -> Any:
            z = ddim(guided(net, weights, prompt, empty, GUIDANCE), z, sched, steps)
            return jnp.clip(decoder(decoding, z), 0, 1)

        return lambda: generate(weights, decoding, x["z"], np.int32(STEPS)).block_until_ready()
    optimizer = make_optimizer(1e-4, 1000, warmup=10, decay=False)
    loss = perflow_loss(net, sched, guidance=GUIDANCE, solver_steps=SOLVER_STEPS, text_drop=0.0)
    step = jax.jit(make_step(loss, optimizer, 0.999), donate_argnums=0)
    state, key = init_state(jax.tree.map(jnp.copy, weights), optimizer), jax.random.key(2)

    def update() -> Any:
        nonlocal state
        state, metrics = step(state, key, Batch(weights, x["z"], prompt, empty))
        return float(metrics["loss"])

    return update


def torch_call(task: str) -> Callable[[], Any]:
    """The same by diffusers."""
    import diffusers
    import torch

    from configs.pretrain import TINY
    from megjax.models import VAEConfig, to_dict

    torch.set_num_threads(1)
    classes: Any = diffusers
    x = {name: torch.from_numpy(array) for name, array in arrays(task, channels_last=False).items()}
    if task != "step":
        config = to_dict(VAEConfig() if task == "decode" else TINY.vae)
        vae = classes.AutoencoderKL.from_config(config).eval()
        if task == "decode":
            return torch.inference_mode()(lambda: vae.decode(x["z"] / vae.config.scaling_factor).sample)
    net = classes.UNet2DConditionModel.from_config(to_dict(TINY.unet))
    scheduler = classes.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    both_text = torch.cat([x["no_text"], x["text"]])
    added = {
        "text_embeds": torch.cat([x["no_pooled"], x["pooled"]]),
        "time_ids": torch.cat([x["sizes"], x["sizes"]]),
    }

    def guided(teacher: Any, z: Any, t: Any) -> Any:
        t_2B = torch.cat([t, t])
        eps = teacher(torch.cat([z, z]), t_2B, both_text, added_cond_kwargs=added).sample
        without, given = eps.chunk(2)
        return without + GUIDANCE * (given - without)

    if task == "generate":
        net.eval()
        scheduler.set_timesteps(STEPS)

        @torch.inference_mode()
        def generate() -> Any:
            z = x["z"]
            for t in scheduler.timesteps:
                z = scheduler.step(guided(net, z, t.expand(len(z))), t, z).prev_sample
            return (vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

        return generate
    return _torch_step(net, guided, scheduler.alphas_cumprod, x)


def _torch_step(net: Any, guided: Callable[..., Any], abar: Any, x: dict[str, Any]) -> Callable[[], Any]:
    import copy

    import torch

    teacher, average = copy.deepcopy(net).requires_grad_(False), copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=0.01)
    z0, windows, width = x["z"], 4, 250

    def power(t: Any) -> Any:
        return abar[t.clamp(min=0)][:, None, None, None]

    def update() -> Any:
        t = 1000 - torch.floor(200 * torch.rand(len(z0))).long() * 5
        end = (t * windows + 999) // 1000 * width - width
        start = end + width
        with torch.no_grad():
            z_s = power(start - 1).sqrt() * z0 + (1 - power(start - 1)).sqrt() * torch.randn_like(z0)
            z, stride = z_s, width // SOLVER_STEPS
            for i in range(SOLVER_STEPS):
                at = start - 1 - i * stride
                a, a_next = power(at), power(at - stride)
                eps = guided(teacher, z, at)
                z = a_next.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next).sqrt() * eps
            a_s, a_e = power(start - 1), power(end - 1)
            lam = (a_e / a_s).sqrt()
            target = (z - lam * z_s) / ((1 - a_e).sqrt() - lam * (1 - a_s).sqrt())
            share = ((t - start) / (end - start))[:, None, None, None]
            z_t = z_s + (z - z_s) * share
        added = {"text_embeds": x["pooled"], "time_ids": x["sizes"]}
        loss = (net(z_t, t, x["text"], added_cond_kwargs=added).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 0.001)
        return loss.item()

    return update


if __name__ == "__main__":
    start(main, Config, "eval.bench.tasks", "torch", "diffusers")

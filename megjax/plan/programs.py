"""A backbone's programs on shapes alone: training step, sampling, decoding, for devices that do not exist."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from megjax.diffusion import Conditioning
from megjax.distill.diffuser import DiffuserConfig, distillation
from megjax.distill.encoding import STORED
from megjax.models import (
    Options,
)
from megjax.pipeline.load import Pipeline, load_pipeline, sdxl
from megjax.pipeline.split import decode, denoise
from megjax.training.sharding import (
    batch_sharding,
    check_batch,
    make_mesh,
    param_shardings,
    replicated,
    state_shardings,
)
from megjax.training.step import Inputs

Backbone = Literal["sdxl", "tiny"]
ProgramName = Literal["train", "sample", "decode"]


class Lowered(NamedTuple):
    """A program that is ready to be compiled.

    Args:
        lowered: for its devices.
        parts: bytes of its arguments on one device, by name.
        images: pictures on one device.
        trips: of its loop whose number of steps is traced; None if there is none.
    """

    lowered: jax.stages.Lowered
    parts: dict[str, int]
    images: int
    trips: int | None = None


def backbone(name: Backbone, options: Options) -> Pipeline:
    """The backbone's networks and schedule; of SDXL no parameter exists."""
    return load_pipeline("tiny", options) if name == "tiny" else sdxl(options)


def lower_training(config: DiffuserConfig, pipeline: Pipeline, devices: Sequence[Any]) -> Lowered:
    """The distillation step as `train.distill_diffuser` compiles it, states cut over the mesh of `devices`.

    Args:
        config: the mesh, the batch over all devices, and how to train.
        pipeline: the teacher; of its parameters only the shapes are read.
        devices: of one topology.

    Raises:
        MegError: the mesh does not fit the devices, or the batch the mesh.
    """
    mesh = make_mesh(config.replicas, config.fsdp, config.tensor, devices)
    check_batch(config.batch, config.accumulate, mesh)
    program = distillation(config, pipeline)
    shardings = state_shardings(program.state, mesh, offload_ema=config.offload_ema)
    state = _placed(program.state, shardings)
    frozen = {
        "teacher": _placed(pipeline.unet.shapes, param_shardings(pipeline.unet.shapes, mesh)),
        "empty": _everywhere(_text(pipeline, 1, STORED), replicated(mesh)),
    }
    text, pooled = _text(pipeline, config.batch, STORED)
    latent = jax.ShapeDtypeStruct(_latents(pipeline, config.batch).shape, STORED)
    data = _everywhere({"z0": latent, "text": text, "pooled": pooled}, batch_sharding(mesh))
    key = _everywhere(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    step = jax.jit(program.step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    with jax.set_mesh(mesh):
        lowered = step.lower(state, key, Inputs(data, frozen))
    parts = {
        "student": device_bytes(state.params),
        "moving average": device_bytes(state.ema),
        "optimiser": device_bytes(state.opt_state),
        "teacher": device_bytes(frozen["teacher"]),
        "batch": device_bytes(data),
    }
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    return Lowered(lowered, parts, config.batch // rows)


def lower_sampling(pipeline: Pipeline, device: Any, *, batch: int = 1, steps: int = 8) -> Lowered:
    """The few-step sampler with guidance, one executable for every number of steps.

    Each device has its own pictures, and all of the U-Net.
    """
    where = jax.sharding.SingleDeviceSharding(device)
    params = _everywhere(pipeline.unet.shapes, where)
    text, pooled = _text(pipeline, batch, jnp.float32)
    sizes: Any = jax.ShapeDtypeStruct((batch, 6), jnp.float32)
    prompt = _everywhere(Conditioning(text, pooled, sizes), where)
    z = _everywhere(_latents(pipeline, batch), where)
    integer, number = (
        _everywhere(jax.ShapeDtypeStruct((), kind), where) for kind in (jnp.int32, jnp.float32)
    )
    lowered = denoise.lower(
        pipeline, params, z, prompt, prompt, integer, number, z, number, sampler="perflow"
    )
    return Lowered(lowered, {"U-Net": device_bytes(params)}, batch, steps)


def lower_decoding(pipeline: Pipeline, device: Any, *, batch: int = 1) -> Lowered:
    """The decoder, latents to pictures."""
    where = jax.sharding.SingleDeviceSharding(device)
    params = _everywhere(pipeline.vae_decoder.shapes, where)
    lowered = decode.lower(pipeline, params, _everywhere(_latents(pipeline, batch), where))
    return Lowered(lowered, {"decoder": device_bytes(params)}, batch)


def device_bytes(tree: PyTree) -> int:
    """Bytes of placed shapes on one device, before padding."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )


def _everywhere(shapes: PyTree, where: jax.sharding.Sharding) -> PyTree:
    return _placed(shapes, jax.tree.map(lambda _: where, shapes))


def _latents(pipeline: Pipeline, batch: int) -> jax.ShapeDtypeStruct:
    config = pipeline.unet.config
    return jax.ShapeDtypeStruct(
        (batch, config.sample_size, config.sample_size, config.in_channels), jnp.float32
    )


def _text(pipeline: Pipeline, batch: int, dtype: Any) -> tuple[Any, Any]:
    """Text embeddings, pooled and not."""
    config = pipeline.unet.config
    length = pipeline.text_encoders[0].config.max_position_embeddings
    return (
        jax.ShapeDtypeStruct((batch, length, config.cross_attention_dim), dtype),
        jax.ShapeDtypeStruct((batch, config.pooled_dim), dtype),
    )

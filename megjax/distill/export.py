"""A student's weights in diffusers layout: whole, or as the delta that makes a student of any fine-tune."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike, PyTree

from megjax import weights
from megjax.files import replacing_folder
from megjax.models import Network, Params, to_dict


def save_weights(
    folder: str | Path,
    network: Network,
    params: Params,
    dtype: DTypeLike = jnp.float16,
    extra: Mapping[str, bytes] = {},
) -> None:
    """Write a network's weights and config, first beside `folder`, then in its place.

    Args:
        folder: such as `model/unet_student`; replaced if it exists.
        network: of the config.
        params: to write; gathered from the devices.
        dtype: of the stored weights.
        extra: further files of the folder, by name.
    """
    params = on_every_process(params)
    if jax.process_index() != 0:
        return
    with replacing_folder(Path(folder)) as temporary:
        weights.save(temporary, jax.tree.map(lambda p: p.astype(dtype), params), to_dict(network.config))
        for name, content in extra.items():
            (temporary / name).write_bytes(content)


def on_every_process(params: PyTree) -> PyTree:
    """Parameters of which each process has a part, whole on all of them; the others as they are."""
    if jax.process_count() == 1:
        return params
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(params, tiled=True)


def delta(student: Params, teacher: Params) -> Params:
    """Student minus teacher, in float32: what `add_delta` adds to another fine-tune of the teacher."""
    return jax.tree.map(lambda s, t: s.astype(jnp.float32) - t.astype(jnp.float32), student, teacher)


def add_delta(params: Params, difference: Params, strength: float = 1.0) -> Params:
    """Turn a fine-tune into a few-step student: its weights plus the delta, in its own dtype.

    Args:
        params: of any network of the teacher's shapes.
        difference: from `delta`, or read from `unet_delta`.
        strength: 1 is the student's own.
    """

    def add(p: jax.Array, d: jax.Array) -> jax.Array:
        return (p.astype(jnp.float32) + strength * d.astype(jnp.float32)).astype(p.dtype)

    return jax.tree.map(add, params, difference)


def average(students: Sequence[Params]) -> Params:
    """The mean of several students' weights, in float32; of runs from one start it often errs less than each.

    Args:
        students: parameters of one network.
    """
    return jax.tree.map(lambda *p: sum(x.astype(jnp.float32) for x in p) / len(p), *students)


def copy_backbone(source: Path, target: Path, parts: Mapping[str, Path]) -> None:
    """Make a backbone's folder from another: its files, with some parts replaced or added.

    What tells of the other's pictures (README.md, quality.npz, curves.png) is left behind.

    Args:
        source: in diffusers layout.
        target: replaced if it exists.
        parts: folders by their place in the target, such as `unet_student` or `decoders/meg`.
    """
    with replacing_folder(target) as temporary:
        other = shutil.ignore_patterns("README.md", "quality.npz", "curves.png")
        shutil.copytree(source, temporary, ignore=other, dirs_exist_ok=True)
        for name, part in parts.items():
            shutil.rmtree(temporary / name, ignore_errors=True)
            shutil.copytree(part, temporary / name)

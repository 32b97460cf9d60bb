"""Names and layouts of stored tensors, PyTorch's, Flax's and ours: pure functions of the parameter tree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from flax.traverse_util import flatten_dict

Layout = Literal["torch", "flax"]
"""`torch`: OIHW and OI weights under dotted names. `flax`: HWIO and IO kernels under names with slashes."""


class Slot(NamedTuple):
    """Where one stored tensor lives in our tree: a leaf, or one layer of a leaf stacked over depth.

    Args:
        path: keys of the leaf.
        layer: index on the leaf's leading depth axis; None if the leaf isn't stacked.
        shape: of this tensor in our layout, without the depth axis.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


# Module lists whose items Flax joins by an underscore; `linear_1` looks the same, but is no item.
_LIST_ITEM = re.compile(
    r"\b(down_blocks|up_blocks|attentions|resnets|transformer_blocks|downsamplers|upsamplers|to_out|net)_(\d+)\b"
)
_STACKED = ("transformer_blocks", "layers")
_WEIGHT = re.compile(r"\b(kernel|scale|embedding)$")
# The VAE's attention: Flax and old PyTorch checkpoints against PyTorch's present names.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(r"\b(query|key|value|proj_attn)(?=\.\w+$)")
_NEW_ATTENTION = re.compile(r"(?<=mid_block\.attentions\.)(\d+)\.(to_q|to_k|to_v|to_out\.0)(?=\.\w+$)")
# transformers 5 saves `CLIPTextModel` without the prefix that every other version and class has.
_BARE_CLIP = re.compile(r"^(?=(embeddings|encoder\.layers|final_layer_norm)\.)")
_BUFFER = re.compile(r"\bposition_ids$")


def canonical(name: str) -> str:
    """Return PyTorch's present name of a tensor stored under any dialect, ours included."""
    name = _LIST_ITEM.sub(r"\1.\2", name.replace("/", "."))
    name = _WEIGHT.sub("weight", name)
    name = _OLD_ATTENTION.sub(lambda m: _VAE_ATTENTION[m[1]], name)
    return _BARE_CLIP.sub("text_model.", name)


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is a constant that PyTorch keeps with the weights."""
    return bool(_BUFFER.search(name))


def flatten(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Return a nested dict's leaves by their path."""
    return cast(dict[tuple[str, ...], Any], flatten_dict(tree))


def slots(shapes: Mapping[str, Any]) -> dict[str, Slot]:
    """Return where each stored tensor goes, by canonical name.

    Args:
        shapes: nested dict of arrays or `jax.ShapeDtypeStruct`; repeated blocks stacked on a leading axis.
    """
    found = {}
    for path, leaf in flatten(shapes).items():
        depth_at = next(
            (i + 1 for i, k in enumerate(path[:-1]) if k in _STACKED and not path[i + 1].isdigit()), None
        )
        if depth_at is None:
            found[canonical("/".join(path))] = Slot(path, None, tuple(leaf.shape))
            continue
        for layer in range(leaf.shape[0]):
            name = "/".join((*path[:depth_at], str(layer), *path[depth_at:]))
            found[canonical(name)] = Slot(path, layer, tuple(leaf.shape[1:]))
    return found


def stored_name(name: str, slot: Slot, layout: Layout) -> str:
    """Return the name that a canonical name is written under; Flax's has slashes between nested keys."""
    if layout == "torch":
        return name
    inverse = {new: old for old, new in _VAE_ATTENTION.items()}
    name = _NEW_ATTENTION.sub(lambda m: f"{m[1]}.{inverse[m[2]]}", name)
    module = name.rpartition(".")[0]
    if not module.startswith("text_"):
        module = re.sub(r"\.(\d+)\b", r"_\1", module)
    return f"{module}.{slot.path[-1]}".replace(".", "/")


def to_ours(array: np.ndarray, name: str, slot: Slot) -> np.ndarray:
    """Return a view of a stored tensor in our layout; a kernel that is called `weight` comes in PyTorch's.

    A 1 x 1 convolution where we have a dense layer (`proj_in` without `use_linear_projection`) becomes one.
    """
    if slot.path[-1] == "kernel" and name.endswith("weight"):
        array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else tuple(reversed(range(array.ndim))))
    if array.ndim == 4 and len(slot.shape) == 2 and array.shape[:2] == (1, 1):
        array = array[0, 0]
    return array


def to_stored(array: np.ndarray, slot: Slot, layout: Layout, *, linear_projection: bool = True) -> np.ndarray:
    """Return a view of a tensor of ours in a file's layout; the inverse of `to_ours`.

    Args:
        array: the slot's values.
        slot: where they are from.
        layout: of the file.
        linear_projection: the config's `use_linear_projection`; without it `proj_in` and `proj_out` are
            stored as 1 x 1 convolutions.
    """
    if slot.path[-1] != "kernel":
        return array
    if array.ndim == 2 and not linear_projection and slot.path[-2] in ("proj_in", "proj_out"):
        array = array[None, None]
    if layout == "torch":
        array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else tuple(reversed(range(array.ndim))))
    return array


def copy_into(into: np.ndarray, view: np.ndarray) -> None:
    """Copy a view into an array of its shape, casting to its dtype.

    In strips, so that both sides of a transposition stay in cache: 3 to 7 times as fast as one assignment.
    """
    if view.ndim < 2 or view.flags.c_contiguous:
        into[...] = view
        return
    for i in range(0, view.shape[-1], 16):
        into[..., i : i + 16] = view[..., i : i + 16]

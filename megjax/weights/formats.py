"""Files of tensors, opened by their headers alone: safetensors and Flax's msgpack, whole or in shards."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from megjax.errors import WeightsError
from megjax.weights import flax_msgpack
from megjax.weights.stored import Tensor

Format = Literal["safetensors", "msgpack"]
Library = Literal["diffusers", "transformers"]

STEMS: dict[tuple[Format, Library], str] = {
    ("safetensors", "diffusers"): "diffusion_pytorch_model",
    ("safetensors", "transformers"): "model",
    ("msgpack", "diffusers"): "diffusion_flax_model",
    ("msgpack", "transformers"): "flax_model",
}
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def find(folder: Path, variant: str | None = None) -> Path:
    """Return the folder's weights: a whole file or an index of shards, safetensors before msgpack.

    Args:
        folder: one component's, such as `unet`.
        variant: as in `model.fp16.safetensors`; None takes the plain file, or the folder's only variant.

    Raises `WeightsError` if there is none, if the variant isn't there or one must be named, and for PyTorch's
    pickles.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; expected a component in diffusers layout")
    found: dict[str | None, Path] = {}
    for (suffix, _), stem in STEMS.items():
        pattern = re.compile(
            rf"{stem}(?:\.(?P<whole>[\w-]+))?\.{suffix}|{stem}\.{suffix}\.index(?:\.(?P<index>[\w-]+))?\.json"
        )
        for path in sorted(folder.iterdir()):
            # A shard that belongs to an index is no file of its own.
            if (match := pattern.fullmatch(path.name)) and not re.search(r"-\d+-of-\d+\.", path.name):
                found.setdefault(match["whole"] or match["index"], path)
    if variant in found:
        return found[variant]
    if variant is None and len(found) == 1:
        return next(iter(found.values()))
    if found:
        there = ", ".join(sorted(name or "plain" for name in found))
        raise WeightsError(f"{folder}: no weights of variant {variant or 'plain'!r}; there are {there}")
    if pickles := sorted(p.name for pattern in ("*.bin", "*.ckpt", "*.pt") for p in folder.glob(pattern)):
        raise WeightsError(
            f"{folder / pickles[0]}: PyTorch pickles can run code when read, so they are refused; "
            "save the model with safe_serialization=True"
        )
    names = [f"{stem}.{suffix}" for (suffix, _), stem in STEMS.items()]
    raise WeightsError(f"{folder}: no weights; expected {' or '.join(names)}, or an index of its shards")


def tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a weights file, or of the shards that an index names, reading headers only."""
    if path.suffix != ".json":
        return _safetensors(path) if path.suffix == ".safetensors" else flax_msgpack.tensors(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise WeightsError(f"{path}: no weight_map from names to files")
    files = sorted(set(weight_map.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise WeightsError(f"{path}: shard {outside[0]!r} must lie in the index's own folder")
    if missing := [name for name in files if not (path.parent / name).is_file()]:
        raise WeightsError(f"{path}: {count(missing, 'shard')} missing: {first(missing)}")
    found: dict[str, Tensor] = {}
    for name in files:
        shard = tensors(path.parent / name)
        absent = [key for key, file in weight_map.items() if file == name and key not in shard]
        if absent or (shared := found.keys() & shard.keys()):
            wrong = (
                f"lacks {first(absent)}" if absent else f"repeats {first(sorted(shared))} of another shard"
            )
            raise WeightsError(f"{path.parent / name}: {wrong}; the shards don't belong to this index")
        found |= shard
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; raises `WeightsError` if it's missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def count(items: list[Any], noun: str) -> str:
    """Return `1 tensor`, `2 tensors`."""
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"


def first(items: list[str], limit: int = 4) -> str:
    """Return the first few items, and how many there are besides."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def first_line(error: Exception) -> str:
    """Return the first line of another library's message."""
    return str(error).partition("\n")[0]


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        # The mapped pages of a whole file would count as a second copy of the weights; `pread` keeps none.
        file = safe_open(path, framework="numpy", backend="pread")
        heads = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: truncated or not safetensors ({first_line(error)})") from None

    def read(name: str) -> np.ndarray:
        try:
            return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path}: cannot read {name} ({first_line(error)})") from None

    return {
        name: Tensor(
            tuple(head.get_shape()),
            _SAFETENSORS_DTYPES.get(str(head.get_dtype()), str(head.get_dtype())),
            functools.partial(read, name),
        )
        for name, head in heads.items()
    }

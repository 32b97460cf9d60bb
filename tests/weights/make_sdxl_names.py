"""Write sdxl_names.npz: names and shapes of SDXL's tensors in the reference classes; no weights allocated.

    python -m tests.weights.make_sdxl_names

Needs the extra `parity`; takes a minute. The Flax names of U-Net and VAE come from diffusers 0.39.0, the last
version that has Flax classes. Those of the text encoders come from transformers 4.55.4, when run with it;
otherwise they are kept as they are in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from megjax import models

CLIP_L = models.CLIPTextConfig()
CLIP_G = models.CLIP_BIG_G
SDXL = {
    "unet": models.UNetConfig(),
    "vae": models.VAEConfig(),
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
}


def torch_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the PyTorch class's state dict, on the meta device."""
    import diffusers
    import torch
    import transformers

    raw = models.to_dict(config)
    with torch.device("meta"):
        if name := raw.get("_class_name"):
            module = getattr(diffusers, name).from_config(raw)
        else:
            name = raw["architectures"][0]
            module = getattr(transformers, name)(transformers.CLIPTextConfig(**raw))
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def flax_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Flax class's parameters."""
    import diffusers
    import transformers

    raw = models.to_dict(config)
    if name := raw.get("_class_name"):
        module = getattr(diffusers, f"Flax{name}").from_config(raw)
        module = module[0] if isinstance(module, tuple) else module
        tree = jax.eval_shape(module.init_weights, jax.random.PRNGKey(0))
    else:
        make = getattr(transformers, f"Flax{raw['architectures'][0]}")
        tree = make(transformers.CLIPTextConfig(**raw), _do_init=False).params_shape_tree
    return {"/".join(path): tuple(leaf.shape) for path, leaf in flatten_dict(dict(tree)).items()}


def _lines(shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
    return np.array([f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items())], bytes)


def main() -> None:
    """Write the file beside this script."""
    import transformers

    path = Path(__file__).with_name("sdxl_names.npz")
    found = dict(np.load(path)) if path.exists() else {}
    if hasattr(transformers, "FlaxCLIPTextModel"):
        found |= {
            f"{part}_flax": _lines(flax_shapes(SDXL[part])) for part in ("text_encoder", "text_encoder_2")
        }
    else:
        found |= {f"{part}_torch": _lines(torch_shapes(config)) for part, config in SDXL.items()}
        found |= {f"{part}_flax": _lines(flax_shapes(SDXL[part])) for part in ("unet", "vae")}
    np.savez_compressed(path, **found)


if __name__ == "__main__":
    main()

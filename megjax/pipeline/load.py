"""A backbone ready to run: its networks, parameters, tokenizers and noise schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from megjax import weights
from megjax.diffusion import Schedule, read_schedule, schedule
from megjax.errors import WeightsError
from megjax.models import (
    CLIP_BIG_G,
    CLIPTextConfig,
    Network,
    Options,
    Params,
    UNetConfig,
    VAEConfig,
    clip_text,
    from_dict,
    unet,
    vae_decoder,
    vae_encoder,
)
from megjax.text import load_tokenizers

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

EMBEDDED = {"tiny": Path(__file__).parent.parent / "assets" / "tiny"}
"""Backbones that ship with the package."""

STUDENT, DECODERS, GATE = "unet_student", "decoders", "decoders/pruning/gate.safetensors"
"""Parts of a distilled backbone, beside diffusers' own: PyTorch diffusers passes over them."""

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Both halves of the split: the server holds all but `vae_decoder`, the device holds that.

    Args:
        name: what it was loaded from.
        text_encoders: CLIP-L's and bigG's classes, in this order.
        unet: the denoiser.
        vae_encoder: for image-to-image.
        vae_decoder: the device's half.
        params: by name: `text_encoder`, `text_encoder_2`, `unet`, `vae_encoder`, `vae_decoder`. A distilled
            backbone also has `student`, the few-step U-Net, and `decoders`, a dict of the distilled decoders
            by name (`meg`, `split_finetune`, ...), of `unet`'s and `vae_decoder`'s networks; `gate` tells
            MEG-Pruning what to send.
        tokenizers: one for each text encoder.
        schedule: the noise schedule.
    """

    name: str
    text_encoders: tuple[Network, Network]
    unet: Network
    vae_encoder: Network
    vae_decoder: Network
    params: dict[str, Any]
    tokenizers: tuple[CLIPTokenizer, ...]
    schedule: Schedule

    @property
    def image_size(self) -> int:
        """Side of the pictures it was made for; pixels."""
        return self.unet.config.sample_size * self.vae_decoder.config.downsampling

    @property
    def device_decoder(self) -> Params:
        """Parameters of the decoder that the device runs: the distilled one, if there is one."""
        return self.params.get("decoders", {}).get("meg", self.params["vae_decoder"])

    @property
    def networks(self) -> dict[str, Network]:
        """The networks under their parameters' names."""
        return {
            "text_encoder": self.text_encoders[0],
            "text_encoder_2": self.text_encoders[1],
            "unet": self.unet,
            "vae_encoder": self.vae_encoder,
            "vae_decoder": self.vae_decoder,
        }


def load_pipeline(
    model: str | Path = "tiny", options: Options = Options(), *, on_part: Progress | None = None
) -> Pipeline:
    """Load an embedded backbone, a folder in diffusers layout or a hub id.

    Args:
        model: `tiny`, a path, or an id such as `stabilityai/stable-diffusion-xl-base-1.0`.
        options: the parameters are converted to its `param_dtype` as they are read.
        on_part: told the name of each part before it is read.

    Raises:
        WeightsError: for a folder that is missing, incomplete or of another kind than SDXL's.
    """
    folder = weights.open_folder(EMBEDDED.get(str(model), model))
    if "text_encoder_2" not in folder.configs:
        raise WeightsError(f"{model}: has no text_encoder_2; only SDXL's two text encoders are supported")

    def config(cls: Any, part: str) -> Any:
        return from_dict(cls, folder.configs[part], origin=str(folder.path / part / "config.json"))

    vae = config(VAEConfig, "vae")
    encoder, decoder = vae_encoder(vae, options), vae_decoder(vae, options)
    networks = {
        "text_encoder": clip_text(config(CLIPTextConfig, "text_encoder"), options),
        "text_encoder_2": clip_text(config(CLIPTextConfig, "text_encoder_2"), options),
        "unet": unet(config(UNetConfig, "unet"), options),
    }
    _check_widths(str(model), networks)

    def read(part: str, shapes: Params) -> Params:
        if on_part is not None:
            on_part(part)
        return weights.load(folder.path / part, shapes, dtype=options.param_dtype)

    params = {part: read(part, network.shapes) for part, network in networks.items()}
    both = read("vae", {**encoder.shapes, **decoder.shapes})
    params |= {
        name: {key: both[key] for key in network.shapes}
        for name, network in {"vae_encoder": encoder, "vae_decoder": decoder}.items()
    }
    if (folder.path / STUDENT).is_dir():
        params["student"] = read(STUDENT, networks["unet"].shapes)
    if (folder.path / DECODERS).is_dir():
        names = sorted(part.name for part in (folder.path / DECODERS).iterdir() if part.is_dir())
        params["decoders"] = {name: read(f"{DECODERS}/{name}", decoder.shapes) for name in names}
    if (folder.path / GATE).is_file():
        flat = load_file(folder.path / GATE)
        params["gate"] = unflatten_dict({tuple(k.split("/")): jnp.asarray(v) for k, v in flat.items()})
    return Pipeline(
        name=str(model),
        text_encoders=(networks["text_encoder"], networks["text_encoder_2"]),
        unet=networks["unet"],
        vae_encoder=encoder,
        vae_decoder=decoder,
        params=params,
        tokenizers=load_tokenizers(folder.path),
        schedule=read_schedule(folder.path / "scheduler" / "scheduler_config.json"),
    )


def sdxl(options: Options = Options()) -> Pipeline:
    """SDXL's networks and schedule, no weight of which exists: enough to count and to compile."""
    vae = VAEConfig()
    return Pipeline(
        name="SDXL",
        text_encoders=(clip_text(CLIPTextConfig(), options), clip_text(CLIP_BIG_G, options)),
        unet=unet(UNetConfig(), options),
        vae_encoder=vae_encoder(vae, options),
        vae_decoder=vae_decoder(vae, options),
        params={},
        tokenizers=(),
        schedule=schedule(),
    )


def _check_widths(model: str, networks: dict[str, Network]) -> None:
    text, text_2, unet = (networks[part].config for part in ("text_encoder", "text_encoder_2", "unet"))
    if not text_2.with_projection:
        raise WeightsError(f"{model}: text_encoder_2 must be a CLIPTextModelWithProjection")
    width = text.hidden_size + text_2.hidden_size
    if width != unet.cross_attention_dim or text_2.projection_dim != unet.pooled_dim:
        raise WeightsError(
            f"{model}: text encoders of width {width}, pooled {text_2.projection_dim}, do not fit a U-Net "
            f"with cross_attention_dim {unet.cross_attention_dim} and pooled width {unet.pooled_dim}"
        )

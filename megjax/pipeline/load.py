"""A backbone ready to run: its networks, parameters, tokenizers and noise schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from megjax import weights
from megjax.diffusion import Flow, Schedule, read_flow, read_schedule, schedule
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
from megjax.models import read as read_config
from megjax.text import load_tokenizers
from megjax.weights import formats

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

EMBEDDED = {"tiny": Path(__file__).parent.parent / "assets" / "tiny"}
"""Backbones that ship with the package."""

STUDENT, DECODERS, GATE_FILE = "unet_student", "decoders", "gate.safetensors"
"""Parts of a distilled backbone, beside diffusers' own: PyTorch diffusers passes over them."""
GATE = f"{DECODERS}/pruning/{GATE_FILE}"

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Both halves of the split: the server holds all but `vae_decoder`, the device holds that.

    Args:
        name: what it was loaded from.
        text_encoders: CLIP-L's and bigG's classes, in this order.
        unet: the denoiser.
        vae_encoder: for image-to-image.
        vae_decoder: the device's half, frozen.
        params: by name: `text_encoder`, `text_encoder_2`, `unet`, `vae_encoder`, `vae_decoder`. A distilled
            backbone also has `student`, the few-step U-Net, and `decoders`, a dict of the distilled decoders
            by name (`meg`, `split_finetune`, ...); `gate` tells MEG-Pruning what to send.
        tokenizers: one for each text encoder.
        schedule: the noise schedule.
        flow: what the student follows.
        thin: networks of the distilled decoders that are not of `vae_decoder`'s width, by name.
    """

    name: str
    text_encoders: tuple[Network, Network]
    unet: Network
    vae_encoder: Network
    vae_decoder: Network
    params: dict[str, Any]
    tokenizers: tuple[CLIPTokenizer, ...]
    schedule: Schedule
    flow: Flow = dataclasses.field(default_factory=Flow)
    thin: Mapping[str, Network] = dataclasses.field(default_factory=dict)

    @property
    def image_size(self) -> int:
        """Side of the pictures it was made for; pixels."""
        return self.unet.config.sample_size * self.vae_decoder.config.downsampling

    @property
    def device_decoder(self) -> Params:
        """Parameters of the decoder that the device runs: the distilled one, if there is one."""
        return self.params.get("decoders", {}).get("meg", self.params["vae_decoder"])

    def decoder_of(self, params: Params) -> Network:
        """The network of a decoder's parameters, by their shapes."""
        for network in self.thin.values():
            if _shapes(network.shapes) == _shapes(params):
                return network
        return self.vae_decoder


def release(pipeline: Pipeline, *kept: str) -> None:
    """Free the memory of a pipeline's parameters, all but those of `kept`.

    A trainer's own copies are cut over the devices, the loaded ones lie whole on the first; and what was
    compiled for a pipeline holds it to the end.
    """
    for name in pipeline.params.keys() - set(kept):
        del pipeline.params[name]


def open_backbone(model: str | Path, *, parts: Sequence[str] = weights.MODELS) -> weights.ModelFolder:
    """Find an embedded backbone, a folder or a hub id; see `megjax.weights.open_folder`."""
    return weights.open_folder(EMBEDDED.get(str(model), model), parts=parts)


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
    folder = open_backbone(model)
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
    _check_widths(str(model), networks, vae)
    # Before the weights, which take minutes: the schedule may be of another kind.
    noise = read_schedule(folder.path / "scheduler" / "scheduler_config.json")
    flow = read_flow(folder.path / STUDENT)
    tokenizers = load_tokenizers(folder.path)
    _check_tokenizers(str(model), networks, tokenizers)

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
    thin: dict[str, Network] = {}
    if (folder.path / DECODERS).is_dir():
        # A write that was killed leaves a hidden folder.
        names = sorted(p.name for p in (folder.path / DECODERS).glob("[!.]*") if p.is_dir())
        own = {name: distilled_decoder(folder.path / DECODERS / name, decoder, options) for name in names}
        params["decoders"] = {name: read(f"{DECODERS}/{name}", own[name].shapes) for name in names}
        thin = {name: network for name, network in own.items() if network is not decoder}
    if (folder.path / GATE).is_file():
        side = networks["unet"].config.sample_size
        params["gate"] = read_gate(folder.path / GATE, side * side * vae.latent_channels)
    return Pipeline(
        name=str(model),
        text_encoders=(networks["text_encoder"], networks["text_encoder_2"]),
        unet=networks["unet"],
        vae_encoder=encoder,
        vae_decoder=decoder,
        params=params,
        tokenizers=tokenizers,
        schedule=noise,
        flow=flow,
        thin=thin,
    )


def distilled_decoder(folder: Path, frozen: Network, options: Options = Options()) -> Network:
    """The network of a distilled decoder: the frozen one's, or one of its own width.

    Args:
        folder: its config and weights.
        frozen: the backbone's decoder.
        options: how it computes.

    Raises:
        WeightsError: no config, or one of other latents or pictures.
    """
    config = read_config(VAEConfig, folder / "config.json")
    network = vae_decoder(config, options)
    if _shapes(network.shapes) == _shapes(frozen.shapes):
        return frozen
    sides = [(c.latent_channels, c.downsampling) for c in (config, frozen.config)]
    if sides[0] != sides[1]:
        raise WeightsError(
            f"{folder}: a decoder of {sides[0][0]} latent channels, {sides[0][1]} pixels each, does not fit "
            f"an autoencoder of {sides[1][0]}, {sides[1][1]}"
        )
    return network


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda p: p.shape, params)


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


def read_gate(path: Path, size: int | None = None) -> Params:
    """Read MEG-Pruning's gate, `megjax.distill.pruning.init_gate`.

    Args:
        path: of the file.
        size: values of a latent; None takes what the file has.

    Raises:
        WeightsError: a file that is damaged, or no gate of that size.
    """
    tensors = formats.tensors(path)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    hidden = next(iter(found.get("in/bias", ())), 1)
    size = next(iter(found.get("out/bias", ())), 1) if size is None else size
    expected = {
        "in/kernel": (1, hidden),
        "in/bias": (hidden,),
        "out/kernel": (hidden, size),
        "out/bias": (size,),
    }
    if found != expected:
        raise WeightsError(
            f"{path}: holds {found}; expected {expected}: distil MEG-Pruning for this backbone"
        )
    return unflatten_dict({tuple(name.split("/")): jnp.asarray(t.read()) for name, t in tensors.items()})


def _check_widths(model: str, networks: dict[str, Network], vae: VAEConfig) -> None:
    text, text_2, unet = (networks[part].config for part in ("text_encoder", "text_encoder_2", "unet"))
    if not text_2.with_projection:
        raise WeightsError(f"{model}: text_encoder_2 must be a CLIPTextModelWithProjection")
    width = text.hidden_size + text_2.hidden_size
    if width != unet.cross_attention_dim or text_2.projection_dim != unet.pooled_dim:
        raise WeightsError(
            f"{model}: text encoders of width {width}, pooled {text_2.projection_dim}, do not fit a U-Net "
            f"with cross_attention_dim {unet.cross_attention_dim} and pooled width {unet.pooled_dim}"
        )
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise WeightsError(
            f"{model}: a U-Net from {unet.in_channels} channels to {unet.out_channels} does not fit a VAE of "
            f"{vae.latent_channels} latent channels; inpainting and other such models are not supported"
        )


def _check_tokenizers(
    model: str, networks: dict[str, Network], tokenizers: tuple[CLIPTokenizer, ...]
) -> None:
    """Token ids and positions that an encoder lacks would be embedded as NaN."""
    parts = ("text_encoder", "text_encoder_2")
    if len(tokenizers) != len(parts):
        raise WeightsError(f"{model}: has no tokenizer_2; each of the two text encoders needs its own")
    for part, tokenizer in zip(parts, tokenizers, strict=True):
        encoder = networks[part].config
        ids = 1 + max(tokenizer.get_vocab().values())
        length = tokenizer.model_max_length
        if ids > encoder.vocab_size or length > encoder.max_position_embeddings:
            raise WeightsError(
                f"{model}: the tokenizer of {part} has {ids} ids and texts of {length} tokens, its encoder "
                f"vocab_size {encoder.vocab_size} and max_position_embeddings "
                f"{encoder.max_position_embeddings}; they belong to different models"
            )

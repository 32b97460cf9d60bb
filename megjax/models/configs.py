"""Model configurations, read from the `config.json` files of the diffusers/transformers layout."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from megjax.errors import MegError, WeightsError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """`UNet2DConditionModel` with SDXL's text-time conditioning; field names are diffusers'."""

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 128
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    layers_per_block: int = 2
    transformer_layers_per_block: tuple[int, ...] = (1, 2, 10)
    # diffusers' misnomer: the number of heads of each block, not their size.
    attention_head_dim: tuple[int, ...] = (5, 10, 20)
    cross_attention_dim: int = 2048
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 2816
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    use_linear_projection: bool = True

    CLASS_NAMES: ClassVar[tuple[str, ...]] = ("UNet2DConditionModel", "FlaxUNet2DConditionModel")
    ONLY: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
    }
    GIVEN: ClassVar[tuple[str, ...]] = ("addition_embed_type", "attention_head_dim", "use_linear_projection")

    def __post_init__(self) -> None:
        _check_fields(self)
        blocks = len(self.block_out_channels)
        for name in (
            "down_block_types",
            "up_block_types",
            "transformer_layers_per_block",
            "attention_head_dim",
        ):
            if len(getattr(self, name)) != blocks:
                raise MegError(
                    f"UNetConfig: {name} has {len(getattr(self, name))} entries, block_out_channels has "
                    f"{blocks}; give one entry a block"
                )
        _one_of("down_block_types", self.down_block_types, ("DownBlock2D", "CrossAttnDownBlock2D"))
        _one_of("up_block_types", self.up_block_types, ("UpBlock2D", "CrossAttnUpBlock2D"))
        for channels, heads in zip(self.block_out_channels, self.attention_head_dim, strict=True):
            if channels % self.norm_num_groups or channels % heads:
                raise MegError(
                    f"UNetConfig: block_out_channels {channels} must be a multiple of norm_num_groups "
                    f"{self.norm_num_groups} and of its attention_head_dim (heads) {heads}"
                )
        for level, depth in enumerate(self.transformer_layers_per_block):
            around = self.down_block_types[level] + self.up_block_types[-1 - level]
            if depth == 0 and ("CrossAttn" in around or level == blocks - 1):
                raise MegError(
                    f"UNetConfig: transformer_layers_per_block {self.transformer_layers_per_block} is 0 at a "
                    "block with cross-attention; give it at least 1"
                )
        for name, width in (
            ("block_out_channels[0]", self.block_out_channels[0]),
            ("addition_time_embed_dim", self.addition_time_embed_dim),
        ):
            if width % 2 or width <= 2 * self.freq_shift:
                raise MegError(
                    f"UNetConfig: {name} {width} must be even and above 2 freq_shift = {2 * self.freq_shift}"
                )
        if self.pooled_dim < 1:
            raise MegError(
                f"UNetConfig: projection_class_embeddings_input_dim "
                f"{self.projection_class_embeddings_input_dim} must be above 6 addition_time_embed_dim = "
                f"{6 * self.addition_time_embed_dim}"
            )

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text embedding: what the six size embeddings leave of the added embedding."""
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """`AutoencoderKL`; field names are diffusers'."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    sample_size: int = 1024
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    CLASS_NAMES: ClassVar[tuple[str, ...]] = ("AutoencoderKL", "FlaxAutoencoderKL")
    ONLY: ClassVar[dict[str, Any]] = {"act_fn": "silu", "shift_factor": None}
    GIVEN: ClassVar[tuple[str, ...]] = ("scaling_factor",)

    def __post_init__(self) -> None:
        _check_fields(self)
        if (self.latents_mean is None) != (self.latents_std is None):
            raise MegError("VAEConfig: latents_mean and latents_std go together; give both or neither")
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.latent_channels:
                raise MegError(
                    f"VAEConfig: {name} has {len(value)} entries, latent_channels is {self.latent_channels}"
                )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise MegError(
                    f"VAEConfig: block_out_channels {channels} is no multiple of norm_num_groups "
                    f"{self.norm_num_groups}"
                )

    @property
    def downsampling(self) -> int:
        """Pixels a side for one latent pixel: 8 for SDXL."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """`CLIPTextModel` and `CLIPTextModelWithProjection`; field names are transformers'."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    eos_token_id: int = 2
    with_projection: bool = False

    CLASS_NAMES: ClassVar[tuple[str, ...]] = (
        "CLIPTextModel",
        "FlaxCLIPTextModel",
        "CLIPTextModelWithProjection",
        "FlaxCLIPTextModelWithProjection",
    )
    ONLY: ClassVar[dict[str, Any]] = {}
    GIVEN: ClassVar[tuple[str, ...]] = ("num_attention_heads",)

    def __post_init__(self) -> None:
        _check_fields(self)
        _one_of("hidden_act", (self.hidden_act,), ("quick_gelu", "gelu"))
        if self.num_hidden_layers < 2:
            raise MegError(
                f"CLIPTextConfig: num_hidden_layers {self.num_hidden_layers}; at least 2 are needed, since "
                "the U-Net is conditioned on the last layer but one"
            )
        if self.hidden_size % self.num_attention_heads:
            raise MegError(
                f"CLIPTextConfig: hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


_VAE_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


_FROM_0 = ("integers from 0 on", lambda x: _is_whole(x) and x >= 0)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("true or false", lambda x: isinstance(x, bool)),
    "str": ("strings", lambda x: isinstance(x, str)),
    "int": ("integers from 1 on", lambda x: _is_whole(x) and x > 0),
    "float": ("finite numbers above 0", lambda x: _is_number(x) and x > 0),
    # By name:
    "eos_token_id": _FROM_0,
    "freq_shift": _FROM_0,
    "transformer_layers_per_block": _FROM_0,
    "latents_mean": ("finite numbers", _is_number),
}


def _check_fields(config: Any) -> None:
    """Refuse what a `config.json` may hold in a field's place: null, 0, a list for a number."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind, _, optional = str(field.type).partition(" | ")
        if optional and value is None:
            continue
        several = kind.startswith("tuple")
        one = kind.removeprefix("tuple[").removesuffix(", ...]")
        allowed, fits = _KINDS.get(field.name, _KINDS[one])
        values = value if several else (value,)
        if not isinstance(values, tuple) or not values or not all(map(fits, values)):
            raise MegError(
                f"{type(config).__name__}: {field.name} = {value!r} is not supported; only "
                f"{'lists of ' if several else ''}{allowed} are"
            )


def _one_of(name: str, values: tuple[Any, ...], allowed: tuple[Any, ...]) -> None:
    for value in values:
        if value not in allowed:
            raise MegError(f"{name}: {value!r} is not supported; allowed: {', '.join(map(str, allowed))}")


def check_only(raw: Mapping[str, Any], only: Mapping[str, Any], origin: str) -> None:
    """Raise `WeightsError` for a field that has another value than the implemented one.

    Args:
        raw: a parsed config; a field that it lacks has the implemented value.
        only: the implemented value of each field; null and false both mean that it is off.
        origin: what the error names.
    """
    for name, value in only.items():
        found = raw.get(name, value)
        if found != value and not (found in (None, False) and value in (None, False)):
            raise WeightsError(f"{origin}: {name} = {found!r} is not supported; only {value!r} is")


def from_dict(cls: type[Config], raw: Mapping[str, Any], *, origin: str = "config.json") -> Config:
    """Build a configuration from a parsed `config.json`, ignoring fields that change nothing here.

    Raises `WeightsError` for another model's class and for a value that this implementation does not have:
    what it cannot compute exactly it does not load.
    """
    names = raw.get("architectures") or [raw.get("_class_name")]
    if not any(name in cls.CLASS_NAMES for name in names):  # type: ignore[attr-defined]
        raise WeightsError(
            f"{origin}: class {', '.join(map(str, names))}; expected one of {', '.join(cls.CLASS_NAMES)}"  # type: ignore[attr-defined]
        )
    check_only(raw, cls.ONLY, origin)  # type: ignore[attr-defined]
    if missing := [name for name in cls.GIVEN if name not in raw]:  # type: ignore[attr-defined]
        # There the libraries' defaults are not SDXL's, and no tensor's shape would tell.
        raise WeightsError(f"{origin}: lacks {', '.join(missing)}; write the model's own values there")
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in fields
    }
    if cls is UNetConfig:
        # diffusers allows one number for all blocks.
        blocks = len(kwargs.get("block_out_channels", UNetConfig.block_out_channels))
        for name in ("transformer_layers_per_block", "attention_head_dim"):
            if isinstance(value := kwargs.get(name), int):
                kwargs[name] = (value,) * blocks
    if cls is CLIPTextConfig:
        kwargs["with_projection"] = any(str(name).endswith("WithProjection") for name in names)
    try:
        config = cls(**kwargs)
    except (MegError, TypeError) as error:
        raise WeightsError(f"{origin}: {error}") from None
    if isinstance(config, VAEConfig):
        blocks = len(config.block_out_channels)
        check_only(raw, {name: [block] * blocks for name, block in _VAE_BLOCKS.items()}, origin)
    return config


def to_dict(config: UNetConfig | VAEConfig | CLIPTextConfig) -> dict[str, Any]:
    """Return what `config.json` holds for this configuration; PyTorch diffusers and transformers load it."""
    raw = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    if isinstance(config, CLIPTextConfig):
        projected = raw.pop("with_projection")
        name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        return {"architectures": [name], "model_type": "clip_text_model", **raw}
    if isinstance(config, VAEConfig):
        blocks = len(config.block_out_channels)
        raw |= {name: [block] * blocks for name, block in _VAE_BLOCKS.items()}
    supported = {k: v for k, v in config.ONLY.items() if v is not None}
    return {"_class_name": config.CLASS_NAMES[0], **raw, **supported}


def read(cls: type[Config], path: str | Path) -> Config:
    """Read a component's `config.json`; raises `WeightsError` if it is missing, no JSON or another class."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; a model folder has one config.json a component") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return from_dict(cls, raw, origin=str(path))


CLIP_BIG_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
    with_projection=True,
)
"""SDXL's second text encoder; its first is `CLIPTextConfig()`."""

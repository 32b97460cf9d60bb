"""Write a backbone as a folder in diffusers layout, which PyTorch diffusers loads too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import DTypeLike

from megjax import weights
from megjax.diffusion import Schedule
from megjax.files import replacing_folder
from megjax.models import CLIPTextConfig, Params, UNetConfig, VAEConfig, to_dict

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": False,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_pipeline(
    folder: str | Path,
    configs: Mapping[str, UNetConfig | VAEConfig | CLIPTextConfig],
    params: Mapping[str, Params],
    *,
    schedule: Schedule,
    write_tokenizer: Callable[[Path], None],
    dtype: DTypeLike,
) -> None:
    """Write all parts, first beside `folder`, then in its place: a reader never sees half of it.

    Args:
        folder: replaced if it exists.
        configs: of `text_encoder`, `text_encoder_2`, `unet` and `vae`.
        params: of `text_encoder`, `text_encoder_2`, `unet`, `vae_encoder` and `vae_decoder`.
        schedule: the noise schedule; scaled-linear with SDXL's betas.
        write_tokenizer: writes one tokenizer's files into a folder; both are the same.
        dtype: of the stored weights.
    """
    with replacing_folder(Path(folder)) as temporary:
        parts = {**params, "vae": {**params["vae_encoder"], **params["vae_decoder"]}}
        for part, config in configs.items():
            stored = jax.tree.map(lambda p: p.astype(dtype), parts[part])
            weights.save(temporary / part, stored, to_dict(config))
        for part in ("tokenizer", "tokenizer_2"):
            (temporary / part).mkdir()
            write_tokenizer(temporary / part)
        _write_json(temporary / "scheduler" / "scheduler_config.json", _scheduler(schedule))
        _write_json(temporary / "model_index.json", INDEX)


def _scheduler(schedule: Schedule) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "num_train_timesteps": len(schedule.abar),
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": schedule.offset,
        "timestep_spacing": schedule.spacing,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")

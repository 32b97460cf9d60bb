"""Writes references.npz: what PyTorch diffusers 0.39 and transformers compute for the cases.

Run from the repository's root, with the extra `parity`: `python -m tests.models.make_references`.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from megjax import weights
from megjax.models import clip_text, to_dict, unet, vae_decoder, vae_encoder
from tests.models import cases

GUIDANCE, STEPS = 5.0, 8


def torch_model(cls, config, params):
    """The PyTorch model with these parameters, by way of a folder that MegJAX writes."""
    with tempfile.TemporaryDirectory() as folder:
        weights.save(Path(folder), params, to_dict(config))
        return cls.from_pretrained(folder).eval()


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x):
    return np.moveaxis(x.numpy(), 1, -1)


def torch_unet(config, size):
    """Noise prediction, and the end of an 8-step guided DDIM trajectory from the same latents."""
    model = torch_model(UNet2DConditionModel, config, cases.random_params(unet(config).shapes))
    z, t, text, pooled, sizes = cases.unet_inputs(config, size)
    text, pooled, sizes = map(torch.from_numpy, (text, pooled, sizes))

    def call(z, t, text, pooled, sizes):
        added = {"text_embeds": pooled, "time_ids": sizes}
        return model(z, t, text, added_cond_kwargs=added).sample

    eps = nhwc(call(nchw(z), torch.from_numpy(t), text, pooled, sizes))

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    latents = nchw(z)
    empty = (torch.zeros_like(text), torch.zeros_like(pooled), sizes)
    for t in scheduler.timesteps:
        eps_u, eps_c = (call(latents, t, *c) for c in (empty, (text, pooled, sizes)))
        latents = scheduler.step(eps_u + GUIDANCE * (eps_c - eps_u), t, latents).prev_sample
    return {"eps": eps, "ddim": nhwc(latents)}


def torch_vae(config, size):
    """Mean and standard deviation of the normalised latents, and pictures in [0, 1]."""
    shapes = {**vae_encoder(config).shapes, **vae_decoder(config).shapes}
    model = torch_model(AutoencoderKL, config, cases.random_params(shapes))
    z, image = cases.vae_inputs(config, size)
    mean = np.array(config.latents_mean or 0.0)
    scale = config.scaling_factor / np.array(config.latents_std or 1.0)
    latents = model.encode(nchw(2 * image - 1)).latent_dist
    decoded = model.decode(nchw((z / scale + mean).astype(np.float32))).sample
    return {
        "mean": (nhwc(latents.mean) - mean) * scale,
        "std": nhwc(latents.std) * scale,
        "image": nhwc(decoded) / 2 + 0.5,
    }


def torch_text(config):
    """Penultimate hidden state and pooled output."""
    cls = CLIPTextModelWithProjection if config.with_projection else CLIPTextModel
    model = torch_model(cls, config, cases.random_params(clip_text(config).shapes))
    out = model(torch.from_numpy(cases.text_inputs(config)), output_hidden_states=True)
    pooled = out.text_embeds if config.with_projection else out.pooler_output
    return {"penultimate": out.hidden_states[-2].numpy(), "pooled": pooled.numpy()}


def block_of(model, path):
    """A submodule by its path; some versions of transformers hold `text_model`'s parts themselves."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model.get_submodule(path.removeprefix("text_model."))


@torch.no_grad()
def blocks():
    """What the blocks of `cases.BLOCKS` are given and what they return, NHWC, as the whole networks run."""
    unet_config, unet_size = cases.UNETS["odd"]
    vae_config, vae_size = cases.VAES["normalised"]
    text_config = cases.TEXTS["bigg_small"]
    z, t, text, pooled, sizes = map(torch.from_numpy, cases.unet_inputs(unet_config, unet_size))
    latents, image = (nchw(x) for x in cases.vae_inputs(vae_config, vae_size))
    vae_shapes = {**vae_encoder(vae_config).shapes, **vae_decoder(vae_config).shapes}
    models = {
        "unet": torch_model(UNet2DConditionModel, unet_config, cases.random_params(unet(unet_config).shapes)),
        "vae": torch_model(AutoencoderKL, vae_config, cases.random_params(vae_shapes)),
        "text": torch_model(
            CLIPTextModelWithProjection, text_config, cases.random_params(clip_text(text_config).shapes)
        ),
    }
    seen = {}

    def record(name, count):
        def hook(module, args, kwargs, output):
            named = [kwargs.get(key) for key in ("hidden_states", "temb", "encoder_hidden_states")]
            inputs = [x for x in (*args, *named) if torch.is_tensor(x)][:count]
            output = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, ([as_ours(x) for x in inputs], as_ours(output)))

        return hook

    for name, count in cases.BLOCKS.items():
        kind, path = name.split("/")
        block_of(models[kind], path).register_forward_hook(record(name, count), with_kwargs=True)
    added = {"text_embeds": pooled, "time_ids": sizes}
    models["unet"](nchw(z.numpy()), t, text, added_cond_kwargs=added)
    models["vae"].encode(image)
    models["vae"].decode(latents)
    models["text"](torch.from_numpy(cases.text_inputs(text_config)))
    return seen


def as_ours(x):
    return nhwc(x) if x.ndim == 4 else x.numpy()


@torch.no_grad()
def references():
    """All of them, by the name of the case and of the output."""
    found = {}
    for name, (config, size) in cases.UNETS.items():
        found |= {f"unet/{name}/{k}": v for k, v in torch_unet(config, size).items()}
    for name, (config, size) in cases.VAES.items():
        found |= {f"vae/{name}/{k}": v for k, v in torch_vae(config, size).items()}
    for name, config in cases.TEXTS.items():
        found |= {f"text/{name}/{k}": v for k, v in torch_text(config).items()}
    return {k: v.astype(np.float32) for k, v in found.items()}


if __name__ == "__main__":
    np.savez_compressed(cases.REFERENCES, **references())

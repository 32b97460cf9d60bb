"""PeRFlow on a network that compiles in a moment, or on a small U-Net."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from megjax.diffusion import Conditioning, schedule
from megjax.distill.student_loss import Batch, perflow_loss
from megjax.models import time_ids, unet
from tests.small import CONFIG

SIDE, TEXT, LENGTH = 8, 32, 4
UNET = dataclasses.replace(CONFIG.unet, block_out_channels=(16, 32), sample_size=SIDE)


def mlp(params, z, t, text, pooled, sizes, token_merge=None):
    """A noise predictor; its first matrix is large enough to be cut."""
    x = z.reshape(len(z), -1)
    hidden = jnp.tanh(x @ params["in"]["kernel"] + text.mean(1) @ params["text"]["kernel"])
    hidden = hidden * (1 + t[:, None] / 1000)
    return (0.3 * x + hidden @ params["out"]["kernel"]).reshape(z.shape)


def init(network, seed=0):
    key = jax.random.key(seed)
    if network == "unet":
        return unet(UNET).init(key)
    size, width = SIDE * SIDE * 4, 64

    def matrix(i, rows, columns):
        return {"kernel": jax.random.normal(jax.random.fold_in(key, i), (rows, columns)) / rows**0.5}

    return {"in": matrix(0, size, width), "text": matrix(1, TEXT, width), "out": matrix(2, width, size)}


def loss(network):
    """Over `Inputs`: rows, and the teacher's parameters."""
    call = unet(UNET) if network == "unet" else mlp
    own = perflow_loss(call, schedule(), guidance=2.0, solver_steps=3)

    def of_inputs(params, key, inputs):
        data, teacher = inputs
        B = len(data["z0"])
        prompt = Conditioning(data["text"], data["pooled"], time_ids(64, 64, B))
        empty = jax.tree.map(jnp.zeros_like, prompt)._replace(sizes_Bx6=prompt.sizes_Bx6)
        return own(params, key, Batch(teacher, data["z0"], prompt, empty))

    return of_inputs


class Rows:
    """Random latents and embeddings, each a function of its number."""

    def __init__(self, network):
        self.width = UNET.cross_attention_dim if network == "unet" else TEXT

    def __len__(self):
        return 100

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        return {
            "z0": rng.normal(size=(SIDE, SIDE, 4)).astype(np.float32),
            "text": rng.normal(size=(LENGTH, self.width)).astype(np.float32),
            "pooled": rng.normal(size=UNET.pooled_dim).astype(np.float32),
        }


def rows(network):
    return Rows(network)

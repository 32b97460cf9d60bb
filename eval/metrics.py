"""How far a picture is from its reference: MSE, PSNR, SSIM and captions; LPIPS, FID and CLIP score as extras.

All take pictures in [0, 1] and compute in float32. The extras need weights that do not ship with the package;
without them they raise a `MegError` that names what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float

from eval.captions import check, parse_caption
from megjax.data.render import SIDE
from megjax.errors import MegError

Pictures = Float[np.ndarray, "P H W 3"]


def mse(images: Pictures, references: Pictures) -> Float[np.ndarray, " P"]:
    """Return the mean squared error of each picture."""
    _check(images, references)
    error = images.astype(np.float32) - references.astype(np.float32)
    return np.asarray(np.mean(np.square(error), axis=(1, 2, 3), dtype=np.float64))


def psnr_db(mse: Float[np.ndarray, "*s"] | float) -> Any:
    """Return the peak signal-to-noise ratio of pictures in [0, 1]: -10 log10 MSE; infinite for none."""
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(mse)


def ssim(images: Pictures, references: Pictures) -> Float[np.ndarray, " P"]:
    """Return the structural similarity of each picture (Wang et al. 2004), by dm-pix."""
    _check(images, references)
    return np.asarray(_ssim(jnp.asarray(images, jnp.float32), jnp.asarray(references, jnp.float32)))


_ssim = jax.jit(dm_pix.ssim)


def captions_right(images: Pictures, prompts: Sequence[str]) -> Bool[np.ndarray, " P"] | None:
    """Return which pictures show all that their captions say; None unless they are captions of `scenes`."""
    if images.shape[1:3] != (SIDE, SIDE):
        return None
    try:
        for prompt in set(prompts):
            parse_caption(prompt)
    except MegError:
        return None
    return check(np.asarray(images, np.float32), list(prompts)).right_B


def lpips(images: Pictures, references: Pictures, net: str = "alex") -> Float[np.ndarray, " P"]:
    """Return the learned perceptual distance (Zhang et al. 2018), by the package `lpips`.

    Raises:
        MegError: without torch and lpips, or the weights of torchvision's AlexNet (or `net`).
    """
    _check(images, references)
    need = f"LPIPS needs `pip install torch lpips` and torchvision's weights of {net!r}, fetched on first use"
    try:
        import lpips as package  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]

        model = package.LPIPS(net=net, verbose=False)
    except Exception as error:  # no package, no network, no disk: whatever it is, this is what it needs
        raise MegError(f"{need} ({error})") from None
    with torch.no_grad():
        pair = [torch.as_tensor(np.moveaxis(2.0 * x - 1.0, 3, 1).copy()) for x in (images, references)]
        return model(*pair).reshape(-1).numpy()


def frechet_distance(features: Float[np.ndarray, "P D"], references: Float[np.ndarray, "Q D"]) -> float:
    """Return the Frechet distance of two Gaussians fitted to features: |m - n|^2 + tr(A + B - 2 (AB)^0.5).

    Raises:
        MegError: fewer than two of either.
    """
    if min(len(features), len(references)) < 2:
        raise MegError(f"FID of {len(features)} and {len(references)} pictures: at least two of each")
    m, n = features.mean(axis=0), references.mean(axis=0)
    a, b = (np.cov(x, rowvar=False) for x in (features, references))
    root = scipy.linalg.sqrtm(a @ b)
    return float(np.sum((m - n) ** 2) + np.trace(a + b - 2.0 * np.real(root)))


def fid(images: Pictures, references: Pictures, weights: Path) -> float:
    """Return the Frechet Inception distance (Heusel et al. 2017), features by a TorchScript Inception.

    Args:
        images, references: of any number; thousands, for a meaningful figure.
        weights: `inception-2015-12-05.pt`, NVIDIA's TorchScript file of the original network.

    Raises:
        MegError: without torch or that file.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]

        network = torch.jit.load(str(weights)).eval()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise MegError(
            f"FID needs `pip install torch` and inception-2015-12-05.pt, not {weights} ({error})"
        ) from None

    def features(x: Pictures) -> np.ndarray:
        pixels = np.moveaxis(np.round(np.clip(x, 0, 1) * 255), 3, 1).astype(np.uint8)
        with torch.no_grad():
            parts = [
                network(torch.as_tensor(p), return_features=True) for p in np.array_split(pixels, len(x))
            ]
        return torch.cat(parts).numpy()

    return frechet_distance(features(images), features(references))


def clip_score(
    images: Pictures, prompts: Sequence[str], model: str = "openai/clip-vit-base-patch16"
) -> Float[np.ndarray, " P"]:
    """Return 100 times the cosine of picture and prompt, at least 0 (Hessel et al. 2021), by transformers.

    Args:
        images, prompts: one prompt a picture.
        model: a folder or hub id of CLIP's weights.

    Raises:
        MegError: without torch or the weights.
    """
    if len(images) != len(prompts):
        raise MegError(f"{len(images)} pictures, {len(prompts)} prompts: one a picture")
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import CLIPModel, CLIPProcessor

        network: Any = CLIPModel.from_pretrained(model)
        processor: Any = CLIPProcessor.from_pretrained(model)
    except Exception as error:  # no torch, no network, no such model
        raise MegError(
            f"the CLIP score needs `pip install torch` and the weights of {model} ({error})"
        ) from None
    pixels = [np.round(np.clip(x, 0, 1) * 255).astype(np.uint8) for x in images]
    inputs = processor(text=list(prompts), images=pixels, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        found = network(**inputs)
    pair = [x / x.norm(dim=-1, keepdim=True) for x in (found.image_embeds, found.text_embeds)]
    return np.maximum(100.0 * (pair[0] * pair[1]).sum(dim=-1).numpy(), 0.0)


def _check(images: Pictures, references: Pictures) -> None:
    if images.shape != references.shape or images.ndim != 4 or images.shape[-1] != 3:
        raise MegError(f"pictures of {images.shape} and references of {references.shape}: both (P, H, W, 3)")

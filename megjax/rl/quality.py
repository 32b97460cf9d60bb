"""What a picture sent with T steps, ratio r and a feature PSNR is worth: the MSE behind Eq. (22)'s reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from megjax.errors import MegError
from megjax.files import replacing

QualitySource: TypeAlias = Callable[
    [PRNGKeyArray, Float[Array, ""], Float[Array, ""], Float[Array, ""]], Float[Array, ""]
]
"""(key, steps, ratio, psnr_db) -> MSE against the reference, all scalars and traced.

The key draws what is random about a frame: the picture and the noise. An analytic surface, a measured table
and the live decoder are three such functions.
"""

Axis: TypeAlias = Sequence[float | int] | np.ndarray

EMBEDDED = {"tiny": Path(__file__).parent.parent / "assets" / "tiny" / "quality.npz"}
"""Tables that ship with the package."""


def analytic_mse(
    key: PRNGKeyArray, steps: Float[Array, ""], ratio: Float[Array, ""], psnr_db: Float[Array, ""]
) -> Float[Array, ""]:
    """Return the MSE of the reference problem `analytic`: 0.008 + 0.012 exp(-(T - 4) / 2.5) + 0.02 r^2."""
    return 0.008 + 0.012 * jnp.exp((4.0 - steps) / 2.5) + 0.02 * ratio**2


class Table(NamedTuple):
    """A quality source: draws a picture and interpolates its measured MSE, multilinear in log MSE.

    Log MSE, because the reward is: between two measured points the reward is then linear. Outside the axes'
    range the nearest edge is used.
    """

    log_mse_PxTxRxS: Float[np.ndarray, "P T R S"]
    """Of each picture at each step count, ratio and PSNR."""
    steps: Float[np.ndarray, " T"]
    ratios: Float[np.ndarray, " R"]
    psnrs_db: Float[np.ndarray, " S"]
    about: dict[str, Any]
    """How it was measured."""

    def __call__(
        self, key: PRNGKeyArray, steps: Float[Array, ""], ratio: Float[Array, ""], psnr_db: Float[Array, ""]
    ) -> Float[Array, ""]:
        """Return the MSE of a picture drawn by `key`."""
        table = jnp.asarray(self.log_mse_PxTxRxS, steps.dtype)
        picture = jax.random.randint(key, (), 0, table.shape[0])
        axes = zip((self.steps, self.ratios, self.psnrs_db), (steps, ratio, psnr_db), strict=True)
        places = [_place(axis, x) for axis, x in axes]
        sizes = [min(2, length) for length in table.shape[1:]]
        # The cell's corners in one slice: several times faster on CPUs than weights over whole axes.
        corners = jax.lax.dynamic_slice(table, (picture, *(i for i, _ in places)), (1, *sizes))[0]
        for _, weight in places:
            corners = corners[0] + weight * (corners[-1] - corners[0])
        return jnp.exp(corners)


def make_table(
    mse_PxTxRxS: np.ndarray | Array,
    steps: Axis,
    ratios: Axis,
    psnrs_db: Axis,
    about: dict[str, Any] | None = None,
) -> Table:
    """Return a table of measured MSEs as a quality source.

    Args:
        mse_PxTxRxS: MSE of each picture at each step count, ratio and PSNR; positive.
        steps, ratios, psnrs_db: the axes, increasing.
        about: how it was measured.

    Raises:
        MegError: axes that do not fit the table or do not increase, or an MSE that is not positive and
            finite.
    """
    axes = [np.asarray(axis, float) for axis in (steps, ratios, psnrs_db)]
    values = np.asarray(mse_PxTxRxS, float)
    expected = tuple(len(axis) for axis in axes)
    if values.ndim != 4 or values.shape[1:] != expected or not all(values.shape):
        raise MegError(f"quality table of shape {values.shape}: its axes need (pictures, *{expected})")
    if any(not np.all(np.isfinite(axis)) or np.any(np.diff(axis) <= 0) for axis in axes):
        raise MegError("quality table: steps, ratios and psnrs_db must each be finite and increase")
    if not np.all(np.isfinite(values) & (values > 0)):
        raise MegError("quality table: every MSE must be positive and finite")
    return Table(np.log(values), axes[0], axes[1], axes[2], about or {})


def mean_table(table: Table) -> Table:
    """Return the table whose only picture has the pictures' mean log MSE: the same mean reward, no draw."""
    return table._replace(log_mse_PxTxRxS=table.log_mse_PxTxRxS.mean(axis=0, keepdims=True))


def save_table(path: Path, table: Table) -> None:
    """Write a table as one .npz file, atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            mse=np.exp(table.log_mse_PxTxRxS).astype(np.float32),
            steps=table.steps,
            ratios=table.ratios,
            psnrs_db=table.psnrs_db,
            about=np.asarray(json.dumps(table.about)),
        )


def load_table(path: str | Path) -> Table:
    """Read a table that `python -m eval.quality_table` wrote, or the embedded `tiny`.

    Raises:
        MegError: the file is missing, damaged or something else.
    """
    path = EMBEDDED.get(str(path), Path(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            return make_table(file["mse"], file["steps"], file["ratios"], file["psnrs_db"], about)
    except MegError as error:
        raise MegError(f"{path}: {error}") from error
    except Exception as error:  # zipfile, zlib and numpy's header have an error class for each kind of damage
        raise MegError(f"{path} is not a quality table: {error}") from error


def decoded_mse(
    latents_PxTxHxWxC: Float[Array, "P T H W C"],
    reference_PxYxXx3: Float[Array, "P Y X 3"],
    steps: Axis,
    receive: Callable[[PRNGKeyArray, Array, Array, Array], Array],
    decode: Callable[[Array], Array],
) -> QualitySource:
    """Return the live decoder as a source: it draws a picture, sends its latent and decodes what arrives.

    Args:
        latents_PxTxHxWxC: of each picture after each of `steps` denoising steps.
        reference_PxYxXx3: the picture that each is compared with.
        steps: T of each latent; the nearest is sent.
        receive: (key, latents [1, H, W, C], ratio, psnr_db) -> what the device un-merges.
        decode: latents [1, H, W, C] -> pictures [1, Y, X, 3].
    """
    pictures, axis = len(latents_PxTxHxWxC), np.asarray(steps, float)

    def mse(key: PRNGKeyArray, steps: Array, ratio: Array, psnr_db: Array) -> Array:
        picture_key, link_key = jax.random.split(key)
        picture = jax.random.randint(picture_key, (), 0, pictures)
        index = jnp.argmin(jnp.abs(jnp.asarray(axis, steps.dtype) - steps))
        shown = decode(receive(link_key, latents_PxTxHxWxC[picture, index][None], ratio, psnr_db))[0]
        return jnp.mean((shown - reference_PxYxXx3[picture]) ** 2).astype(steps.dtype)

    return mse


def _place(axis: np.ndarray, x: Float[Array, ""]) -> tuple[Array, Array]:
    """Return the cell of `axis` that holds x, and how far in it x is; clamped to the ends."""
    if len(axis) == 1:
        return jnp.zeros((), jnp.int32), jnp.zeros((), x.dtype)
    points = jnp.asarray(axis, x.dtype)
    cell = jnp.sum(x >= points[1:-1], dtype=jnp.int32)
    low, high = points[cell], points[cell + 1]
    return cell, jnp.clip((x - low) / (high - low), 0.0, 1.0)

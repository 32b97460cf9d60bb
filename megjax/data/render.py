"""Pictures of scenes: signed distance functions, anti-aliased, in one jitted function."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from megjax.data.grammar import Scene
from megjax.errors import MegError

SIDE = 64  # pixels that a scene's lengths refer to
RADII = (7.5, 10.5, 14.0)  # of SIZES; no shape reaches further than its radius
INK = 0.4  # the second tone of a texture, as a multiple of the object's colour
STRIPE_PERIOD, DOT_PERIOD, CHECKER_PERIOD = 8.0, 6.0, 8.0
DOT_RADIUS = 1.8

COLOUR_RGB = np.array(
    [
        (0.89, 0.13, 0.16),  # red
        (1.00, 0.54, 0.05),  # orange
        (1.00, 0.87, 0.12),  # yellow
        (0.15, 0.66, 0.22),  # green
        (0.10, 0.80, 0.86),  # cyan
        (0.13, 0.31, 0.88),  # blue
        (0.52, 0.17, 0.70),  # purple
        (1.00, 0.45, 0.72),  # pink
    ],
    np.float32,
)
BACKGROUND_RGB = np.array(
    [
        (0.98, 0.98, 0.98),  # white
        (0.56, 0.57, 0.59),  # grey
        (0.07, 0.07, 0.09),  # black
        (0.91, 0.82, 0.66),  # beige
        (0.72, 0.92, 0.79),  # mint
        (0.79, 0.75, 0.95),  # lavender
    ],
    np.float32,
)


def _halfplane(x: Array, y: Array, degrees: float, distance: float) -> Array:
    """Signed distance to the line at `distance` from the origin, its normal at `degrees` from x towards y."""
    normal = np.deg2rad(degrees)
    return x * float(np.cos(normal)) + y * float(np.sin(normal)) - distance


def _circle(x: Array, y: Array) -> Array:
    return jnp.sqrt(x * x + y * y) - 0.95


def _square(x: Array, y: Array) -> Array:
    return jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.85


def _triangle(x: Array, y: Array) -> Array:
    x, y = jnp.abs(x), y - 0.17  # lowered: its box, not its centroid, sits at the centre
    return jnp.maximum(_halfplane(x, y, -30.0, 0.56), y - 0.56)


def _star(x: Array, y: Array) -> Array:
    """Five points: the plane folded onto the half of the upper one, then a single edge (inner radius 0.5)."""
    x, y = jnp.abs(x), 0.05 - y
    for normal in (np.exp(-0.2j * np.pi), -np.exp(0.2j * np.pi)):  # mirrors, as complex numbers
        c, s = float(normal.real), float(normal.imag)
        past = 2.0 * jnp.maximum(x * c + y * s, 0.0)
        x, y = x - past * c, y - past * s
    notch = 0.5 * np.exp(0.3j * np.pi)
    along = notch - 1j  # from the tip at 1j
    normal = 1j * along / abs(along)
    return jnp.abs(x) * float(normal.real) + y * float(normal.imag) - float(normal.imag)


def _cross(x: Array, y: Array) -> Array:
    x, y = jnp.abs(x), jnp.abs(y)
    return jnp.maximum(jnp.maximum(x, y) - 0.95, jnp.minimum(x, y) - 0.36)


def _heart(x: Array, y: Array) -> Array:
    """Two discs and the wedge between them and the tip, along their outer tangents."""
    x, y = jnp.abs(x) - 0.46, y + 0.36
    c, s = float(np.cos(np.deg2rad(42.0))), float(np.sin(np.deg2rad(42.0)))
    disc = jnp.sqrt(x * x + y * y) - 0.52
    below_tangent_point = jnp.maximum(x * s - y * c, -y)
    return jnp.minimum(disc, jnp.maximum(x * c + y * s - 0.52, below_tangent_point))


OUTLINES = (_circle, _square, _triangle, _star, _cross, _heart)
"""Signed distance of each of SHAPES from points (x, y) in units of its radius; y points down."""


def coverage(distance: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """How much of a pixel lies within an edge at a signed `distance` in pixels, negative inside."""
    return jnp.clip(0.5 - distance, 0.0, 1.0)


def _wave(t: Array, period: float) -> Array:
    """Distance to the nearest multiple of `period`."""
    return jnp.abs(t - period * jnp.round(t / period))


def tones(x: Float[Array, "*S"], y: Float[Array, "*S"], scale: float = 1.0) -> list[Float[Array, "*S"]]:
    """What each of TEXTURES multiplies an object's colour with.

    Args:
        x: distance to the right of the object's centre, in pixels of a 64 x 64 picture.
        y: distance below it.
        scale: the picture's pixels per pixel of a 64 x 64 picture.
    """
    stripes = STRIPE_PERIOD / 4 - _wave(y, STRIPE_PERIOD)
    dots = jnp.sqrt(_wave(x, DOT_PERIOD) ** 2 + _wave(y, DOT_PERIOD) ** 2) - DOT_RADIUS
    across, down = (CHECKER_PERIOD / 4 - _wave(t + CHECKER_PERIOD / 4, CHECKER_PERIOD) for t in (x, y))
    apart = jnp.minimum(jnp.abs(across), jnp.abs(down))
    checks = jnp.where((across < 0) == (down < 0), -apart, apart)
    inked = (1.0 - (1.0 - INK) * coverage(distance * scale) for distance in (stripes, dots, checks))
    return [jnp.ones_like(x), *inked]


@partial(jax.jit, static_argnames="size")
def render(scene: Scene, size: int = SIDE) -> Float[Array, "B H W 3"]:
    """Anti-aliased pictures with values in [0, 1].

    Args:
        scene: B scenes.
        size: side of the pictures in pixels; the scenes' lengths scale with it.

    Raises:
        MegError: size below 1.
    """
    if size < 1:
        raise MegError(f"picture size {size}: give at least 1 pixel")
    scale = size / SIDE
    (batch,) = scene.two.shape
    grid = (jnp.arange(size, dtype=jnp.float32) + 0.5) / scale
    full = (batch, 2, size, size)
    x = jnp.broadcast_to(grid[None, None, None, :] - scene.x[:, :, None, None], full)
    y = jnp.broadcast_to(grid[None, None, :, None] - scene.y[:, :, None, None], full)
    radius = jnp.broadcast_to(jnp.asarray(RADII, jnp.float32)[scene.size][:, :, None, None], full)
    which = [jnp.broadcast_to(index[:, :, None, None], full) for index in (scene.shape, scene.texture)]
    distance = jax.lax.select_n(which[0], *(outline(x / radius, y / radius) for outline in OUTLINES))
    present = jnp.stack([jnp.ones(batch, bool), scene.two], axis=1)[:, :, None, None]
    alpha = jnp.where(present, coverage(distance * radius * scale), 0.0)
    tone = jax.lax.select_n(which[1], *tones(x, y, scale))
    # Objects never overlap, so that each replaces its own part of the background.
    objects = jnp.einsum("bohw,boc->bhwc", alpha * tone, jnp.asarray(COLOUR_RGB)[scene.colour])
    rest_BxSxS = 1.0 - alpha.sum(axis=1)
    return objects + rest_BxSxS[..., None] * jnp.asarray(BACKGROUND_RGB)[scene.background][:, None, None, :]

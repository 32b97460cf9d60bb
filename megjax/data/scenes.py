"""`scenes`: endless, seeded, procedural pictures whose captions can be checked by their pixels."""

from functools import partial
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from megjax.data.grammar import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_COLOUR_SHAPE,
    HELD_OUT_COLOUR_TEXTURE,
    HELD_OUT_TEXTURE_SHAPE,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
)
from megjax.data.render import RADII, SIDE
from megjax.errors import MegError

Split: TypeAlias = Literal["train", "held_out", "all"]

GRID = (16.0, 32.0, 48.0)  # centres of the position words' rows and columns, in pixels
JITTER = 1.5  # of a lone object about its grid point, and of two related ones off their common line
MARGIN = 0.5  # from any object to the edge
GAP = 3.0  # between two objects, at least

# How often an attribute is named, in captions of one object and of two.
NAMES_SIZE = (0.6, 0.4)
NAMES_TEXTURE = (0.6, 0.4)
NAMES_BACKGROUND = (0.6, 0.5)
NAMES_POSITION = 0.8


def _held_out_tables() -> tuple[np.ndarray, np.ndarray]:
    """Which flat (shape, colour, texture) have a held-out pair, and which one that involves the texture."""
    plain, textured = (np.zeros((len(SHAPES), len(COLOURS), len(TEXTURES)), bool) for _ in range(2))
    for colour, shape in HELD_OUT_COLOUR_SHAPE:
        plain[SHAPES.index(shape), COLOURS.index(colour), :] = True
    for texture, shape in HELD_OUT_TEXTURE_SHAPE:
        textured[SHAPES.index(shape), :, TEXTURES.index(texture)] = True
    for colour, texture in HELD_OUT_COLOUR_TEXTURE:
        textured[:, COLOURS.index(colour), TEXTURES.index(texture)] = True
    return (plain | textured).ravel(), textured.ravel()


_HELD_OUT, _HELD_OUT_TEXTURE = _held_out_tables()


def _draw_kinds(key: PRNGKeyArray, two: Bool[Array, " B"], split: Split) -> Int[Array, "B 2"]:
    """Flat (shape, colour, texture) of both objects, which never agree in both shape and colour."""
    key_first, key_second, key_swap = jax.random.split(key, 3)
    everything, seen = np.ones_like(_HELD_OUT), ~_HELD_OUT
    allowed = {"train": seen, "held_out": _HELD_OUT, "all": everything}[split]
    first_B = jax.random.choice(key_first, jnp.asarray(np.flatnonzero(allowed), jnp.int32), two.shape)
    likeness_K = jnp.arange(len(_HELD_OUT), dtype=jnp.int32) // len(TEXTURES)
    alike_BxK = likeness_K[None, :] == likeness_K[first_B][:, None]
    allowed_K = jnp.asarray(seen if split == "train" else everything)
    second_B = jax.random.categorical(key_second, jnp.where(allowed_K[None, :] & ~alike_BxK, 0.0, -jnp.inf))
    pair_Bx2 = jnp.stack([first_B, second_B.astype(jnp.int32)], axis=1)
    swap_B = two & jax.random.bernoulli(key_swap, 0.5, two.shape)  # the held-out one may come second
    return jnp.where(swap_B[:, None], pair_Bx2[:, ::-1], pair_Bx2)


def _place_alone(key: PRNGKeyArray, position: Int[Array, " B"]) -> Float[Array, "B 2"]:
    """(x, y) of a lone object: its grid point, jittered."""
    grid = jnp.asarray(GRID, jnp.float32)
    point_Bx2 = jnp.stack([grid[position % 3], grid[position // 3]], axis=1)
    return point_Bx2 + jax.random.uniform(key, point_Bx2.shape, minval=-JITTER, maxval=JITTER)


def _place_related(
    key: PRNGKeyArray, relation: Int[Array, " B"], radius: Float[Array, "B 2"]
) -> Float[Array, "B 2 2"]:
    """(x, y) of two objects in a row or a column, apart by at least GAP along it."""
    key_along, key_line, key_off = jax.random.split(key, 3)
    (batch,) = relation.shape
    name = jnp.asarray([RELATIONS.index(r) for r in ("right of", "below", "above")])
    behind_B = (relation == name[0]) | (relation == name[1])  # object 0 has the larger coordinate
    upright_B = (relation == name[1]) | (relation == name[2])
    near_B, far_B = jnp.where(behind_B[:, None], radius[:, ::-1], radius).T
    slack_B = SIDE - 2 * MARGIN - GAP - 2 * (near_B + far_B)
    low_B, high_B = jnp.sort(jax.random.uniform(key_along, (batch, 2)), axis=1).T * slack_B[None, :]
    near_at_B = MARGIN + low_B + near_B
    far_at_B = MARGIN + high_B + 2 * near_B + GAP + far_B
    along_Bx2 = jnp.stack([near_at_B, far_at_B], axis=1)
    along_Bx2 = jnp.where(behind_B[:, None], along_Bx2[:, ::-1], along_Bx2)
    border_B = radius.max(axis=1) + MARGIN + JITTER
    line_B = border_B + jax.random.uniform(key_line, (batch,)) * (SIDE - 2 * border_B)
    off_Bx2 = line_B[:, None] + jax.random.uniform(key_off, (batch, 2), minval=-JITTER, maxval=JITTER)
    xy_Bx2x2 = jnp.stack([along_Bx2, off_Bx2], axis=2)
    return jnp.where(upright_B[:, None, None], xy_Bx2x2[:, :, ::-1], xy_Bx2x2)


@partial(jax.jit, static_argnames=("batch", "split"))
def sample_scenes(
    key: PRNGKeyArray, batch: int, split: Split = "train", two_objects: float | Array = 0.5
) -> Scene:
    """Draw scenes; the same key gives the same scenes.

    Args:
        key: a typed key.
        batch: how many.
        split: `train` has no held-out pair of attributes in any picture; each scene of `held_out` has one and
            names it; `all` draws every combination alike.
        two_objects: probability of a second object.

    Raises:
        MegError: an unknown split or a batch below 1.
    """
    if split not in get_args(Split) or batch < 1:
        raise MegError(f"split {split!r}, batch {batch}: give one of {get_args(Split)} and at least 1")
    keys = iter(jax.random.split(key, 12))

    def index(words: tuple[str, ...], *shape: int) -> Array:
        return jax.random.randint(next(keys), (batch, *shape), 0, len(words))

    def named(rates: tuple[float, float], *shape: int) -> Array:
        rate_B = jnp.where(two, rates[1], rates[0])
        return jax.random.uniform(next(keys), (batch, *shape)) < rate_B.reshape(batch, *(1 for _ in shape))

    two = jax.random.bernoulli(next(keys), two_objects, (batch,))
    kind = _draw_kinds(next(keys), two, split)
    size, position, relation = index(SIZES, 2), index(POSITIONS), index(RELATIONS)
    alone_Bx2 = _place_alone(next(keys), position)
    related_Bx2x2 = _place_related(next(keys), relation, jnp.asarray(RADII, jnp.float32)[size])
    xy_Bx2x2 = jnp.where(two[:, None, None], related_Bx2x2, alone_Bx2[:, None, :])
    names_texture = named(NAMES_TEXTURE, 2)
    if split == "held_out":
        names_texture |= jnp.asarray(_HELD_OUT_TEXTURE)[kind]
    return Scene(
        two=two,
        shape=kind // (len(COLOURS) * len(TEXTURES)),
        colour=kind // len(TEXTURES) % len(COLOURS),
        size=size,
        texture=kind % len(TEXTURES),
        x=xy_Bx2x2[:, :, 0],
        y=xy_Bx2x2[:, :, 1],
        position=position,
        relation=relation,
        background=index(BACKGROUNDS),
        names_size=named(NAMES_SIZE, 2),
        names_texture=names_texture,
        names_position=~two & named((NAMES_POSITION, 0.0)),
        names_background=named(NAMES_BACKGROUND),
    )

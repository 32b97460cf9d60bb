"""The closed grammar of `scenes`: its words, the record that a caption and a picture share, and the captions.

One-object captions place the object on a 3 x 3 grid, two-object captions relate two objects:

    a small striped red circle at the top left on a grey background
    a red circle left of a large dotted blue square

Colour, shape and relation are always named; size, texture, position and background only where the scene's
flags say so. What is not named is free. `an` stands before `orange`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "medium", "large")
TEXTURES = ("solid", "striped", "dotted", "checkered")
BACKGROUNDS = ("white", "grey", "black", "beige", "mint", "lavender")
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
RELATIONS = ("left of", "right of", "above", "below")

# 5 of the 104 pairs of colour, shape and texture. No object of the training split has one, named or not.
HELD_OUT_COLOUR_SHAPE = (("yellow", "heart"), ("purple", "square"))
HELD_OUT_TEXTURE_SHAPE = (("striped", "star"),)
HELD_OUT_COLOUR_TEXTURE = (("green", "dotted"), ("pink", "checkered"))

WORDS = tuple(
    dict.fromkeys(
        ("a", "an", "at", "the", "on", "background")
        + SIZES
        + TEXTURES
        + COLOURS
        + SHAPES
        + BACKGROUNDS
        + tuple(word for phrase in POSITIONS + RELATIONS for word in phrase.split())
    )
)
"""Every word of the grammar, once."""

MAX_WORDS = 16  # of a caption

ABSENT = -1  # an empty slot of `word_slots`


class Scene(NamedTuple):
    """A batch of scenes. Lengths are in pixels of a 64 x 64 picture, from its top left corner."""

    two: Bool[Array, " B"]  # whether there is a second object; if not, slot 1 of each pair means nothing
    shape: Int[Array, "B 2"]
    colour: Int[Array, "B 2"]
    size: Int[Array, "B 2"]
    texture: Int[Array, "B 2"]
    x: Float[Array, "B 2"]
    y: Float[Array, "B 2"]
    position: Int[Array, " B"]  # of a lone object
    relation: Int[Array, " B"]  # of object 0 to object 1
    background: Int[Array, " B"]
    names_size: Bool[Array, "B 2"]
    names_texture: Bool[Array, "B 2"]
    names_position: Bool[Array, " B"]
    names_background: Bool[Array, " B"]


def _word_ids(words: tuple[str, ...]) -> np.ndarray:
    return np.array([WORDS.index(word) if word else ABSENT for word in words], np.int32)


def _pairs(phrases: tuple[str, ...]) -> np.ndarray:
    return np.stack([_word_ids((*phrase.split(), "")[:2]) for phrase in phrases])


@jax.jit
def word_slots(scene: Scene) -> Int[Array, "B S"]:
    """The captions as indices into WORDS in a fixed number of slots, `ABSENT` where a caption skips one."""
    (batch,) = scene.two.shape
    one = ~scene.two

    def word(text: str, named: Bool[Array, " B"]) -> list[jax.Array]:
        return [jnp.where(named, WORDS.index(text), ABSENT)]

    def choice(table: np.ndarray, index: Int[Array, " B"], named: Bool[Array, " B"]) -> list[jax.Array]:
        columns = jnp.asarray(table.reshape(len(table), -1))[index]  # phrases have one word or two
        return [jnp.where(named, column, ABSENT) for column in columns.T]

    def thing(i: int, present: Bool[Array, " B"]) -> list[jax.Array]:
        size, texture = present & scene.names_size[:, i], present & scene.names_texture[:, i]
        an = (scene.colour[:, i] == COLOURS.index("orange")) & ~size & ~texture
        article = jnp.where(an, WORDS.index("an"), WORDS.index("a"))
        return [
            jnp.where(present, article, ABSENT),
            *choice(_word_ids(SIZES), scene.size[:, i], size),
            *choice(_word_ids(TEXTURES), scene.texture[:, i], texture),
            *choice(_word_ids(COLOURS), scene.colour[:, i], present),
            *choice(_word_ids(SHAPES), scene.shape[:, i], present),
        ]

    placed = one & scene.names_position
    slots = [
        *thing(0, jnp.ones(batch, bool)),
        *word("at", placed),
        *word("the", placed),
        *choice(_pairs(POSITIONS), scene.position, placed),
        *choice(_pairs(RELATIONS), scene.relation, scene.two),
        *thing(1, scene.two),
        *word("on", scene.names_background),
        *word("a", scene.names_background),
        *choice(_word_ids(BACKGROUNDS), scene.background, scene.names_background),
        *word("background", scene.names_background),
    ]
    return jnp.stack(slots, axis=1).astype(jnp.int32)


def captions(scene: Scene) -> list[str]:
    """The scenes' captions, at most MAX_WORDS words each."""
    return [" ".join(WORDS[i] for i in row if i != ABSENT) for row in np.asarray(word_slots(scene))]

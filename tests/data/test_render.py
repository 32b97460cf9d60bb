from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from megjax.data.grammar import SHAPES, Scene
from megjax.data.render import BACKGROUND_RGB, COLOUR_RGB, INK, OUTLINES, RADII, SIDE, render
from megjax.errors import MegError

GRID = np.stack(np.meshgrid(np.linspace(-1.1, 1.1, 223), np.linspace(-1.1, 1.1, 223)), axis=-1)


def one(**changes: int) -> Scene:
    """A red solid medium circle in the middle of a white picture, but for the changes."""
    flags, indices, middle = np.zeros((1, 2), bool), np.zeros((1, 2), int), np.full((1, 2), 32.0, np.float32)
    scene = Scene(
        two=flags[:, 0],
        shape=indices,
        colour=indices,
        size=indices,
        texture=indices,
        x=middle,
        y=middle,
        position=indices[:, 0],
        relation=indices[:, 0],
        background=indices[:, 0],
        names_size=flags,
        names_texture=flags,
        names_position=flags[:, 0],
        names_background=flags[:, 0],
    )
    changes = {"size": 1, **changes}
    return scene._replace(
        **{name: np.full_like(getattr(scene, name), value) for name, value in changes.items()}
    )


def in_polygon(corners: np.ndarray) -> np.ndarray:
    """Which points of GRID lie in a polygon, by the crossing number."""
    inside = np.zeros(GRID.shape[:2], bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        crosses = (y0 > GRID[..., 1]) != (y1 > GRID[..., 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (GRID[..., 0] < x0 + (GRID[..., 1] - y0) * (x1 - x0) / (y1 - y0))
    return inside


def in_disc(x: float, y: float, radius: float) -> np.ndarray:
    return np.hypot(GRID[..., 0] - x, GRID[..., 1] - y) < radius


def reference(shape: str) -> np.ndarray:
    """Which points of GRID lie in a shape, from its corners and discs."""
    turns = np.arange(10) * np.pi / 5
    star = np.where(np.arange(10) % 2, 0.5, 1.0)[:, None] * np.stack([np.sin(turns), -np.cos(turns)], 1)
    third = np.deg2rad([-90, 30, 150])
    touch = 0.52 * np.array([np.cos(np.deg2rad(42)), np.sin(np.deg2rad(42))])
    tip = 0.46 / np.tan(np.deg2rad(42)) + 0.52 / np.sin(np.deg2rad(42))
    a, b = 0.95, 0.36
    return {
        "circle": lambda: in_disc(0, 0, 0.95),
        "square": lambda: in_polygon(np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])),
        "triangle": lambda: in_polygon(1.12 * np.stack([np.cos(third), np.sin(third)], 1) + [0, 0.17]),
        "star": lambda: in_polygon(star + [0, 0.05]),
        "cross": lambda: in_polygon(
            np.array(
                [(b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b)]
                + [(-b, -b), (-b, -a), (b, -a), (b, -b), (a, -b), (a, b)]
            )
        ),
        "heart": lambda: (
            in_disc(0.46, -0.36, 0.52)
            | in_disc(-0.46, -0.36, 0.52)
            | in_polygon(
                np.array(
                    [
                        (-0.46, 0),
                        (0.46, 0),
                        (0.46 + touch[0], touch[1]),
                        (0, tip),
                        (-0.46 - touch[0], touch[1]),
                    ]
                )
                - [0, 0.36]
            )
        ),
    }[shape]()


@pytest.mark.parametrize("shape", SHAPES)
def test_outline_is_the_shape(shape: str):
    x, y = (jnp.asarray(GRID[..., i], jnp.float32) for i in range(2))
    distance = np.asarray(OUTLINES[SHAPES.index(shape)](x, y))
    clear = np.abs(distance) > 0.005
    np.testing.assert_array_equal((distance < 0)[clear], reference(shape)[clear])
    # No steeper than a true distance: edges are a pixel wide, or wider at corners.
    assert (
        max(np.abs(np.diff(distance, axis=i)).max() for i in range(2))
        <= (GRID[0, 1, 0] - GRID[0, 0, 0]) * 1.01
    )
    # Nothing reaches further than the radius along an axis, on which places rely.
    assert np.abs(GRID[distance < -0.005]).max() <= 1.0


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_area_survives_anti_aliasing(shape: int):
    difference = np.asarray(render(one(shape=shape))) - BACKGROUND_RGB[0]
    cover = difference[0, ..., 1] / (COLOUR_RGB[0] - BACKGROUND_RGB[0])[1]
    exact = reference(SHAPES[shape]).mean() * (2.2 * 224 / 223 * RADII[1]) ** 2 * (223 / 224) ** 2
    assert cover.sum() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("texture", "period", "share"),
    [(0, 8, 0.0), (1, 8, 0.5), (2, 6, np.pi * 1.8**2 / 36), (3, 8, 0.5)],
    ids=["solid", "striped", "dotted", "checkered"],
)
def test_textures_have_two_tones_in_their_shares(texture: int, period: int, share: float):
    colour, ink = COLOUR_RGB[3], COLOUR_RGB[3] * INK
    picture = np.asarray(render(one(shape=1, size=2, colour=3, texture=texture), size=512))[0]
    reach = 8 * period  # two periods of eight pixels a unit: within the large square
    middle = picture[256 - reach : 256 + reach, 256 - reach : 256 + reach].reshape(-1, 3)
    is_tone = [np.abs(middle - tone).max(axis=1) < 1e-4 for tone in (colour, ink)]
    assert (is_tone[0] | is_tone[1]).mean() > 0.85  # the rest are the edges between them
    assert np.mean((colour - middle) / (colour - ink)) == pytest.approx(share, abs=0.005)


def test_twice_the_pixels_average_to_the_picture(draw: Callable[..., Scene]):
    scene = draw(0, batch=32)
    double = np.asarray(render(scene, size=2 * SIDE)).reshape(32, SIDE, 2, SIDE, 2, 3).mean(axis=(2, 4))
    difference = double - np.asarray(render(scene))
    assert np.sqrt((difference**2).mean()) < 0.02
    assert np.abs(difference.mean(axis=(1, 2))).max() < 0.003


def test_values_and_backgrounds(draw: Callable[..., Scene]):
    scene = draw(1, batch=256)
    pictures = np.asarray(render(scene))
    assert pictures.dtype == np.float32
    assert pictures.min() >= 0.0
    assert pictures.max() <= 1.0
    away = np.argmax(
        np.min(np.hypot(*(np.moveaxis(_corners()[:, None, None, :] - _centres(scene)[None], -1, 0))), axis=2),
        axis=0,
    )
    corner_Bx2 = _corners()[away].astype(int)
    seen = pictures[np.arange(256), corner_Bx2[:, 1], corner_Bx2[:, 0]]
    np.testing.assert_allclose(seen, BACKGROUND_RGB[np.asarray(scene.background)], atol=1e-6)


def _corners() -> np.ndarray:
    return np.array([(0, 0), (63, 0), (0, 63), (63, 63)], float)


def _centres(scene: Scene) -> np.ndarray:
    centres = np.stack([scene.x, scene.y], axis=2)
    return np.where(np.asarray(scene.two)[:, None, None], centres, centres[:, :1])


def test_moving_an_object_by_a_pixel_moves_its_pixels():
    scene = one(shape=5)
    moved = scene._replace(x=scene.x + 1, y=scene.y - 2)
    pictures = [np.asarray(render(s))[0] for s in (scene, moved)]
    np.testing.assert_allclose(np.roll(pictures[0], (-2, 1), axis=(0, 1)), pictures[1], atol=1e-5)


def test_bad_size_is_named():
    with pytest.raises(MegError, match="picture size 0"):
        render(one(), size=0)

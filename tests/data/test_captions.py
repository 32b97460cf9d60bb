"""The caption checker, before anything is judged by it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from eval.captions import ATTRIBUTES, Reading, check, parse_caption, read_pictures, score
from megjax.data import grammar
from megjax.data.grammar import Scene, captions
from megjax.data.render import SIDE, render
from megjax.data.scenes import GRID
from megjax.errors import MegError

Draw = Callable[..., Scene]

COUNT = {"shape": 6, "colour": 8, "size": 3, "texture": 4, "position": 9, "relation": 4, "background": 6}


@dataclass(frozen=True)
class Drawn:
    scene: Scene
    pictures: np.ndarray
    texts: list[str]
    readings: list[Reading]


@pytest.fixture(scope="module")
def drawn(draw: Draw) -> Drawn:
    scene = draw(2, batch=1024)
    pictures = pictures_of(scene)
    return Drawn(scene, pictures, captions(scene), read_pictures(pictures))


def pictures_of(scene: Scene) -> np.ndarray:
    """All pictures, rendered in parts of one size."""
    parts = ([leaf[i : i + 64] for leaf in scene] for i in range(0, len(scene.two), 64))
    return np.concatenate([np.asarray(render(Scene(*part))) for part in parts])


def accepted(pictures: np.ndarray, texts: list[str]) -> float:
    return float(check(pictures, texts).right_B.mean())


def test_right_on_the_generators_own_pictures(drawn: Drawn):
    own = score(drawn.readings, drawn.texts)
    assert own.right_B.mean() >= 0.99
    for attribute in ATTRIBUTES:
        right, total = own.detail[attribute]
        assert total > 250
        assert right / total >= 0.99


def test_wrong_on_other_captions(drawn: Drawn):
    other = [*drawn.texts[1:], drawn.texts[0]]
    assert score(drawn.readings, other).right_B.mean() <= 0.10


def test_right_on_blurred_and_noisy_pictures(drawn: Drawn):
    pictures = gaussian_filter(drawn.pictures[:256], (0.0, 0.7, 0.7, 0.0))
    pictures += 0.02 * np.random.default_rng(0).standard_normal(pictures.shape).astype(np.float32)
    eight_bits = np.round(np.clip(pictures, 0.0, 1.0) * 255.0).astype(np.float32) / 255.0
    assert accepted(eight_bits, drawn.texts[:256]) >= 0.97


def placed(scene: Scene) -> Scene:
    """The scene after a change, its objects in new places that suit its position or relation."""
    column, row = np.array(GRID)[[scene.position % 3, scene.position // 3]]
    ahead = np.where(scene.relation % 2 == 0, -15.5, 15.5)  # far enough for two large objects
    related = 32.0 + np.stack([ahead, -ahead], axis=1)
    upright = (scene.relation >= 2)[:, None]
    x = np.where(scene.two[:, None], np.where(upright, 32.0, related), column[:, None])
    y = np.where(scene.two[:, None], np.where(upright, related, 32.0), row[:, None])
    return scene._replace(x=x.astype(np.float32), y=y.astype(np.float32))


def named(scene: Scene, attribute: str) -> np.ndarray:
    """Whose captions name an attribute (of object 0, if it is an object's)."""
    always = np.ones(len(scene.two), bool)
    return {
        "shape": always,
        "colour": always,
        "size": scene.names_size[:, 0],
        "texture": scene.names_texture[:, 0],
        "position": scene.names_position,
        "relation": scene.two,
        "background": scene.names_background,
    }[attribute]


def test_places_of_the_next_test_are_right(drawn: Drawn):
    scene = placed(Scene(*(leaf[:256] for leaf in drawn.scene)))
    assert accepted(pictures_of(scene), drawn.texts[:256]) >= 0.99


@pytest.mark.parametrize("attribute", COUNT)
def test_one_wrong_attribute_is_enough(drawn: Drawn, attribute: str):
    scene, rng = drawn.scene, np.random.default_rng(0)
    chosen = np.flatnonzero(named(scene, attribute))[:128]
    scene = placed(Scene(*(leaf[chosen] for leaf in scene)))
    texts = [drawn.texts[i] for i in chosen]
    value = getattr(scene, attribute).copy()
    first = value if value.ndim == 1 else value[:, 0]
    first += rng.integers(1, COUNT[attribute], len(first), dtype=first.dtype)
    first %= COUNT[attribute]
    wrong = placed(scene._replace(**{attribute: value}))
    assert accepted(pictures_of(wrong), texts) <= 0.02


def test_colours_of_two_objects_are_not_swapped(drawn: Drawn):
    scene = drawn.scene
    differ = scene.two & (scene.colour[:, 0] != scene.colour[:, 1])
    chosen = np.flatnonzero(differ)[:128]
    scene = Scene(*(leaf[chosen] for leaf in scene))
    swapped = pictures_of(scene._replace(colour=scene.colour[:, ::-1]))
    assert accepted(swapped, [drawn.texts[i] for i in chosen]) <= 0.02


def test_the_number_of_objects_counts(drawn: Drawn):
    chosen = np.flatnonzero(drawn.scene.two)[:128]
    scene = Scene(*(leaf[chosen] for leaf in drawn.scene))
    both = captions(scene)
    alone = [
        f"{'an' if grammar.COLOURS[c] == 'orange' else 'a'} {grammar.COLOURS[c]} {grammar.SHAPES[s]}"
        for c, s in zip(scene.colour[:, 0], scene.shape[:, 0], strict=True)
    ]
    one = pictures_of(scene._replace(two=np.zeros_like(scene.two)))
    assert accepted(one, alone) >= 0.99
    assert accepted(pictures_of(scene), alone) == 0.0
    assert accepted(one, both) == 0.0
    empty = np.broadcast_to(one[:, :1, :1], one.shape)
    assert accepted(empty, alone) == 0.0


@pytest.mark.parametrize("damage", ["another colour", "gone"])
def test_half_an_object_is_not_one(drawn: Drawn, damage: str):
    """The right half of a lone object has another colour or is missing."""
    chosen = np.flatnonzero(~drawn.scene.two)[:128]
    scene = Scene(*(leaf[chosen] for leaf in drawn.scene))
    changed = {
        "another colour": scene._replace(colour=(scene.colour + 4) % 8),
        "gone": scene._replace(x=np.full_like(scene.x, 1000.0)),
    }[damage]
    right_half = (np.arange(SIDE) + 0.5 > scene.x[:, :1])[:, None, :, None]
    pictures = np.where(right_half, pictures_of(changed), pictures_of(scene))
    count, total = check(pictures, [drawn.texts[i] for i in chosen]).detail["count"]
    assert count / total <= 0.10


def test_readings_are_the_scenes(drawn: Drawn):
    for i, reading in enumerate(drawn.readings[:256]):
        assert reading.background == drawn.scene.background[i]
        truth = [
            (*(int(getattr(drawn.scene, name)[i, k]) for name in ("shape", "colour", "size", "texture")), k)
            for k in range(1 + int(drawn.scene.two[i]))
        ]
        assert sorted(found[:4] for found in reading.objects) == sorted(kind[:4] for kind in truth)
        for *kind, k in truth:
            (found,) = (found for found in reading.objects if found[:4] == tuple(kind))
            assert (found.x, found.y) == pytest.approx((drawn.scene.x[i, k], drawn.scene.y[i, k]), abs=0.75)


def test_parsing_a_caption():
    claim = parse_caption("A small striped red circle at the top left on a grey background")
    assert claim.things == ((0, 0, 0, 1),)
    assert (claim.position, claim.relation, claim.background) == (0, None, 1)
    claim = parse_caption("a red circle left of a  blue square")
    assert claim.things == ((0, 0, None, None), (1, 5, None, None))
    assert (claim.position, claim.relation, claim.background) == (None, 0, None)


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "a red circle a blue square", "a red circle at the top of a blue square", "circle red"],
)
def test_other_captions_are_named(text: str):
    with pytest.raises(MegError, match="not in the grammar"):
        parse_caption(text)


def test_bad_pictures_are_named(drawn: Drawn):
    with pytest.raises(MegError, match=r"shape \(2, 32, 32, 3\)"):
        read_pictures(drawn.pictures[:2, ::2, ::2])
    with pytest.raises(MegError, match="2 pictures and 1 captions"):
        check(drawn.pictures[:2], drawn.texts[:1])
    with pytest.raises(MegError, match=r"12288 values .* not finite"):
        check(np.full((1, SIDE, SIDE, 3), np.nan), drawn.texts[:1])

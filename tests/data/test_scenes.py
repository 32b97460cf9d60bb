from collections.abc import Callable

import chex
import jax
import numpy as np
import pytest

from megjax.data import grammar
from megjax.data.grammar import Scene, captions
from megjax.data.render import BACKGROUND_RGB, COLOUR_RGB, RADII, SIDE
from megjax.data.scenes import GAP, GRID, JITTER, MARGIN, sample_scenes
from megjax.errors import MegError

HELD_OUT = (
    {"yellow", "heart"},
    {"purple", "square"},
    {"striped", "star"},
    {"green", "dotted"},
    {"pink", "checkered"},
)

Draw = Callable[..., Scene]


def objects(scene: Scene) -> list[tuple[set[str], ...]]:
    """Colour, shape and texture of each object, in words."""
    words = [
        np.array(names)[index]
        for names, index in (
            (grammar.COLOURS, scene.colour),
            (grammar.SHAPES, scene.shape),
            (grammar.TEXTURES, scene.texture),
        )
    ]
    return [
        tuple({str(word[i, k]) for word in words} for k in range(2 if scene.two[i] else 1))
        for i in range(len(scene.two))
    ]


def has_held_out(words: set[str]) -> bool:
    return any(pair <= words for pair in HELD_OUT)


def test_grammar_is_no_smaller_than_promised():
    counts = [
        len(set(words))
        for words in (
            grammar.SHAPES,
            grammar.COLOURS,
            grammar.SIZES,
            grammar.POSITIONS,
            grammar.BACKGROUNDS,
            grammar.TEXTURES,
            grammar.RELATIONS,
        )
    ]
    assert all(have >= want for have, want in zip(counts, (6, 8, 3, 9, 6, 4, 4), strict=True))
    shapes, colours, textures = counts[0], counts[1], counts[5]
    pairs = shapes * colours + shapes * textures + colours * textures
    assert len(HELD_OUT) / pairs == pytest.approx(0.05, abs=0.004)


def test_palettes_are_apart():
    assert COLOUR_RGB.shape == (len(grammar.COLOURS), 3)
    assert BACKGROUND_RGB.shape == (len(grammar.BACKGROUNDS), 3)

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None] - b[None, :], axis=-1)

    for palette in (COLOUR_RGB, BACKGROUND_RGB):
        assert (distances(palette, palette) + np.eye(len(palette))).min() > 0.2
    assert distances(COLOUR_RGB, BACKGROUND_RGB).min() > 0.3


def test_a_caption_word_for_word():
    scene = Scene(
        two=np.array([False, True, True]),
        shape=np.array([[0, 0], [0, 1], [3, 5]]),
        colour=np.array([[0, 0], [0, 5], [1, 1]]),
        size=np.array([[0, 0], [1, 1], [2, 0]]),
        texture=np.array([[1, 0], [0, 0], [2, 3]]),
        x=np.zeros((3, 2), np.float32),
        y=np.zeros((3, 2), np.float32),
        position=np.array([0, 0, 0]),
        relation=np.array([0, 0, 3]),
        background=np.array([1, 0, 5]),
        names_size=np.array([[True, True], [False, False], [False, True]]),
        names_texture=np.array([[True, True], [False, False], [False, True]]),
        names_position=np.array([True, False, False]),
        names_background=np.array([True, False, True]),
    )
    assert captions(scene) == [
        "a small striped red circle at the top left on a grey background",
        "a red circle left of a blue square",
        "an orange star below a small checkered orange heart on a lavender background",
    ]


def test_same_key_same_scenes(draw: Draw):
    scene = draw(0, "train")
    again = sample_scenes(jax.random.key(0), len(scene.two), "train")
    chex.assert_trees_all_equal(scene, jax.device_get(again))
    assert captions(scene) != captions(draw(1, "train"))


def test_rates(draw: Draw):
    scene = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(draw(seed) for seed in range(5)))
    one, two = ~scene.two, scene.two
    assert two.mean() == pytest.approx(0.5, abs=0.015)
    for flags, rates in (
        (scene.names_size[:, 0], (0.6, 0.4)),
        (scene.names_texture[:, 0], (0.6, 0.4)),
        (scene.names_background, (0.6, 0.5)),
        (scene.names_position, (0.8, 0.0)),
    ):
        assert (flags[one].mean(), flags[two].mean()) == pytest.approx(rates, abs=0.02)
    for index, words in (
        (scene.shape, grammar.SHAPES),
        (scene.colour, grammar.COLOURS),
        (scene.size, grammar.SIZES),
        (scene.texture, grammar.TEXTURES),
        (scene.position, grammar.POSITIONS),
        (scene.relation, grammar.RELATIONS),
        (scene.background, grammar.BACKGROUNDS),
    ):
        shares = np.bincount(index.ravel(), minlength=len(words)) / index.size
        np.testing.assert_allclose(shares, 1 / len(words), atol=0.015)


def test_training_never_shows_a_held_out_pair_but_everything_else(draw: Draw):
    seen = objects(draw(0, "train"))
    assert not any(has_held_out(words) for scene in seen for words in scene)
    kinds = {frozenset(words) for scene in seen for words in scene}
    every = {
        frozenset((colour, shape, texture))
        for colour in grammar.COLOURS
        for shape in grammar.SHAPES
        for texture in grammar.TEXTURES
    }
    assert kinds == {words for words in every if not has_held_out(set(words))}


def test_each_held_out_caption_names_its_pair(draw: Draw):
    scene = draw(0, "held_out")
    first = 0
    for words, caption in zip(objects(scene), captions(scene), strict=True):
        named = [
            set(part.split())
            for part in caption.replace(" of a", "|a").replace("below", "|").replace("above", "|").split("|")
        ]
        pairs = [has_held_out(w & n) for w, n in zip(words, named, strict=True)]
        assert any(pairs)
        first += pairs[0]
    assert 0.5 < first / len(scene.two) < 1.0  # of two objects, either may have it


def test_related_objects_differ_in_shape_or_colour(draw: Draw):
    scene = draw(0)
    assert not np.any((scene.shape[:, 0] == scene.shape[:, 1]) & (scene.colour[:, 0] == scene.colour[:, 1]))


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
def test_places_mean_what_the_captions_say(draw: Draw, split: str):
    scene = draw(1, split)
    centre_Bx2x2 = np.stack([scene.x, scene.y], axis=2)
    radius_Bx2 = np.array(RADII)[scene.size]
    two = scene.two
    shown = centre_Bx2x2[two]
    assert np.all(shown - radius_Bx2[two][..., None] >= MARGIN - 1e-4)
    assert np.all(shown + radius_Bx2[two][..., None] <= SIDE - MARGIN + 1e-4)

    alone = centre_Bx2x2[~two, 0]
    assert np.all(alone - radius_Bx2[~two, :1] >= MARGIN - 1e-4)
    point = np.array(GRID)[np.stack([scene.position % 3, scene.position // 3], axis=1)][~two]
    assert np.all(np.abs(alone - point) <= JITTER)

    step = (shown[:, 1] - shown[:, 0]) * np.array([1, -1])[(scene.relation[two] % 2)][:, None]
    upright = scene.relation[two] >= 2
    along, across = np.where(upright, step[:, ::-1].T, step.T)
    assert np.all(along >= radius_Bx2[two].sum(axis=1) + GAP - 1e-4)
    assert np.all(np.abs(across) <= 2 * JITTER)


def test_rate_of_two_objects_is_traced():
    sample = jax.jit(chex.assert_max_traces(lambda key, rate: sample_scenes(key, 4, "train", rate), n=1))
    assert [int(sample(jax.random.key(0), rate).two.sum()) for rate in (0.0, 1.0)] == [0, 4]


def test_bad_arguments_are_named():
    with pytest.raises(MegError, match="batch 0"):
        sample_scenes(jax.random.key(0), 0)

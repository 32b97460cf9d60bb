"""Whether pictures show what their captions of `scenes` say, judged by the pictures alone.

Analysis by synthesis: the border gives the background, what differs from it falls into connected parts, and
each part is matched with every shape, size, texture and colour at several sub-pixel centres. A caption is
right only if every attribute that it names is right, no other object is there and each resembles its match.
"""

import re
from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy import ndimage

from megjax.data.grammar import BACKGROUNDS, COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, TEXTURES
from megjax.data.render import BACKGROUND_RGB, COLOUR_RGB, OUTLINES, RADII, SIDE, coverage, tones
from megjax.data.scenes import GRID
from megjax.errors import MegError

ATTRIBUTES = ("count", "shape", "colour", "size", "texture", "position", "relation", "background")

CONTRAST = 0.12  # RGB distance from the background from which a pixel belongs to an object
MIN_AREA = 16  # pixels of the smallest part that counts as an object; the smallest real one has about 80
MAX_MISFIT = 0.15  # root mean square error of an object's best match, over its area
MAX_SHIFT = 0.2  # RGB distance of the background from the nearest named one
WINDOW = (
    36  # side of the cut-out around an object's centroid, to which the largest triangle's tip is 16 pixels
)
SHIFTS = (-0.7, 0.0, 0.7)  # of the centre that are tried, in pixels
SOFTNESS = (
    1.4  # width of the templates' edges, in pixels: between a picture as rendered (1) and a blurred one
)
BATCH = 32  # objects that are matched at once


class Thing(NamedTuple):
    """An object as a caption names it: indices into the grammar's tuples, None where it says nothing."""

    shape: int
    colour: int
    size: int | None
    texture: int | None


class Claim(NamedTuple):
    """What a caption says."""

    things: tuple[Thing, ...]
    position: int | None
    relation: int | None
    background: int | None


class Found(NamedTuple):
    """An object as a picture shows it; x, y of its centre in pixels."""

    shape: int
    colour: int
    size: int
    texture: int
    x: float
    y: float
    misfit: float


class Reading(NamedTuple):
    """What a picture shows."""

    objects: tuple[Found, ...]
    background: int | None


class Score(NamedTuple):
    """Which captions are right, and for each of ATTRIBUTES how often it was right and how often named."""

    right_B: Bool[np.ndarray, " B"]
    detail: dict[str, tuple[int, int]]


def _one_of(name: str, words: Sequence[str]) -> str:
    longest_first = sorted(words, key=len, reverse=True)
    return f"(?P<{name}>{'|'.join(longest_first)})"


def _thing_pattern(i: int) -> str:
    size, texture = _one_of(f"size{i}", SIZES), _one_of(f"texture{i}", TEXTURES)
    return f"an? (?:{size} )?(?:{texture} )?{_one_of(f'colour{i}', COLOURS)} {_one_of(f'shape{i}', SHAPES)}"


_CAPTION = re.compile(
    _thing_pattern(0)
    + f"(?: at the {_one_of('position', POSITIONS)}| {_one_of('relation', RELATIONS)} {_thing_pattern(1)})?"
    + f"(?: on a {_one_of('background', BACKGROUNDS)} background)?"
)


def parse_caption(caption: str) -> Claim:
    """What a caption of the grammar of `scenes` says.

    Raises:
        MegError: the caption is not in the grammar.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    if match is None:
        raise MegError(
            f"caption {caption!r} is not in the grammar of scenes; "
            "write it like 'a small striped red circle left of a blue square on a grey background'"
        )

    def index(name: str, words: Sequence[str]) -> int | None:
        return None if match[name] is None else words.index(match[name])

    things = tuple(
        Thing(
            SHAPES.index(match[f"shape{i}"]),
            COLOURS.index(match[f"colour{i}"]),
            index(f"size{i}", SIZES),
            index(f"texture{i}", TEXTURES),
        )
        for i in range(1 if match["relation"] is None else 2)
    )
    return Claim(
        things, index("position", POSITIONS), index("relation", RELATIONS), index("background", BACKGROUNDS)
    )


class _Part(NamedTuple):
    """A connected part of a picture, less the background."""

    window_WxWx3: np.ndarray
    corner_2: np.ndarray  # (y, x) of the window in the picture, in pixels
    centroid_2: np.ndarray  # of the part's mask, (y, x) in the window
    background_3: np.ndarray
    energy: np.ndarray  # summed squared difference from the background, the part beyond the window included


def _parts(image_SxSx3: np.ndarray, background_3: np.ndarray) -> list[_Part]:
    """Cut a picture into its connected parts other than the background."""
    difference = np.pad(image_SxSx3 - background_3, ((WINDOW, WINDOW), (WINDOW, WINDOW), (0, 0)))
    mask = np.linalg.norm(difference, axis=-1) > CONTRAST
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, np.ones((3, 3)), output=labels)
    parts = []
    for label in np.flatnonzero(np.bincount(labels.ravel())[1:] >= MIN_AREA) + 1:
        part = labels == label
        centroid_2 = np.argwhere(part).mean(axis=0) + 0.5  # a pixel's centre is at 0.5
        top, left = (round(t) - WINDOW // 2 for t in centroid_2.tolist())
        # The faint rim belongs to the part; other parts in its window do not.
        own = np.where(np.asarray(ndimage.binary_dilation(part))[..., None], difference, 0.0)
        window = own[top : top + WINDOW, left : left + WINDOW]
        corner_2 = np.array([top, left])
        parts.append(_Part(window, corner_2 - WINDOW, centroid_2 - corner_2, background_3, np.sum(own**2)))
    return parts


@cache
def _centroids() -> np.ndarray:
    """(y, x) of each shape's centroid from its centre, in units of its radius."""
    grid = np.linspace(-1.1, 1.1, 441, dtype=np.float32)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    with jax.ensure_compile_time_eval():
        inside = [np.asarray(outline(jnp.asarray(x), jnp.asarray(y))) < 0 for outline in OUTLINES]
    return np.array([(y[i].mean(), x[i].mean()) for i in inside], np.float32)


def _errors(
    pixel_2xP: Array, flat_Px3: Array, centre_KxOx2: Array, radius: float, background_3: Array
) -> tuple[Array, Array]:
    """Squared errors of K shapes at O centres each, in T textures and C colours; and the shapes' areas there.

    A template of cover b and tone t changes the background by b (t colour - background). With a = b t, the
    squared error of any colour follows from five sums over the pixels. The part's energy is left out.
    """
    colour_Cx3 = jnp.asarray(COLOUR_RGB)
    y_KxOxP, x_KxOxP = (pixel_2xP[i][None, None] - centre_KxOx2[..., i, None] for i in range(2))
    distance_KxOxP = radius * jnp.stack(
        [outline(x / radius, y / radius) for outline, x, y in zip(OUTLINES, x_KxOxP, y_KxOxP, strict=True)]
    )
    b_KxOxP = coverage(distance_KxOxP / SOFTNESS)
    a_KxOxTxP = b_KxOxP[:, :, None] * jnp.stack(tones(x_KxOxP, y_KxOxP, 1.0 / SOFTNESS), axis=2)
    ad_KxOxTxC = a_KxOxTxP @ flat_Px3 @ colour_Cx3.T
    ab_KxOxT = jnp.sum(a_KxOxTxP * b_KxOxP[:, :, None], axis=-1)
    ab_KxOxTxC = jnp.tensordot(ab_KxOxT, colour_Cx3 @ background_3, axes=0)
    aa_KxOxTxC = jnp.tensordot(jnp.sum(a_KxOxTxP**2, axis=-1), jnp.sum(colour_Cx3**2, axis=-1), axes=0)
    bd_KxO = b_KxOxP @ flat_Px3 @ background_3
    bb_KxO = jnp.sum(b_KxOxP**2, axis=-1) * jnp.sum(background_3**2)
    of_background = (bb_KxO + 2.0 * bd_KxO)[..., None, None]
    return aa_KxOxTxC - 2.0 * (ad_KxOxTxC + ab_KxOxTxC) + of_background, jnp.sum(b_KxOxP, axis=-1)


def _match(window_WxWx3: Array, centroid_2: Array, background_3: Array, energy: Array) -> tuple[Array, Array]:
    """The best (shape, colour, size, texture) of a part, and its (y, x, misfit), y and x in the window."""
    shift_Ox2 = jnp.asarray(list(product(SHIFTS, SHIFTS)), jnp.float32)
    errors, areas, centres = [], [], []
    for radius in RADII:
        margin = max(0, WINDOW // 2 - int(1.15 * radius + 3))  # a small template needs less of the window
        inner = slice(margin, WINDOW - margin)
        pixels = np.arange(WINDOW, dtype=np.float32)[inner] + 0.5
        pixel_2xP = jnp.asarray(np.stack(np.meshgrid(pixels, pixels, indexing="ij")).reshape(2, -1))
        centre_KxOx2 = (centroid_2[None] - radius * jnp.asarray(_centroids()))[:, None] + shift_Ox2[None]
        flat_Px3 = window_WxWx3[inner, inner].reshape(-1, 3)
        error, area = _errors(pixel_2xP, flat_Px3, centre_KxOx2, radius, background_3)
        errors.append(error)
        areas.append(area)
        centres.append(centre_KxOx2)
    error_ZxKxOxTxC = energy + jnp.stack(errors)  # Z: size
    best = jnp.unravel_index(jnp.argmin(error_ZxKxOxTxC), error_ZxKxOxTxC.shape)
    size, shape, shift, texture, colour = best
    misfit = jnp.sqrt(jnp.maximum(error_ZxKxOxTxC[best], 0.0) / (3.0 * jnp.stack(areas)[size, shape, shift]))
    names_4 = jnp.stack([shape, colour, size, texture])
    return names_4, jnp.append(jnp.stack(centres)[size, shape, shift], misfit)


@jax.jit
def _match_each(*parts: Array) -> tuple[Array, Array]:
    return jax.lax.map(lambda part: _match(*part), parts)


def _find(parts: list[_Part]) -> list[Found]:
    """Match parts in batches of one size, so that all share one compilation."""
    found = []
    for start in range(0, len(parts), BATCH):
        batch = parts[start : start + BATCH]
        padded = batch + batch[-1:] * (BATCH - len(batch))
        window, _, *rest = (np.stack(field).astype(np.float32) for field in zip(*padded, strict=True))
        names_Nx4, fit_Nx3 = (np.asarray(result).tolist() for result in _match_each(window, *rest))
        for part, names, (y, x, misfit) in zip(batch, names_Nx4, fit_Nx3, strict=False):
            top, left = part.corner_2.tolist()
            found.append(Found(*names, x=x + left, y=y + top, misfit=misfit))
    return found


def read_pictures(images_BxSxSx3: Float[np.ndarray, "B S S 3"]) -> list[Reading]:
    """What each picture shows.

    Args:
        images_BxSxSx3: B pictures of 64 x 64 pixels, values in [0, 1], others clipped as in a file.

    Raises:
        MegError: pictures of another shape, or values that are not finite.
    """
    images = np.asarray(images_BxSxSx3, np.float64)
    if images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3):
        raise MegError(f"pictures of shape {images.shape}: give B x {SIDE} x {SIDE} x 3, values in [0, 1]")
    if not np.isfinite(images).all():
        raise MegError(
            f"{np.sum(~np.isfinite(images))} values of the pictures are not finite; check what drew them"
        )
    border = np.ones((SIDE, SIDE), bool)
    border[2:-2, 2:-2] = False
    parts, owners, backgrounds = [], [], []
    for i, image in enumerate(np.clip(images, 0.0, 1.0)):
        background_3 = np.median(image[border], axis=0)
        distance = np.linalg.norm(BACKGROUND_RGB - background_3, axis=1)
        backgrounds.append(int(distance.argmin()) if distance.min() <= MAX_SHIFT else None)
        mine = _parts(image, background_3)
        parts += mine
        owners += [i] * len(mine)
    objects: list[list[Found]] = [[] for _ in images]
    for owner, found in zip(owners, _find(parts), strict=True):
        objects[owner].append(found)
    return [Reading(tuple(o), b) for o, b in zip(objects, backgrounds, strict=True)]


def _relation_holds(relation: int, first: Found, second: Found) -> bool:
    """Whether the first's centre lies that way of the second's, more than it lies along the other axis."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[
        RELATIONS[relation]
    ]
    return along > abs(across)


def _position(found: Found) -> int:
    column, row = (int(np.abs(np.array(GRID) - t).argmin()) for t in (found.x, found.y))
    return 3 * row + column


def judge(reading: Reading, claim: Claim) -> list[tuple[str, bool]]:
    """Every attribute that the claim names, once per object where objects have it, and whether it is right.

    `count` is right if the picture shows as many objects as named, each a good match of its template.
    """
    good = all(found.misfit <= MAX_MISFIT for found in reading.objects)
    count = ("count", good and len(reading.objects) == len(claim.things))
    # Parts that are missing are wrong in everything; of extra ones those that flatter the claim are taken.
    pool = (*reading.objects, *[None] * (len(claim.things) - len(reading.objects)))
    verdicts = [_judge_as(order, reading, claim) for order in permutations(pool, len(claim.things))]
    return [count, *max(verdicts, key=lambda verdict: sum(right for _, right in verdict))]


def _judge_as(order: tuple[Found | None, ...], reading: Reading, claim: Claim) -> list[tuple[str, bool]]:
    verdict = []
    for thing, found in zip(claim.things, order, strict=True):
        for name, wanted in thing._asdict().items():
            if wanted is not None:
                verdict.append((name, found is not None and getattr(found, name) == wanted))
    if claim.position is not None:
        verdict.append(("position", order[0] is not None and _position(order[0]) == claim.position))
    if claim.relation is not None:
        first, second = order
        right = first is not None and second is not None and _relation_holds(claim.relation, first, second)
        verdict.append(("relation", right))
    if claim.background is not None:
        verdict.append(("background", reading.background == claim.background))
    return verdict


def score(readings: Sequence[Reading], captions: Sequence[str]) -> Score:
    """Which readings bear their captions out.

    Raises:
        MegError: another number of captions, or one outside the grammar.
    """
    if len(captions) != len(readings):
        raise MegError(f"{len(readings)} pictures and {len(captions)} captions: give one caption a picture")
    verdicts = [judge(r, parse_caption(caption)) for r, caption in zip(readings, captions, strict=True)]
    detail = {}
    for attribute in ATTRIBUTES:
        of_it = [right for verdict in verdicts for name, right in verdict if name == attribute]
        detail[attribute] = (sum(of_it), len(of_it))
    return Score(np.array([all(right for _, right in verdict) for verdict in verdicts], bool), detail)


def check(images_BxSxSx3: Float[np.ndarray, "B S S 3"], captions: Sequence[str]) -> Score:
    """Which pictures show all that their captions say.

    Args:
        images_BxSxSx3: B pictures of 64 x 64 pixels, values in [0, 1], others clipped as in a file.
        captions: B captions of the grammar of `scenes`.

    Raises:
        MegError: pictures of another shape or not finite, too few captions, or one outside the grammar.
    """
    return score(read_pictures(images_BxSxSx3), captions)

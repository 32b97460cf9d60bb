from functools import cache

import jax
import pytest

from megjax.data.grammar import Scene
from megjax.data.scenes import sample_scenes

BATCH = 4_096  # the same everywhere, so that sampling compiles once a split


@cache
def _draw(seed: int, split: str) -> Scene:
    return jax.device_get(sample_scenes(jax.random.key(seed), BATCH, split))


@pytest.fixture(scope="session")
def draw():
    """`draw(seed, split, batch)`: the first `batch` scenes of a large one."""
    return lambda seed, split="all", batch=BATCH: jax.tree.map(lambda leaf: leaf[:batch], _draw(seed, split))

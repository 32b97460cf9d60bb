"""What is encoded: pictures that are not finite are refused, not cached as black ones."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from megjax.data.loader import DataConfig
from megjax.diffusion.perflow import Flow
from megjax.distill import encoding
from megjax.errors import MegError
from megjax.pipeline import load_pipeline


@pytest.mark.parametrize("kind", ["encoded", "sampled"])
def test_a_decoder_that_overflows_is_not_cached_as_black_pictures(tmp_path, monkeypatch, kind):
    z = jnp.zeros((2, 16, 16, 4))
    picture = jnp.full((2, 64, 64, 3), 0.5)
    monkeypatch.setattr(encoding, "encode", lambda *_: z)
    monkeypatch.setattr(encoding, "_condition", lambda *_, **__: None)
    monkeypatch.setattr(encoding, "denoise", lambda *_, **__: z)
    monkeypatch.setattr(encoding, "decode", lambda *_: picture)
    pipeline, data = load_pipeline("tiny"), DataConfig(pictures=2)

    def rows(name):
        if kind == "encoded":
            return encoding.encoded_latents(pipeline, data, tmp_path / name, 2, {})
        return encoding.sampled_latents(pipeline, data, tmp_path / name, 2, {}, guidance=3.0, seed=0)

    assert rows("good")[0]["z"].shape[0] == (1 if kind == "encoded" else 9)
    np.testing.assert_array_equal(rows("good")[1]["picture"], np.full((64, 64, 3), 128, np.uint8))
    picture = picture.at[1, 3, 4, 0].set(jnp.nan)
    with pytest.raises(MegError, match="picture: not finite in float32; compute in another --dtype"):
        rows("bad")


def test_a_student_is_sampled_with_the_steps_that_it_takes(tmp_path, monkeypatch):
    taken, z = [], jnp.zeros((1, 16, 16, 4))

    def denoise(*args, **_):
        taken.append(args[5])
        return z

    monkeypatch.setattr(encoding, "_condition", lambda *_, **__: None)
    monkeypatch.setattr(encoding, "denoise", denoise)
    monkeypatch.setattr(encoding, "decode", lambda *_: jnp.zeros((1, 64, 64, 3)))
    tiny = load_pipeline("tiny")
    for windows, steps in ((4, range(4, 13)), (8, range(8, 13)), (13, None)):
        pipeline = dataclasses.replace(tiny, flow=Flow(windows=windows))
        where = (pipeline, DataConfig(pictures=1), tmp_path / str(windows), 1, {})
        if steps is None:
            with pytest.raises(MegError, match="13 windows, decoders learn from at most 12 steps"):
                encoding.sampled_latents(*where, guidance=3.0, seed=0)
            continue
        taken.clear()
        rows = encoding.sampled_latents(*where, guidance=3.0, seed=0)
        assert taken == list(steps)
        assert rows[0]["z"].shape[0] == len(steps)

"""What is encoded: pictures that are not finite are refused, not cached as black ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from megjax.data.loader import DataConfig
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

    np.testing.assert_array_equal(rows("good")[1]["picture"], np.full((64, 64, 3), 128, np.uint8))
    picture = picture.at[1, 3, 4, 0].set(jnp.nan)
    with pytest.raises(MegError, match="picture: not finite in float32; compute in another --dtype"):
        rows("bad")

"""The device's client against the server: the same picture as through the split in one process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.client import Channel, PictureRequest, fetch, largest_message_bytes, viewer
from megjax.errors import MegError
from megjax.pipeline import Request
from megjax.pipeline.device import load_device
from megjax.pipeline.split import decode, send
from megjax.serve.engine import latents, prepare
from tests.serve.conftest import PROMPT

SEED, STEPS, RATIO, PSNR_DB = 5, 6, 0.55, 12.0


def test_a_device_shows_what_the_split_in_one_process_shows(run, pipeline, folder):
    device = load_device(folder)
    request = PictureRequest(PROMPT, seed=SEED, steps=STEPS, ratio=RATIO)

    async def ask(server):
        channel = Channel(2e6, PSNR_DB)
        return await fetch(server.http, request, most_bytes=largest_message_bytes(device), channel=channel)

    answer = run(ask)
    assert answer.result["chosen_by"] == "request"
    shown = viewer(device)(answer.message, SEED, PSNR_DB)

    task = prepare(pipeline, Request(PROMPT, seed=SEED, steps=STEPS, ratio=RATIO), "float16")
    # Another batch size rounds otherwise, and a scalar on the edge between two float16 goes the other way.
    z_BxHxWxC, _ = latents(pipeline, [task], answer.result["batch"])
    key_link = jax.random.split(jax.random.key(SEED))[1]
    received = send(key_link, z_BxHxWxC[:1], jnp.float32(RATIO), jnp.float32(PSNR_DB))
    expected = decode(pipeline, pipeline.device_decoder, received.z_BxHxWxC)[0]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(shown, expected, atol=2e-5)


def test_what_the_server_refuses_is_one_line(run):
    cases = (
        ({"steps": 4}, "give both"),
        ({"steps": 4, "ratio": 1.5}, "ratio: "),
        ({"limits": (3.0, 1800.0)}, "no policy is loaded"),
    )

    async def ask(server):
        for changes, text in cases:
            with pytest.raises(MegError, match=text) as caught:
                await fetch(server.http, PictureRequest(PROMPT, **changes), most_bytes=4000)
            assert "refuses the request (422)" in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1

    run(ask)

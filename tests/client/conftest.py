"""A small device, messages for it, and a server that is a function."""

import functools
import json
import struct
import zlib
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import merging
from megjax.client import viewer
from megjax.link import wire
from megjax.merging.message import pack
from megjax.models import vae_decoder
from megjax.pipeline.device import Device
from tests.models.cases import random_params
from tests.small import CONFIG

if find_spec("httpx") is None:
    collect_ignore_glob = ["test_*.py"]  # They need the extra `device`.

GRID = (8, 8)


@pytest.fixture(scope="session")
def device():
    decoder = vae_decoder(CONFIG.vae)
    return Device(decoder, jax.tree.map(jnp.asarray, random_params(decoder.shapes)), (64, 64))


@pytest.fixture(scope="session")
def show(device):
    """Decodes messages; compiled once."""
    return viewer(device)


@pytest.fixture(scope="session")
def latent():
    return jax.random.normal(jax.random.key(7), (1, 16, 16, 4))


@pytest.fixture(scope="session")
def message(latent):
    """(seed, ratio, dtype) -> the message that a server would send for this latent."""

    @jax.jit
    def merge(seed, ratio):
        key = jax.random.split(jax.random.split(jax.random.key(seed))[1])[0]
        tokens = merging.to_tokens(latent)[0]
        plan, key = merging.match_best(tokens, key, ratio, GRID)
        return merging.merge(tokens, plan), plan, key

    @functools.cache
    def write(seed=0, ratio=0.4, dtype="float16"):
        merged, plan, key = merge(jnp.uint32(seed), jnp.float32(ratio))
        return pack(merged, plan, key, np.float32(ratio), GRID, dtype=dtype)

    return write


@pytest.fixture(scope="session")
def answer():
    """(message, seed, changes) -> status, headers and body of the server's answer."""

    def write(message, seed=0, **changes):
        decoded = wire.decode(message)
        result = {
            "id": "a1",
            "steps": 8,
            "ratio": decoded.ratio,
            "chosen_by": "request",
            "batch": 1,
            "seed": seed,
            "tokens": len(decoded.features_MxD),
            "payload_bits": 8 * (len(message) - wire.HEADER_BYTES),
            "timings": {
                "queue_s": 0.001,
                "text_s": 0.002,
                "denoise_s": 0.1,
                "merge_s": 0.003,
                "total_s": 0.106,
            },
            "latency_s": {"es": 0.5, "tx": 0.012, "ue": 0.1, "total": 0.612},
            "energy_j": {"es": 150.0, "tx": 0.012, "ue": 10.0, "total": 160.012},
        } | changes
        head = {"Content-Type": "application/vnd.megjax.message", "MegJAX-Result": json.dumps(result)}
        return 200, head, message

    return write


@pytest.fixture(scope="session")
def sealed():
    """A message with its checksum made right."""

    def seal(message):
        body = zlib.crc32(message[wire.HEADER_BYTES :], zlib.crc32(message[:28]))
        return message[:28] + struct.pack("<I", body) + message[wire.HEADER_BYTES :]

    return seal

"""Bits on the air: the paper's, the wire format's, and one trace for all ratios."""

import chex
import jax
import jaxtyping
import numpy as np
import pytest

from megjax.errors import MegError
from megjax.link.payload import destination_bits, payload_bits, rgb_bits

LATENT_BITS = 4 * 128 * 128 * 16


def test_papers_ratio_of_four_tenths():
    merged = int(0.4 * 4096)
    assert payload_bits(0.4, 4096, 16, rules="free") == (4096 - merged) * 256
    assert payload_bits(0.4, 4096, 16, rules="paper") == (4096 - merged) * 256 + 16 * merged
    ours = payload_bits(0.4, 4096, 16)
    assert ours == (4096 - merged) * 256 + 8 * -(-(10 * merged + 3072) // 8)
    assert ours / LATENT_BITS == pytest.approx(0.619, abs=5e-4)
    assert payload_bits(0.4, 4096, 16, rules="paper") / LATENT_BITS == pytest.approx(0.625, abs=5e-4)
    np.testing.assert_allclose(payload_bits(0.4, 4096, 16, rules="paper") / 0.83235e6, 0.7875, atol=5e-5)


def test_limits():
    for rules in ("default", "paper", "free"):
        assert payload_bits(0.0, 4096, 16, rules=rules) == LATENT_BITS
    # Every source merges: no mask is needed, and the paper's rules stop there.
    assert payload_bits(0.75, 4096, 16) == 1024 * 256 + 3072 * 10
    assert payload_bits(0.9, 4096, 16, rules="free") == 1024 * 256
    # Two rounds: 614 of the 768 sources of the second merge into one of 256.
    assert payload_bits(0.9, 4096, 16) == 410 * 256 + 8 * -(-(3072 * 10 + 768 + 614 * 8) // 8)
    assert payload_bits(0.4, 64, 16, 8) == 39 * 16 * 8 + 8 * 19
    assert [destination_bits(n) for n in (0, 1, 2, 3, 256, 257)] == [0, 0, 1, 2, 8, 9]
    assert rgb_bits(1024, 1024) == 3 * 2**24


@pytest.mark.parametrize("rules", ["default", "paper", "free"])
def test_traced_ratios_cost_the_same(rules):
    chex.clear_trace_counter()
    bits = jax.jit(chex.assert_max_traces(n=1)(lambda r: payload_bits(r, 4096, 16, rules=rules)))
    for ratio in np.linspace(0, 0.9375, 60):
        assert int(bits(np.float32(ratio))) == payload_bits(float(ratio), 4096, 16, rules=rules)


def test_unknown_rules_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(MegError, match="'Paper': choose from default, paper, free"):
        payload_bits(0.4, 4096, 16, rules="Paper")


def test_grids():
    assert payload_bits(0.5, 35, 4, rules="free", grid=(5, 7)) == 18 * 64
    with pytest.raises(MegError, match="35 tokens are not a square grid"):
        payload_bits(0.5, 35, 4)
    with pytest.raises(MegError, match="36 tokens on a 5 x 7 grid"):
        payload_bits(0.5, 36, 4, grid=(5, 7))

"""Noise on features: power, rules, padding, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from megjax.link.channel import LinkParams
from megjax.link.features import psnr_from_snr, quantise, transmit

KEY = jax.random.key(0)


def tokens(*shape, scale=7.7):
    return scale * jax.random.normal(jax.random.key(7), shape)


@pytest.mark.parametrize("psnr_db", [5.0, 20.0])
@pytest.mark.parametrize("scale", [0.01, 7.7])
def test_default_noise_is_relative_to_the_messages_power(psnr_db, scale):
    x = tokens(2, 512, 16, scale=scale) * jnp.float32([1, 3]).reshape(2, 1, 1)
    noise = np.asarray(transmit(KEY, x, psnr_db) - quantise(x))
    sigma = 10 ** (-psnr_db / 20) * np.sqrt((np.asarray(x) ** 2).mean((1, 2), keepdims=True))
    for white in noise / sigma:
        assert scipy.stats.kstest(white.ravel(), "norm").pvalue > 1e-3


def test_paper_noise_is_absolute_in_units_of_the_autoencoders_latents():
    """20 dB is the authors' standard deviation of 0.1, a real SNR near 38 dB on latents of 7.7."""
    unit = np.float32([0.13025, 0.2]).repeat(8)
    x = np.asarray(tokens(512, 16)) * unit
    noise = np.asarray(transmit(KEY, jnp.asarray(x), 20.0, unit_D=unit) - quantise(jnp.asarray(x))) / unit
    assert scipy.stats.kstest(noise.ravel() / 0.1, "norm").pvalue > 1e-3
    assert 10 * np.log10(np.var(x / unit) / np.var(noise)) == pytest.approx(37.7, abs=0.3)


def test_psnr_of_each_message():
    x = tokens(3, 512, 16)
    psnr_db = jnp.float32([0.0, 10.0, 20.0])
    noise = np.asarray(transmit(KEY, x, psnr_db) - quantise(x))
    ratio_db = 10 * np.log10(np.var(x, axis=(1, 2)) / noise.var((1, 2)))
    np.testing.assert_allclose(ratio_db, psnr_db, atol=0.2)


def test_padding_stays_silent_and_counts_for_nothing():
    x = tokens(2, 64, 8)
    count = jnp.int32([40, 64])
    padded = jnp.where(jnp.arange(64)[None, :, None] < count[:, None, None], x, 99.0)
    received = transmit(KEY, padded, 10.0, count)
    assert not received[0, 40:].any()
    # The same noise key, the same noise: only the power differs, and it must be that of the valid rows.
    noise = (received - quantise(padded))[0, :40] / jnp.sqrt(jnp.mean(quantise(x[0, :40]) ** 2))
    whole = (transmit(KEY, x, 10.0) - quantise(x))[0, :40] / jnp.sqrt(jnp.mean(quantise(x[0]) ** 2))
    np.testing.assert_allclose(noise, whole, atol=1e-4)


def test_silence_stays_silence_with_a_finite_gradient():
    zero = jnp.zeros((4, 3))
    assert not transmit(KEY, zero, 5.0).any()
    assert np.isfinite(jax.grad(lambda x: transmit(KEY, x, 5.0).sum())(zero)).all()
    assert not transmit(KEY, tokens(4, 3), 5.0, jnp.int32(0)).any()


def test_perfect_channel_leaves_16_bits():
    x = tokens(32, 4)
    received = transmit(KEY, x, jnp.inf)
    np.testing.assert_array_equal(received, x.astype(jnp.float16).astype(jnp.float32))
    received = transmit(KEY, x, jnp.inf, dtype="bfloat16")
    np.testing.assert_array_equal(received, x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(quantise(jnp.float32([1e9, -1e9])), [65504, -65504])


def test_gradient_passes_the_quantisation():
    x = tokens(16, 4)
    np.testing.assert_array_equal(jax.grad(lambda x: (3 * quantise(x)).sum())(x), jnp.full((16, 4), 3.0))

    def loss(scale):
        return jnp.sum(transmit(KEY, scale * quantise(x), 10.0) ** 2)

    # The whole message, noise and all, scales with the tokens.
    np.testing.assert_allclose(jax.grad(loss)(1.0), 2 * loss(1.0), rtol=1e-3)


def test_psnr_may_be_tied_to_the_links_snr():
    np.testing.assert_allclose(psnr_from_snr(jnp.float32(100.0)), 20, rtol=1e-6)
    np.testing.assert_allclose(psnr_from_snr(100.0, LinkParams(snr_gap_db=3.0), margin_db=5.0), 22, rtol=1e-6)

"""The channel against closed forms and the paper's numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from megjax.errors import MegError
from megjax.link import channel
from megjax.link.channel import LinkParams
from megjax.link.payload import payload_bits, rgb_bits

DRAWS = (50_000,)
PAPER = LinkParams()


def test_path_loss_and_snr():
    for d in (1.0, 200.0, 250.0, 300.0):
        loss = 35.3 + 37.6 * np.log10(d)
        np.testing.assert_allclose(channel.path_loss_db(d), loss, rtol=1e-6)
        np.testing.assert_allclose(channel.snr(d), 10 ** ((30 + 94 - loss) / 10), rtol=2e-5)
        np.testing.assert_allclose(channel.snr(d, 0.25, 10.0), 0.025 * channel.snr(d), rtol=2e-5)


def test_rate_has_an_snr_gap():
    np.testing.assert_allclose(channel.rate_bps(3.0), 2e6, rtol=1e-6)
    params = LinkParams(bandwidth_hz=5e6, snr_gap_db=10 * np.log10(3.0))
    np.testing.assert_allclose(channel.rate_bps(9.0, params), 10e6, rtol=1e-6)
    np.testing.assert_allclose(
        channel.to_db(channel.from_db(jnp.float32([-7.0, 0.0, 23.0]))), [-7, 0, 23], atol=1e-5
    )


@pytest.mark.parametrize("distance_m", [2e3, 2e4, 1e5])
def test_rate_of_a_weak_signal_is_not_rounded_to_0(distance_m):
    snr = 10 ** ((30 + 94 - 35.3 - 37.6 * np.log10(distance_m)) / 10)
    exact = 1e6 * np.log1p(snr) / np.log(2)
    np.testing.assert_allclose(channel.rate_bps(channel.snr(distance_m)), exact, rtol=3e-5)


def test_unknown_fading_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(MegError, match=r"fading 'Rayleigh': choose from none, rayleigh, rician"):
        LinkParams(fading="Rayleigh")
    with pytest.raises(MegError, match="fading 'rice'"):
        dataclasses.replace(PAPER, fading="rice")


def test_papers_mean_rate():
    def rate(d):
        return np.log2(1 + 10 ** ((124 - 35.3 - 37.6 * np.log10(d)) / 10))

    exact = scipy.integrate.quad(rate, 200, 300)[0] / 100
    assert round(exact, 5) == 0.82626
    middles_m = 200 + 100 * (jnp.arange(1000) + 0.5) / 1000
    np.testing.assert_allclose(channel.rate_bps(channel.snr(middles_m)).mean() / 1e6, exact, rtol=1e-5)
    drawn_m = channel.sample_distance_m(jax.random.key(0), PAPER, DRAWS)
    assert 200 <= drawn_m.min() < drawn_m.max() <= 300
    np.testing.assert_allclose(channel.rate_bps(channel.snr(drawn_m)).mean() / 1e6, exact, atol=0.004)


@pytest.mark.parametrize(
    ("bits", "table_s", "exact_s"),
    [
        (rgb_bits(1024, 1024), 60.4680, 60.4680),
        (payload_bits(0.0, 4096, 16, rules="free"), 1.2598, 1.2598),
        (0.9 * payload_bits(0.0, 4096, 16, rules="free"), 1.1337, 1.1337),
        # The table's 0.599 of a latent is r = 0.4 to three digits only; r = 0.4 itself takes 0.7560 s.
        (payload_bits(0.4, 4096, 16, rules="free"), 0.7547, 0.7560),
    ],
    ids=["centralised", "latent", "pruned", "merged"],
)
def test_table_2_transmission(bits, table_s, exact_s):
    np.testing.assert_allclose(bits / 0.83235e6, table_s, rtol=0.002)
    np.testing.assert_allclose(bits / 0.83235e6, exact_s, rtol=2e-4)
    np.testing.assert_allclose(bits / 0.82626e6, exact_s, rtol=0.008)


def test_shadowing_is_log_normal():
    params = LinkParams(shadowing_std_db=8.0)
    shadowing_db = channel.sample_shadowing_db(jax.random.key(1), params, DRAWS)
    assert scipy.stats.kstest(np.asarray(shadowing_db) / 8, "norm").pvalue > 1e-3
    assert not channel.sample_shadowing_db(jax.random.key(1), PAPER, (9,)).any()


def test_fading_distributions():
    g = channel.sample_fading(jax.random.key(2), DRAWS)
    assert (channel.fading_power(g, PAPER) == 1).all()
    rayleigh = np.asarray(channel.fading_power(g, LinkParams(fading="rayleigh")))
    assert scipy.stats.kstest(rayleigh, "expon").pvalue > 1e-3
    k = 10**0.6
    rician = np.asarray(channel.fading_power(g, LinkParams(fading="rician", rician_k_db=6.0)))
    # 2 (K + 1) |h|^2 is non-central chi-square of 2 degrees and 2 K.
    assert scipy.stats.kstest(2 * (k + 1) * rician, scipy.stats.ncx2(2, 2 * k).cdf).pvalue > 1e-3
    np.testing.assert_allclose([rayleigh.mean(), rician.mean()], 1, atol=0.02)
    np.testing.assert_allclose(rician.var(), (1 + 2 * k) / (1 + k) ** 2, rtol=0.03)


def test_rician_limits():
    g = channel.sample_fading(jax.random.key(3), (1000,))
    weak = channel.fading_power(g, LinkParams(fading="rician", rician_k_db=-90.0))
    np.testing.assert_allclose(weak, channel.fading_power(g, LinkParams(fading="rayleigh")), atol=1e-3)
    strong = channel.fading_power(g, LinkParams(fading="rician", rician_k_db=90.0))
    np.testing.assert_allclose(strong, 1, atol=1e-3)
    sight = channel.fading_power(g, LinkParams(fading="rician", rician_k_db=np.inf))
    np.testing.assert_array_equal(sight, 1)


def test_doppler_correlation_is_bessels():
    doppler_hz = np.float32(np.concatenate([np.linspace(-20, 20, 2001), np.linspace(20, 320, 3001)]))
    # The phase of the rounded Doppler: float32 has no finer than 1e-4 rad at 2000 rad.
    phase = 2 * np.pi * doppler_hz.astype(float)
    ours = channel.doppler_correlation(jnp.asarray(doppler_hz), 1.0)
    np.testing.assert_allclose(ours, scipy.special.j0(phase), atol=5e-6)
    few_hz = jnp.float32([0.0, 1.0, 12.0, 13.0, 100.0])
    slope = jax.vmap(jax.grad(lambda f: channel.doppler_correlation(f, 1.0)))(few_hz)
    exact = -2 * np.pi * scipy.special.j1(2 * np.pi * np.asarray(few_hz, float))
    np.testing.assert_allclose(slope, exact, atol=5e-5)


@pytest.mark.parametrize("doppler_hz", [0.0, 5.0, 60.0])
def test_fading_is_stationary_and_correlated(doppler_hz):
    params = LinkParams(doppler_hz=doppler_hz, frame_s=0.01)
    rho = scipy.special.j0(2 * np.pi * doppler_hz * 0.01)
    states = [channel.sample_fading(jax.random.key(4), DRAWS)]
    for frame in range(3):
        states.append(channel.next_fading(jax.random.key(10 + frame), states[-1], params))
    g = np.stack(states)
    np.testing.assert_allclose((abs(g) ** 2).mean(1), 1, atol=0.02)
    for lag in (1, 2, 3):
        np.testing.assert_allclose((g[lag] * g[0].conj()).mean(), rho**lag, atol=0.02)


def test_a_channel_that_stands_still_has_finite_gradients():
    def power(params):
        state = channel.sample_fading(jax.random.key(0))
        return channel.fading_power(channel.next_fading(jax.random.key(1), state, params), params)

    slopes = jax.grad(power)(jax.tree.map(jnp.float32, LinkParams(fading="rician")))
    assert np.isfinite(jax.tree.leaves(slopes)).all()
    assert slopes.rician_k_db != 0


def test_every_number_may_be_traced_and_vmapped():
    def rate(params, key):
        g = channel.next_fading(key, channel.sample_fading(key), params)
        loss = channel.sample_shadowing_db(key, params)
        d = channel.sample_distance_m(key, params)
        return channel.rate_bps(channel.snr(d, channel.fading_power(g, params), loss, params), params)

    params = LinkParams(fading="rician", doppler_hz=0.1, shadowing_std_db=3.0)
    many = jax.tree.map(lambda value: jnp.stack([jnp.float32(value)] * 3), params)
    many = dataclasses.replace(many, bandwidth_hz=jnp.float32([1e6, 2e6, 4e6]))
    rates = jax.jit(jax.vmap(rate, in_axes=(0, None)))(many, jax.random.key(0))
    np.testing.assert_allclose(rates / rates[0], [1, 2, 4], rtol=1e-5)
    only = jax.tree.map(lambda _: None, params)
    only = dataclasses.replace(only, bandwidth_hz=0)
    mixed = dataclasses.replace(params, bandwidth_hz=many.bandwidth_hz)
    np.testing.assert_allclose(
        jax.vmap(rate, in_axes=(only, None))(mixed, jax.random.key(0)), rates, rtol=1e-5
    )
    slope = jax.grad(lambda p: channel.rate_bps(channel.snr(250.0, params=p), p))(params)
    assert slope.tx_power_dbm > 0 > slope.noise_power_dbm

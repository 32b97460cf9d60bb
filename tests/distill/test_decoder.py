"""The decoder's distillation and the pruning gate, against closed forms and quadrature."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from megjax.distill.decoder import (
    Latents,
    Ranges,
    decoder_distillation_loss,
    gated,
    magnitude_pruned,
    merged,
)
from megjax.distill.pruning import gate, gate_kl, init_gate, kept_count, send_pruned, strongest

UNIT = (0.13, 0.13, 0.13, 0.13)


def linear_decoder(params, z_BxHxWxC):
    """A decoder of 2 x 2 latents to 2 x 2 pictures of three channels."""
    return z_BxHxWxC @ params


def exact_kl(log_a: float) -> float:
    """KL of N(1, a) from the log-uniform prior, its limit for a -> inf set to 0, by quadrature."""
    root = np.exp(log_a / 2)

    def integrand(n):
        return np.log(np.abs(1 + root * n) + 1e-300) * np.exp(-n * n / 2) / np.sqrt(2 * np.pi)

    pole = -1 / root
    points = sorted({-12.0, 12.0, float(np.clip(pole, -12, 12))})
    value = sum(
        integrate.quad(integrand, low, high, limit=400)[0] for low, high in itertools.pairwise(points)
    )
    return value - 0.5 * log_a + 0.5 * (np.euler_gamma + np.log(2))


@pytest.mark.parametrize("log_a", [-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0])
def test_gate_kl_is_within_a_hundredth_of_quadrature(log_a):
    x = jnp.array([2.0])
    sigma = float(np.exp(log_a / 2)) * 0.5 * 2.0
    assert float(gate_kl(jnp.array([0.5]), x, sigma)[0]) == pytest.approx(exact_kl(log_a), abs=0.01)


def test_gate_opens_and_differs_by_noise_level():
    params = init_gate(jax.random.key(0), 16)
    quiet, noisy = gate(params, 20.0), gate(params, 5.0)
    assert quiet.shape == (16,)
    assert np.all((quiet > 0.5) & (quiet < 1))
    assert not np.allclose(quiet, noisy)


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 10), (0.1, 9), (0.55, 5), (0.95, 1), (1.0, 1)])
def test_kept_scalars(ratio, kept):
    assert int(kept_count(ratio, 10)) == kept
    score = jnp.array([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    chosen = np.flatnonzero(strongest(score, kept_count(ratio, 10)))
    assert sorted(chosen) == sorted(np.argsort(-np.asarray(score), kind="stable")[:kept])


def test_pruned_messages_have_noise_of_their_own_power_and_zeros_elsewhere():
    x = 3.0 * jax.random.normal(jax.random.key(0), (20_000,))
    kept = jnp.arange(20_000) % 2 == 0
    got = np.asarray(send_pruned(jax.random.key(1), x, kept, 10.0))
    assert np.all(got[1::2] == 0)
    noise = got[::2] - np.asarray(x)[::2]
    assert noise.std() == pytest.approx(10**-0.5 * float(jnp.sqrt(jnp.mean(x[::2] ** 2))), rel=0.03)
    clean = send_pruned(jax.random.key(1), x, kept, jnp.inf)
    np.testing.assert_allclose(clean[::2], x[::2], rtol=1e-3)
    silent = jax.grad(lambda x: jnp.sum(send_pruned(jax.random.key(1), x, kept, 10.0)))(jnp.zeros(20_000))
    assert np.isfinite(silent).all()


def test_magnitude_pruning_keeps_the_largest():
    z = jax.random.normal(jax.random.key(0), (4, 4, 4))
    got, penalty = magnitude_pruned()({}, jax.random.key(1), z, jnp.array(0.5), jnp.array(jnp.inf))
    sent = np.asarray(got != 0)
    assert sent.sum() == 32
    assert np.abs(np.asarray(z))[sent].min() >= np.abs(np.asarray(z))[~sent].max()
    assert float(penalty) == 0


def data(prompts: int = 8) -> Latents:
    z = jax.random.normal(jax.random.key(0), (prompts, 9, 8, 8, 4))
    return Latents(z, jax.random.uniform(jax.random.key(1), (prompts, 8, 8, 3)))


def test_loss_of_an_undisturbed_latent_is_the_plain_error():
    latents = data()
    latents = latents._replace(z_NxTxHxWxC=jnp.repeat(latents.z_NxTxHxWxC[:, :1], 9, axis=1))
    weight = jax.random.normal(jax.random.key(2), (4, 3))
    still = Ranges(ratio=(0.0, 0.0), psnr_db=(200.0, 200.0))
    loss = decoder_distillation_loss(linear_decoder, merged(), still)
    value, metrics = jax.jit(loss)({"decoder": weight}, jax.random.key(3), latents)
    error = jnp.mean((latents.z_NxTxHxWxC[:, 0] @ weight - latents.picture_NxHxWx3) ** 2)
    assert float(value) == pytest.approx(float(error), rel=1e-4)  # every row counts, once
    assert float(metrics["mse"]) == float(value)


@pytest.mark.parametrize(
    "degrade", [merged(), merged("paper", UNIT), magnitude_pruned(), gated(1e-4), gated(1e-4, UNIT)]
)
def test_each_way_over_the_air_has_finite_gradients(degrade):
    params = {
        "decoder": jax.random.normal(jax.random.key(2), (4, 3)),
        "gate": init_gate(jax.random.key(4), 256),
    }
    loss = decoder_distillation_loss(linear_decoder, degrade, Ranges())
    grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(params, jax.random.key(3), data())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.abs(grads["decoder"]).max() > 0
    assert float(metrics["mse"]) > 0


def test_the_gate_learns_from_pixels_and_from_its_penalty():
    params = {"decoder": jnp.ones((4, 3)), "gate": init_gate(jax.random.key(4), 256)}

    def slope(kl_weight):
        loss = decoder_distillation_loss(linear_decoder, gated(kl_weight), Ranges(ratio=(0.0, 0.0)))
        return jax.grad(lambda p: loss(p, jax.random.key(3), data())[0])(params)["gate"]["out"]["bias"]

    assert np.abs(slope(0.0)).max() > 0
    # More of the penalty closes gates: in sum the logits' slopes rise.
    assert slope(1.0).sum() > slope(0.0).sum()


def test_closing_all_gates_alike_changes_neither_what_arrives_nor_the_penalty():
    """The channel's noise is relative to the message, and so is the penalty's."""
    z = jax.random.normal(jax.random.key(0), (4, 4, 4))
    params = {"gate": init_gate(jax.random.key(4), 64)}
    params["gate"]["out"] |= {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}  # gamma = 1/2

    def arrives(logit):
        params["gate"]["out"]["bias"] = jnp.full(64, logit)
        half_open = jax.nn.sigmoid(logit)
        got, penalty = gated(1.0)(params, jax.random.key(1), z, jnp.array(0.0), jnp.array(10.0))
        return np.asarray(got / half_open), float(penalty)

    (open_z, open_kl), (closed_z, closed_kl) = arrives(0.0), arrives(-3.0)
    np.testing.assert_allclose(open_z, closed_z, rtol=2e-3, atol=2e-3)  # 16-bit symbols
    assert open_kl == pytest.approx(closed_kl, rel=1e-3)
    assert open_kl > 1


@pytest.mark.parametrize("degrade", [merged(), gated(1e-4)])
def test_quality_weighs_each_sample_by_its_own_error(degrade):
    """Its slope is that of the plain loss, sample by sample, over the sample's error."""
    params = {
        "decoder": jax.random.normal(jax.random.key(2), (4, 3)),
        "gate": init_gate(jax.random.key(4), 256),
    }
    key = jax.random.key(3)

    def one(objective):
        return decoder_distillation_loss(linear_decoder, degrade, Ranges(), objective)

    plain, metrics = jax.grad(one("mse"), has_aux=True)(params, key, data(1))
    quality, _ = jax.grad(one("quality"), has_aux=True)(params, key, data(1))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(quality), strict=True):
        np.testing.assert_allclose(a / metrics["mse"], b, rtol=1e-4, atol=1e-6)

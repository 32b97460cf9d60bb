"""Eqs. (1)-(7) against hand-worked numbers; the units of the published code's slips."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megjax.link import profiles
from megjax.link.cost import Compute, Workload, frame_cost

COMPUTE = Compute(
    es_fixed_s=0.1, es_step_s=0.2, ue_s=0.3, es_fixed_j=10.0, es_step_j=20.0, ue_j=30.0, fixed_j=5.0
)


def test_parts_by_hand():
    cost = frame_cost(COMPUTE, 7, 2e6, 1e6, tx_power_w=0.5)
    np.testing.assert_allclose(cost.latency_es_s, 0.1 + 7 * 0.2, rtol=1e-6)
    np.testing.assert_allclose(cost.latency_tx_s, 2.0, rtol=1e-6)
    np.testing.assert_allclose(cost.latency_s, 0.1 + 1.4 + 2.0 + 0.3, rtol=1e-6)
    np.testing.assert_allclose(cost.energy_es_j, 150.0, rtol=1e-6)
    np.testing.assert_allclose(cost.energy_tx_j, 1.0, rtol=1e-6)
    np.testing.assert_allclose(cost.energy_j, 150.0 + 1.0 + 30.0 + 5.0, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 12), st.floats(1e3, 1e8), st.floats(1e5, 1e8), st.floats(0.01, 10.0))
def test_parts_add_up(steps, bits, rate, power):
    cost = frame_cost(COMPUTE, steps, bits, rate, power)
    latency = cost.latency_es_s + cost.latency_tx_s + cost.latency_ue_s
    energy = cost.energy_es_j + cost.energy_tx_j + cost.energy_ue_j + cost.energy_fixed_j
    np.testing.assert_allclose(cost.latency_s, latency, rtol=1e-5)
    np.testing.assert_allclose(cost.energy_j, energy, rtol=1e-5)


def test_traced_once_for_every_request():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def latency(steps, bits, rate):
        return frame_cost(COMPUTE, steps, bits, rate).latency_s

    values = [latency(jnp.asarray(t), jnp.asarray(1e6 * t), jnp.asarray(1e6)) for t in (4, 8, 12)]
    assert np.all(np.diff(values) > 0)


def test_transmission_joules_are_not_a_hundred_times_too_big():
    """One watt on the air for a second is a joule. The published code adds it to hundreds of joules."""
    cost = frame_cost(COMPUTE, 4, 1e6, 1e6, tx_power_w=1.0)
    np.testing.assert_allclose(cost.energy_j - frame_cost(COMPUTE, 4, 0.0, 1e6).energy_j, 1.0, atol=2e-5)


def test_server_and_device_energies_are_not_swapped():
    cost = frame_cost(profiles.compute(profiles.load("paper")), 8, 0.0, 1e6)
    # 16 U-Net calls against one decoding.
    assert cost.energy_es_j > 5 * cost.energy_ue_j


def test_image_to_image_alone_pays_the_vae_encoder():
    paper = profiles.load("paper")
    text = profiles.compute(paper)
    image = profiles.compute(paper, image_to_image=True)
    np.testing.assert_allclose(
        (image.es_fixed_s - text.es_fixed_s) * paper.server.flops_per_s, 4.9e12, rtol=1e-9
    )
    assert image.es_step_s == text.es_step_s


def test_guidance_charges_two_calls():
    paper = profiles.load("paper")
    one = profiles.compute(paper, Workload(calls_per_step=1))
    np.testing.assert_allclose(profiles.compute(paper).es_step_s, 2 * one.es_step_s)

"""Policies behind the server: requests that name limits alone."""

import json

import jax.numpy as jnp
import pytest

from megjax.errors import MegError
from megjax.link import channel
from megjax.rl.env import action_of
from megjax.rl.networks import Moments
from megjax.rl.policy import Policy, PolicyInfo, PolicyParams, save_policy
from megjax.serve.choice import MOST_SNR_DB, choose, covering, snr_db_of

ONE, RANGE = ((3.0, 1.8),), ((2.0, 1.0), (4.0, 1.8))


def policy(limits=ONE, *, conditioned=False, steps=7, ratio=0.4, slope=0.0):
    """A policy that takes these steps; its ratio rises by `slope` a decibel of the channel."""
    observed = 5 if conditioned else 3
    bias = jnp.concatenate([2.0 * (action_of(steps, ratio) - 0.5), jnp.zeros(2)])
    first = jnp.zeros((observed, 4)).at[0, 0].set(1e-3)
    head = jnp.zeros((4, 4)).at[0, 1].set(2e3 * slope)
    actor = ((first, jnp.zeros(4)), (head, bias))
    moments = Moments(jnp.ones(()), jnp.zeros(observed), jnp.ones(observed))
    params = PolicyParams(actor, moments, (jnp.asarray(0.01), jnp.asarray(0.01)))
    return Policy(params, PolicyInfo(limits, conditioned, 4, 12, hidden_layers=1))


@pytest.mark.parametrize("distance_m", [200.0, 250.0, 300.0])
def test_the_channels_state_follows_from_its_rate(distance_m):
    snr = channel.snr(distance_m)
    assert snr_db_of(float(channel.rate_bps(snr))) == pytest.approx(float(channel.to_db(snr)), abs=1e-4)


def test_the_channels_state_is_bounded():
    assert snr_db_of(1e15) == MOST_SNR_DB
    assert snr_db_of(1e-3) == -MOST_SNR_DB


def test_the_first_policy_that_keeps_the_limits_chooses():
    policies = [
        policy(((1.0, 1.0),), steps=4),
        policy(ONE, steps=7),
        policy(RANGE, conditioned=True, steps=9),
    ]
    for limits, steps in (((1.0, 1.0), 4), ((3.0, 1.8), 7), ((3.0005, 1.8), 7), ((2.5, 1.5), 9)):
        assert choose(policies, limits, 1e6).steps == steps
    with pytest.raises(
        MegError, match=r"1 s and 1000 J \(1 kJ\); 3 s and 1800 J \(1.8 kJ\); 2 s .* to 4 s and 1800 J"
    ):
        covering(policies, (5.0, 1.8))


@pytest.fixture
def asked(run, tmp_path):
    def ask(policies, generates=True, **changes):
        for i, each in enumerate(policies):
            save_policy(tmp_path / f"{i}.safetensors", each)
        paths = tuple(tmp_path / f"{i}.safetensors" for i in range(len(policies)))

        async def test(server):
            body = {"limits": {"latency_s": 3.0, "energy_j": 1800.0}, **changes}
            return await server.post(steps=None, ratio=None, **body), (
                await server.http.get("/v1/info")
            ).json()

        return run(test, policies=paths, generates=generates)

    return ask


def test_the_policy_chooses_by_the_channel_reported(asked):
    better = channel.rate_bps(channel.from_db(1.0))
    worse = channel.rate_bps(channel.from_db(-1.0))
    found = {}
    for name, rate in (("better", better), ("worse", worse)):
        answer, info = asked([policy(slope=-0.1)], channel={"rate_bps": float(rate)})
        result = json.loads(answer.headers["megjax-result"])
        assert (result["chosen_by"], result["steps"]) == ("policy", 7)
        assert 8 * (len(answer.content) - 32) == result["payload_bits"]
        found[name] = result["ratio"]
    assert found["better"] == pytest.approx(0.3, abs=0.01)
    assert found["worse"] == pytest.approx(0.5, abs=0.01)
    kept = [{"latency_s": 3.0, "energy_j": 1800.0}]
    assert info["policies"] == [{"conditioned": False, "limits": kept, "steps": [4, 12]}]


def test_a_policy_that_chooses_more_steps_than_are_served_is_not_loaded(run, tmp_path):
    save_policy(tmp_path / "policy.safetensors", policy())
    with pytest.raises(MegError, match="chooses 4 to 12 steps, this server takes 4 to 8"):
        run(None, policies=(tmp_path / "policy.safetensors",), max_steps=8)


def test_a_choice_beyond_what_can_be_merged_is_the_most(asked):
    answer, _ = asked([policy(ratio=1.0)])
    assert json.loads(answer.headers["megjax-result"])["ratio"] == 0.9375


def test_limits_that_no_policy_keeps_are_refused(asked):
    answer, _ = asked([policy()], generates=False, limits={"latency_s": 1.0, "energy_j": 1800.0})
    assert answer.status_code == 422
    assert answer.json()["error"] == "limits: the policies here keep 3 s and 1800 J (1.8 kJ)"

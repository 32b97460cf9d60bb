"""The environment against hand-worked frames, gymnax's contract and gymnasium's checker."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from megjax.link import channel
from megjax.link.channel import LinkParams
from megjax.rl.env import REFERENCE, EnvParams, action_of, denoising_steps, make_env
from megjax.rl.evaluate import rollout
from megjax.rl.optimum import tables

ENV = make_env()


def frame_by_hand(snr, steps, ratio):
    rate = 1e6 * np.log2(1 + snr)
    seconds = 65536 * 16 * ((1 - ratio) + ratio / 16) / rate
    mse = 0.008 + 0.012 * np.exp(-(steps - 4) / 2.5) + 0.02 * ratio**2
    return -np.log(mse), 0.3007 * steps + 0.826 + seconds, 0.13 * steps + 0.25 + seconds / 1000


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 12), st.floats(0.0, 1.0), st.integers(0, 1000))
def test_frames_of_the_reference_problem(steps, ratio, seed):
    _, state = ENV.reset(jax.random.key(seed), REFERENCE)
    action = action_of(steps, ratio)
    _, _, reward, terminated, truncated, info = ENV.step(jax.random.key(1), state, action, REFERENCE)
    expected = frame_by_hand(float(state.snr), steps, float(action[1]))
    np.testing.assert_allclose([reward, *info["cost"]], expected, rtol=2e-5)
    assert not terminated
    assert not truncated


def test_steps_of_an_action_cover_the_range_evenly():
    actions = jnp.asarray((np.arange(900) + 0.5) / 900)
    counts = np.bincount(np.asarray(denoising_steps(actions, REFERENCE)).astype(int))
    np.testing.assert_array_equal(counts, [0] * 4 + [100] * 9)
    # The published map, 4 + int(8 a), reaches 12 at a = 1 only.
    np.testing.assert_array_equal(denoising_steps(jnp.asarray([0.0, 0.95, 1.0]), REFERENCE), [4, 12, 12])


def test_episode_ends_by_truncation_and_shows_its_last_state():
    def step(carry, key):
        state = carry
        observation, state, _, terminated, truncated, info = ENV.step(key, state, jnp.full(2, 0.5), REFERENCE)
        return state, (observation, terminated, truncated, info["final_observation"], info["cost"])

    _, state = ENV.reset(jax.random.key(0), REFERENCE)
    keys = jax.random.split(jax.random.key(1), 130)
    _, (observation, terminated, truncated, final, cost) = jax.lax.scan(step, state, keys)
    assert not terminated.any()
    np.testing.assert_array_equal(np.nonzero(np.asarray(truncated))[0], [63, 127])
    # After a reset the last frame's costs are forgotten; the final observation still has them.
    np.testing.assert_array_equal(observation[63, 1:], 0.0)
    np.testing.assert_allclose(final[63, 1:], cost[63])
    np.testing.assert_allclose(observation[62, 1:], cost[62])


def test_limits_powers_and_budgets_are_traced():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def frame(params):
        _, state = ENV.reset(jax.random.key(0), params)
        return ENV.step(jax.random.key(1), state, jnp.full(2, 0.3), params)[-1]["cost"]

    weak = dataclasses.replace(REFERENCE, link=LinkParams(tx_power_dbm=20.0))
    strict = dataclasses.replace(REFERENCE, limits=(2.0, 1.0))
    assert frame(weak)[0] > frame(REFERENCE)[0]
    np.testing.assert_array_equal(frame(strict), frame(REFERENCE))
    limits = jnp.asarray([[2.0, 1.0], [3.0, 1.8]])
    batch = jax.vmap(lambda own: dataclasses.replace(REFERENCE, limits=own))(limits)
    observe = make_env(observe_limits=True)
    observation, _ = jax.vmap(observe.reset, (None, 0))(jax.random.key(0), batch)
    np.testing.assert_allclose(observation[:, 3:], limits)


@pytest.mark.parametrize("fading", ["none", "rayleigh", "rician"])
def test_channel_follows_the_link(fading):
    link = LinkParams(fading=fading, doppler_hz=0.01, frame_s=3.0)
    params = EnvParams(link=link)
    keys = jax.random.split(jax.random.key(0), 4000)
    _, state = jax.vmap(ENV.reset, (0, None))(keys, params)
    following = jax.vmap(lambda k, s: ENV.step(k, s, jnp.full(2, 0.5), params)[1])(keys, state)
    distance = jnp.linspace(200.0, 300.0, 4001)
    mean = float(jnp.mean(channel.snr(distance)))
    # Mean fading power is 1, in the first frame as in the next.
    np.testing.assert_allclose(np.mean(state.snr), mean, rtol=0.06)
    np.testing.assert_allclose(np.mean(following.snr), mean, rtol=0.06)
    if fading == "rayleigh":
        rho = float(channel.doppler_correlation(0.01, 3.0))
        got = np.mean(np.asarray(following.fading) * np.conj(np.asarray(state.fading)))
        np.testing.assert_allclose(got.real, rho, atol=0.05)


def test_shadowing_is_drawn_wherever_the_link_has_it():
    """In the first frame, the next and the tables of the optimum, against numpy's draws."""
    params = EnvParams(link=LinkParams(shadowing_std_db=8.0))
    rng = np.random.default_rng(0)
    distance_m, shadowing_db = rng.uniform(200, 300, 20_000), rng.normal(0, 8, 20_000)
    expected_db = 124 - 35.3 - 37.6 * np.log10(distance_m) - shadowing_db
    keys = jax.random.split(jax.random.key(0), 4000)
    _, state = jax.jit(jax.vmap(ENV.reset, (0, None)))(keys, params)
    following = jax.vmap(lambda k, s: ENV.step(k, s, jnp.full(2, 0.5), params)[1])(keys, state)
    for snr in (state.snr, following.snr):
        assert scipy.stats.ks_2samp(10 * np.log10(np.asarray(snr)), expected_db).pvalue > 1e-3
    middles = (np.arange(20) + 0.5) / 20
    bins_db = 10 * np.log10(tables(params, bins=20, ratios=2).snr_S)
    np.testing.assert_allclose(bins_db, np.quantile(expected_db, middles), atol=0.4)


def test_rollouts_are_the_policys_frames():
    def act(key, observation):
        return jnp.stack([0.1 * observation[:, 0] % 1.0, jax.random.uniform(key, (5,))], axis=1)

    seen = rollout(jax.random.key(0), ENV, act, REFERENCE, copies=5, frames=70)
    assert seen.signal.shape == (5, 70, 3)
    np.testing.assert_array_equal(np.nonzero(np.asarray(seen.truncated[2]))[0], [63])
    np.testing.assert_array_equal(seen.observation[:, 1:63], seen.successor[:, :62])
    np.testing.assert_allclose(seen.action[..., 0], 0.1 * seen.observation[..., 0] % 1.0, rtol=1e-6)
    # What a frame cost is in the next state.
    np.testing.assert_array_equal(seen.successor[..., 1:], seen.signal[..., 1:])
    snr = 10 ** (np.asarray(seen.observation[0, 9, 0], float) / 10)
    steps, ratio = denoising_steps(seen.action[0, 9, 0], REFERENCE), float(seen.action[0, 9, 1])
    np.testing.assert_allclose(seen.signal[0, 9], frame_by_hand(snr, float(steps), ratio), rtol=1e-4)


def test_gymnasium_accepts_it():
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    from megjax.rl.gymnasium_env import MegEnv, MegVectorEnv

    check_env(MegEnv(), skip_render_check=True)
    with pytest.raises(gymnasium.error.ResetNeeded):
        MegEnv().step(np.array([0.2, 0.3], np.float32))
    first = [MegEnv().reset()[0][0] for _ in range(3)] + [MegVectorEnv(1).reset()[0][0, 0] for _ in range(3)]
    assert len(set(first)) == 6  # unseeded, each has a channel of its own
    env = gymnasium.wrappers.RecordEpisodeStatistics(MegEnv(cost_of=lambda costs: float(costs[0])))
    env.reset(seed=3)
    for frame in range(64):
        *_, truncated, info = env.step(np.array([0.2, 0.3], np.float32))
        assert truncated == (frame == 63)
        assert isinstance(info["cost"], float)
    shadowed, _ = MegVectorEnv(500, params=EnvParams(link=LinkParams(shadowing_std_db=8.0))).reset(seed=3)
    assert np.std(shadowed[:, 0]) > 7.0  # 2 dB without it
    vector = MegVectorEnv(3)
    observation, _ = vector.reset(seed=3)
    assert vector.observation_space.contains(observation)
    with jax.enable_x64(True):
        for one in (MegEnv(), MegVectorEnv(2)):
            assert one.observation_space.contains(one.reset(seed=1)[0])
            assert one.observation_space.contains(one.step(one.action_space.sample())[0])
    for frame in range(64):
        observation, _, _, truncated, info = vector.step(np.full((3, 2), 0.4, np.float32))
        assert truncated.all() == (frame == 63)
        assert info["cost"].shape == (3, 2)
    assert info["final_obs"][0].shape == (3,)
    assert info["final_obs"][0][1] > 0 == observation[0, 1]


@pytest.mark.parametrize("ends", [(1,), (0, 1, 2)], ids=["one ends", "all end"])
def test_what_ended_is_laid_out_as_by_gymnasium(ends):
    gymnasium = pytest.importorskip("gymnasium")
    from megjax.rl.gymnasium_env import MegEnv, MegVectorEnv

    def step(key, state, action, params):
        observation, state, reward, _, truncated, info = ENV.step(key, state, action, params)
        return observation, state, reward, action[0] > 0.9, truncated, info

    env = ENV._replace(step=step)
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    theirs = gymnasium.vector.SyncVectorEnv([lambda: MegEnv(env)] * 3, autoreset_mode=same_step)
    ours = MegVectorEnv(3, env)
    action = np.full((3, 2), 0.4, np.float32)
    action[list(ends), 0] = 0.95

    def layout(value):
        if isinstance(value, dict):
            return {name: layout(entry) for name, entry in value.items()}
        if value.dtype == object:
            return (value.shape, [None if row is None else (row.shape, row.dtype) for row in value])
        return (value.shape, value.dtype, value.tolist() if value.dtype == bool else None)

    infos = []
    for vector in (theirs, ours):
        vector.reset(seed=3)
        _, _, terminated, truncated, info = vector.step(action)
        np.testing.assert_array_equal(np.flatnonzero(terminated), ends)
        assert not truncated.any()
        infos.append({name: layout(info[name]) for name in info if "final" in name})
    assert infos[0] == infos[1]
    assert infos[1]["final_obs"][0] == (3,)
    assert not info["final_info"]["cost"][~terminated].any()
    assert (info["final_info"]["cost"][terminated] > 0).all()
    assert (info["cost"] > 0).all()
    assert info["_cost"].all()

"""The learners' parts: targets, advantages, trust regions, replay, multipliers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megjax.errors import MegError
from megjax.rl import networks
from megjax.rl.algorithm import Transition, whole_run
from megjax.rl.cvpo import CvpoConfig, make_cvpo
from megjax.rl.env import Env
from megjax.rl.mstep import TrustRegion, m_step
from megjax.rl.networks import Gaussian
from megjax.rl.ppo import Pid, PpoConfig, gae, make_ppo, pid_multiplier
from megjax.rl.replay import make_replay
from megjax.rl.targets import bootstrap, n_step


def test_n_step_targets_by_hand():
    """Five stretches of two frames: undisturbed, truncated or terminated after the first or the second."""
    signal = jnp.asarray([[[1.0], [10.0]]] * 5)
    terminated = jnp.asarray([[0, 0], [0, 0], [1, 0], [0, 0], [0, 1]], bool)
    truncated = jnp.asarray([[0, 0], [1, 0], [0, 0], [0, 1], [0, 0]], bool)
    successor = jnp.asarray([[[100.0], [200.0]]] * 5)
    stretch = n_step(signal, terminated, truncated, successor, 0.5)
    np.testing.assert_allclose(stretch.successor[:, 0], [200, 100, 100, 200, 200])
    target = bootstrap(stretch, stretch.successor)
    np.testing.assert_allclose(
        target[:, 0], [1 + 5 + 0.25 * 200, 1 + 0.5 * 100, 1.0, 1 + 5 + 0.25 * 200, 1 + 5]
    )
    # Critics of signals less their mean J = 1 hold the end at -J / (1 - gamma), and differ by just that.
    centred = bootstrap(
        n_step(signal - 1, terminated, truncated, successor - 2, 0.5), stretch.successor - 2, -2.0
    )
    np.testing.assert_allclose(target - 2, centred)


def test_gae_matches_its_definition():
    rng = np.random.default_rng(0)
    frames, discount, decay = 12, 0.9, 0.8
    signal, value, after = rng.normal(size=(3, frames, 1, 2))
    terminated = np.zeros((frames, 1), bool)
    truncated = np.zeros((frames, 1), bool)
    terminated[3], truncated[7] = True, True
    expected = np.zeros((frames, 1, 2))
    for start in range(frames):
        weight = 1.0
        for t in range(start, frames):
            follow = 0.0 if terminated[t, 0] else after[t]
            expected[start] += weight * (signal[t] + discount * follow - value[t])
            if terminated[t, 0] or truncated[t, 0]:
                break
            weight *= discount * decay
    args = [jnp.asarray(x) for x in (signal, value, after, terminated, truncated)]
    np.testing.assert_allclose(gae(*args, discount, decay), expected, rtol=1e-4, atol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CountdownParams:
    limits: jax.Array
    terminates: jax.Array


def countdown() -> Env:
    """Return an environment of four frames, a unit of reward each, that terminates or is truncated."""

    def reset(key, params):
        return jnp.zeros(1), jnp.zeros(())

    def step(key, state, action, params):
        over = state + 1 >= 4
        # Cut off, the count would go on from 1: a state that the critics know, and not the reset's.
        final = jnp.where(over, 1.0, state + 1)[None]
        state = jnp.where(over, 0.0, state + 1)
        info = {"cost": jnp.ones(1), "final_observation": final}
        return state[None], state, jnp.ones(()), over & params.terminates, over & ~params.terminates, info

    return Env(reset, step, 1, 1, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"discount": 1.0}, "discount 1.0.* below 1"),
        ({"discount": float("nan")}, "discount nan"),
        ({"std_end": (0.01, 0.0)}, "std_end 0.0.*above 0"),
        ({"mean_memory": 0.0}, "mean_memory 0.0.*at least 1"),
        ({"hidden": ()}, "at least one layer"),
        ({"hidden": (8, 0)}, "hidden 0"),
        ({"epochs": 0}, "epochs 0"),
        ({"envs": 4, "greedy_envs": 4}, "greedy_envs 4: from 0 to below envs"),
    ],
)
def test_settings_out_of_range_are_refused_by_both_learners(fields, message):
    for make, config in ((make_cvpo, CvpoConfig), (make_ppo, PpoConfig)):
        with pytest.raises(MegError, match=message):
            make(config(**fields), countdown())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CvpoConfig(updates_per_epoch=0), "updates_per_epoch 0.*at least 1"),
        (CvpoConfig(particles=1), "particles 1.*at least 2"),
        (CvpoConfig(kl_bound=0.0), "kl_bound 0.0.*above 0"),
        (CvpoConfig(kl_bound=3.5, particles=32), "kl_bound 3.5: no weights of 32 particles differ by 3.47"),
        (CvpoConfig(critic_lr=float("inf")), "critic_lr inf.*finite"),
        (CvpoConfig(dual_solver="gradient", dual_max=0.0), "dual_max 0.*above 0"),
        (CvpoConfig(trust_region=TrustRegion(iterations=0)), "iterations 0.*at least 1"),
        (CvpoConfig(policy_batch=8, critic_batch=4), "policy_batch 8: at most critic_batch, 4"),
        # Stretches of two frames of which the first epoch would have written one.
        (CvpoConfig(collect_steps=1, n_step=2), "collect_steps 1: from n_step, 2"),
        (CvpoConfig(replay_frames=16), "collect_steps 4: .*to the 0 frames"),
        (PpoConfig(pid=Pid(integral=-1.0)), "integral -1.0"),
        (PpoConfig(pid=Pid(units=(1.0, 0.0))), "units 0.0: must be a finite number, above 0"),
        (PpoConfig(minibatches=7), "minibatches 7: they must divide the 4096"),
        (PpoConfig(passes=0), "passes 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(MegError, match=message):
        (make_cvpo if isinstance(config, CvpoConfig) else make_ppo)(config, countdown())


def test_truncation_bootstraps_and_termination_does_not():
    """Worth 1 / (1 - gamma) = 5 if only cut off, 1 + gamma + gamma^2 + gamma^3 = 2.952 if it really ends."""
    config = CvpoConfig(
        envs=8,
        greedy_envs=0,
        epochs=2000,
        critic_batch=64,
        policy_batch=4,
        particles=4,
        hidden=(32,),
        knots=0,
        discount=0.8,
        critic_lr=1e-2,
        replay_frames=512,
        target_rate=0.2,
    )
    train = jax.jit(whole_run(make_cvpo(config, countdown())))
    for terminates, worth in ((False, [5.0, 5.0]), (True, [2.952, 1.0])):
        state, _ = train(jax.random.key(0), CountdownParams(jnp.ones(1), jnp.asarray(terminates)))
        observation = networks.normalise(state.moments, jnp.asarray([[0.0], [3.0]]))
        value = networks.critics(state.critics, observation, jnp.full((2, 1), 0.5), 0)
        offset = state.means.signal[0] / (1 - config.discount)
        np.testing.assert_allclose(value[:, 0] + offset[0], worth, atol=0.25)
        np.testing.assert_allclose(value[:, 1] + offset[1], worth, atol=0.25)


@pytest.mark.parametrize("project", [True, False])
def test_m_step_moves_towards_the_weights_within_its_bounds(project):
    key = jax.random.key(0)
    observation = jax.random.normal(key, (64, 3))
    params = networks.init_policy(jax.random.key(1), 3, 2, (32, 32))

    def policy(params):
        return networks.policy(params, observation, (0.05, 0.5))

    old = policy(params)
    noise = jax.random.normal(jax.random.key(2), (64, 32, 2))
    particles = old.mean[:, None] + old.std[:, None] * noise
    weights = jax.nn.softmax(5.0 * particles[..., 0] - 3.0 * particles[..., 1], axis=1)
    optimizer = optax.adam(1e-2)
    region = TrustRegion(
        mean_bound=0.005,
        std_bound=5e-4,
        dual_lr=0.0 if project else 100.0,
        dual_max=1e3,
        iterations=30,
        project=project,
    )
    result = jax.jit(
        lambda p: m_step(policy, p, optimizer.init(p), jnp.zeros(2), particles, weights, optimizer, region)
    )(params)
    new = policy(result.params)
    shift = jnp.mean(new.mean - old.mean, axis=0)
    assert shift[0] > 0 > shift[1]
    mean_kl, std_kl = (float(jnp.mean(part)) for part in networks.kl_parts(old, new))
    np.testing.assert_allclose(result.kl, [mean_kl, std_kl], rtol=1e-3, atol=1e-7)
    if project:
        assert mean_kl <= 0.005 * 1.02
        assert std_kl <= 5e-4 * 1.02
        assert max(mean_kl / 0.005, std_kl / 5e-4) > 0.5  # it does use the room it has
    else:
        # The duals alone: the bound is only reached on average, but they must hold the step back.
        free = m_step(
            policy,
            params,
            optimizer.init(params),
            jnp.zeros(2),
            particles,
            weights,
            optimizer,
            TrustRegion(dual_lr=0.0, iterations=30, project=False),
        )
        assert mean_kl < 0.5 * float(free.kl[0])
        assert float(result.beta[0]) > 0


def test_kl_parts_add_up_to_the_divergence():
    rng = np.random.default_rng(0)
    means, stds = rng.normal(size=(2, 5, 2)), rng.uniform(0.1, 1.0, (2, 5, 2))
    same_std = [Gaussian(jnp.asarray(m), jnp.asarray(stds[0])) for m in means]
    same_mean = [Gaussian(jnp.asarray(means[0]), jnp.asarray(s)) for s in stds]
    for (old, new), part in ((same_std, 0), (same_mean, 1)):
        ratio = np.asarray(old.std / new.std)
        z = np.asarray((new.mean - old.mean) / new.std)
        kl = np.sum(0.5 * (ratio**2 + z**2 - 1) - np.log(ratio), axis=-1)
        np.testing.assert_allclose(networks.kl_parts(old, new)[part], kl, rtol=1e-5, atol=1e-6)


def test_critics_share_the_state_but_not_the_answer():
    """The per-particle shortcut is the plain network on (state, action)."""
    params = networks.init_critics(jax.random.key(0), 3, 2, (16, 16), (1, 1, 1), 4)
    observation = jax.random.normal(jax.random.key(1), (5, 3))
    action = jax.random.uniform(jax.random.key(2), (5, 7, 2))
    value = networks.critics(params, observation, action, 4)
    one = networks.critics(params, observation, action[:, 3], 4)
    np.testing.assert_allclose(value[:, 3], one, rtol=1e-4, atol=1e-6)
    joined = jnp.concatenate([observation, networks.action_features(action[:, 3], 4)], axis=1)
    for i, network in enumerate(params):
        np.testing.assert_allclose(value[:, 3, i], networks.mlp(network, joined)[:, 0], rtol=1e-4, atol=1e-6)


def test_hat_features_sum_to_one():
    action = jnp.linspace(-0.5, 1.5, 33)[:, None]
    hats = networks.action_features(action, 8)[:, 1:]
    np.testing.assert_allclose(jnp.sum(hats, axis=1), 1.0, rtol=1e-6)
    # At its knots one hat is 1, half-way between two both are a half.
    at_knots = networks.action_features(jnp.linspace(0.0, 1.0, 8)[:, None], 8)[:, 1:]
    np.testing.assert_allclose(at_knots, np.eye(8), atol=1e-6)
    between = networks.action_features(jnp.linspace(0.5 / 7, 6.5 / 7, 7)[:, None], 8)[:, 1:]
    np.testing.assert_allclose(between, (np.eye(8)[:-1] + np.eye(8)[1:]) / 2, atol=1e-6)


def test_moments_match_numpy():
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, (n, 2)).astype(np.float32) for n in (5, 17, 300)]
    moments = networks.init_moments(2)
    for batch in batches:
        moments = networks.update_moments(moments, jnp.asarray(batch))
    everything = np.concatenate(batches)
    np.testing.assert_allclose(moments.mean, everything.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(moments.var, everything.var(axis=0), rtol=1e-5)


def test_replay_keeps_groups_apart_and_frames_in_order():
    groups, envs, length = 3, 4, 2
    replay = make_replay(groups, envs, 64, 32, length, (1, 1, 1))

    def frames(start):
        index = jnp.arange(groups * envs * 8, dtype=jnp.float32).reshape(groups, envs, 8, 1)
        group = jnp.broadcast_to(jnp.arange(groups, dtype=jnp.float32)[:, None, None, None], index.shape)
        no = jnp.zeros((groups, envs, 8), bool)
        time = jnp.broadcast_to(start + jnp.arange(8.0)[None, None, :, None], index.shape)
        return Transition(time, group, index, no, no, time + 1)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def add_and_sample(state, frames, key):
        state = replay.add(state, frames)
        return state, replay.sample(state, key)

    state = replay.init()
    for i in range(3):
        state, batch = add_and_sample(state, frames(8.0 * i), jax.random.key(i))
    assert batch.observation.shape == (groups, 32, length, 1)
    np.testing.assert_array_equal(
        batch.action[..., 0], np.arange(3)[:, None, None] * np.ones((1, 32, length))
    )
    np.testing.assert_array_equal(batch.observation[:, :, 1], batch.successor[:, :, 0])
    # One copy's: within a stretch numbers go up by one, or to the next eight, which start at its first again.
    assert np.isin(batch.signal[:, :, 1] - batch.signal[:, :, 0], (1, -7)).all()
    assert batch.observation.min() >= 8.0  # 16 frames of each copy fit; the first 8 are gone


def test_pid_multiplier():
    pid = Pid(proportional=2.0, integral=0.5, derivative=1.0, max_error=0.5)
    lam, integral = pid_multiplier(pid, jnp.asarray(0.1), jnp.asarray(0.0), jnp.asarray(0.2))
    np.testing.assert_allclose(integral, 0.25)
    np.testing.assert_allclose(lam, 0.2 + 0.25 + 0.1, rtol=1e-6)
    for violation, integral in ((3.0, 1.25), (-3.0, 0.75)):  # wound up by no more than half a limit
        found = pid_multiplier(pid, jnp.asarray(violation), jnp.asarray(0.0), jnp.asarray(1.0))
        np.testing.assert_allclose(found[1], integral)
    lam, integral = pid_multiplier(pid, jnp.asarray(-1.0), jnp.asarray(0.1), jnp.asarray(0.2))
    assert lam == integral == 0.0

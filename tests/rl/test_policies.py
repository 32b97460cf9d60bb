"""Whole runs: close to the optimum and its prices, no NaN at impossible limits, saved and resumed."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.errors import MegError
from megjax.rl import training
from megjax.rl.algorithm import whole_run
from megjax.rl.cvpo import CvpoConfig, make_cvpo, make_train
from megjax.rl.env import REFERENCE, action_of, make_env
from megjax.rl.evaluate import evaluate
from megjax.rl.networks import Moments
from megjax.rl.optimum import tables
from megjax.rl.policy import Policy, PolicyInfo, PolicyParams, act, gaussian, load_policy, save_policy
from megjax.rl.ppo import PpoConfig, make_ppo
from megjax.rl.training import PolicyRunConfig, train_policies

SMALL = CvpoConfig(
    envs=8,
    greedy_envs=4,
    epochs=8,
    critic_batch=16,
    policy_batch=8,
    particles=8,
    hidden=(8, 8),
    knots=4,
    replay_frames=512,
)


def test_one_program_serves_all_limits_and_degrades_without_nan():
    config = CvpoConfig(epochs=1200)
    train = jax.jit(chex.assert_max_traces(make_train(config, make_env()), n=1))

    def run(limits, seed):
        params = dataclasses.replace(REFERENCE, limits=jnp.asarray(limits))
        return train(jax.random.key(seed), params)

    state, metrics = run([3.0, 1.8], 0)
    last = {k: np.mean(np.asarray(v)[-200:], axis=0) for k, v in metrics.items()}
    assert last["reward"][0] > 3.82
    assert abs(last["cost"][0, 0] - 3.0) < 0.06
    # The learned prices approach the shadow prices of the linear programme: 0.564 a second, 0 a kilojoule.
    np.testing.assert_allclose(last["lam"][0], [0.564, 0.0], atol=0.09)
    np.testing.assert_allclose(np.max(np.asarray(metrics["kl"])[:, 0]), 0.005, rtol=0.05)
    # No policy is faster than 2.117 s: the least violation is what remains.
    state, metrics = run([1.0, 1.8], 1)
    assert all(
        np.all(np.isfinite(x)) for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    )
    assert np.mean(np.asarray(metrics["cost"])[-100:, 0, 0]) < 2.2


@pytest.mark.parametrize(
    "make", [lambda env: make_cvpo(SMALL, env), lambda env: make_ppo(PpoConfig(epochs=2), env)]
)
def test_runs_trace_in_double_precision(make):
    with jax.enable_x64(True):
        train = whole_run(make(make_env()))
        _, metrics = jax.eval_shape(train, jax.random.key(0), REFERENCE)
    assert metrics["reward"].dtype == metrics["kl"].dtype == np.float64


@pytest.mark.long
@pytest.mark.parametrize(
    ("limits", "reward"), [((3.0, 1.8), 3.8688), ((2.5, 1.8), 3.5618), ((4.0, 1.0), 4.2694)]
)
def test_default_policies_reach_the_optimum(tmp_path, limits, reward):
    results = train_policies(PolicyRunConfig(limits=(limits,), seeds=(0, 1, 2), folder=tmp_path))
    for result in results:
        worth = result["deterministic"]
        assert worth["reward"] > reward - 0.03
        assert np.all(np.asarray(worth["costs"]) <= 1.003 * np.asarray(limits))
        assert np.all(np.asarray(result["sampled"]["costs"]) <= 1.01 * np.asarray(limits))


@pytest.fixture(scope="module")
def table():
    """Return coarse tables: what the optimum is does not matter to these tests."""
    return tables(bins=10, ratios=11)


@pytest.fixture
def compilation_cache(tmp_path):
    """Let the calls of one test share their compiled programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def test_interrupted_training_resumes_to_the_same_policies(tmp_path, monkeypatch, compilation_cache, table):
    config = PolicyRunConfig(
        learner=SMALL,
        limits=((3.0, 1.8), (2.5, 1.8)),
        seeds=(3,),
        chunks=2,
        episodes=4,
        folder=tmp_path / "whole",
    )
    whole = train_policies(config, table=table)
    assert [r["limits"] for r in whole] == [(3.0, 1.8), (2.5, 1.8)]
    log = training._log

    def interrupted(*args):
        if args[3] == 8:
            raise KeyboardInterrupt
        log(*args)

    config = dataclasses.replace(config, folder=tmp_path / "cut")
    monkeypatch.setattr(training, "_log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_policies(config, table=table)
    monkeypatch.setattr(training, "_log", log)
    train_policies(config, table=table)
    for name in ("limit_3_1.8_seed3.safetensors", "limit_2.5_1.8_seed3.safetensors"):
        chex.assert_trees_all_close(
            *(load_policy(tmp_path / run / name).params for run in ("whole", "cut")), rtol=1e-5, atol=1e-6
        )
    lines = [json.loads(x) for x in (tmp_path / "cut" / "curves.jsonl").read_text().splitlines()]
    assert [(x["epoch"], x["limits"]) for x in lines] == [(e, [d, 1.8]) for e in (4, 8) for d in (3.0, 2.5)]
    with pytest.raises(MegError, match="other settings"):
        train_policies(dataclasses.replace(config, seeds=(4,)), table=table)


def test_conditioned_runs_have_a_dual_for_each_limit(tmp_path, table):
    limits = ((2.3, 1.8), (4.0, 1.8))
    config = PolicyRunConfig(
        learner=SMALL, limits=limits, conditioned=True, chunks=1, episodes=4, folder=tmp_path
    )
    results = train_policies(config, table=table)
    assert [r["limits"] for r in results] == [*limits]
    policy = load_policy(tmp_path / "conditioned_seed0.safetensors")
    assert act(policy, 0.0, limits=(3.1, 1.8)).steps in range(4, 13)
    lines = [json.loads(x) for x in (tmp_path / "curves.jsonl").read_text().splitlines()]
    assert [line["limits"] for line in lines] == [[2.3, 1.8], [4.0, 1.8]]


def test_impossible_limits_are_refused_before_training(tmp_path):
    with pytest.raises(MegError, match=r"cannot be met.*2\.117"):
        train_policies(PolicyRunConfig(limits=((2.0, 1.8),), folder=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_ppo_trains(tmp_path, table):
    learner = PpoConfig(envs=8, collect_steps=8, epochs=4, minibatches=2, hidden=(8, 8))
    results = train_policies(
        PolicyRunConfig(learner=learner, chunks=2, episodes=4, folder=tmp_path), table=table
    )
    assert np.isfinite(results[0]["deterministic"]["reward"])


def constant_policy(steps, ratio, info):
    """Return a policy that always does the same."""
    mean = 2.0 * (action_of(steps, ratio) - 0.5)
    bias = jnp.concatenate([mean, jnp.zeros(2)])
    actor = ((jnp.zeros((3, 4)), jnp.zeros(4)), (jnp.zeros((4, 4)), bias))
    moments = Moments(jnp.ones(()), jnp.zeros(3), jnp.ones(3))
    return Policy(PolicyParams(actor, moments, (jnp.asarray(0.01), jnp.asarray(0.01))), info)


INFO = PolicyInfo(((3.0, 1.8),), conditioned=False, min_steps=4, max_steps=12, hidden_layers=1)


def test_saved_policies_come_back_and_act(tmp_path):
    policy = constant_policy(7, 0.25, INFO)
    save_policy(tmp_path / "a" / "policy.safetensors", policy)
    back = load_policy(tmp_path / "a" / "policy.safetensors")
    assert back.info == INFO
    choice = act(back, snr_db=-1.5)
    assert choice.steps == 7
    np.testing.assert_allclose(choice.ratio, 0.25, rtol=1e-5)
    drawn = {act(back, -1.5, key=jax.random.key(i)).ratio for i in range(5)}
    assert len(drawn) == 5
    assert act(back, -1.5, limits=(3.0, 1.8)) == choice
    with pytest.raises(MegError, match="trained for the limits"):
        act(back, -1.5, limits=(2.0, 1.8))
    with pytest.raises(MegError, match="finite"):
        act(back, float("nan"))


def test_other_files_are_not_policies(tmp_path):
    for name, content in (("empty", b""), ("text", b"hello, hello, hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MegError, match="not a MegJAX policy"):
            load_policy(tmp_path / name)
    with pytest.raises(MegError, match="not a MegJAX policy"):
        load_policy(tmp_path / "missing")


def test_evaluation_of_a_constant_policy():
    policy = constant_policy(4, 0.3375, INFO)

    def constant(key, observation):
        return gaussian(policy.params, observation).mean

    found = evaluate(jax.random.key(0), make_env(), constant, REFERENCE, episodes=200)
    np.testing.assert_allclose(found.reward, -np.log(0.02 + 0.02 * 0.3375**2), rtol=1e-4)
    np.testing.assert_allclose(found.costs[0], 3.0, atol=0.01)
    assert 0.3 < float(found.violations[0]) < 0.7
    assert float(found.violations[1]) == float(found.episode_violations[1]) == 0.0

"""Whole runs: close to the optimum and its prices, no NaN at impossible limits, saved and resumed."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from megjax.cli import main
from megjax.errors import MegError
from megjax.rl import training
from megjax.rl.algorithm import whole_run
from megjax.rl.cvpo import CvpoConfig, make_cvpo
from megjax.rl.env import REFERENCE, action_of, make_env
from megjax.rl.evaluate import evaluate
from megjax.rl.networks import Moments
from megjax.rl.optimum import tables
from megjax.rl.policy import Policy, PolicyInfo, PolicyParams, act, gaussian, load_policy, save_policy
from megjax.rl.ppo import PpoConfig, make_ppo
from megjax.rl.problem import Problem, tabulate, wire_payload
from megjax.rl.quality import make_table
from megjax.rl.training import PolicyRunConfig, train_policies
from train import policy as policy_main

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
    train = jax.jit(chex.assert_max_traces(whole_run(make_cvpo(config, make_env())), n=1))

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


@pytest.mark.parametrize("make", [make_cvpo, make_ppo])
def test_runs_in_double_precision(make, quick_compilation):
    learner = (
        SMALL
        if make is make_cvpo
        else PpoConfig(envs=12, greedy_envs=4, epochs=2, minibatches=2, hidden=(8, 8))
    )
    with jax.enable_x64(True):
        state, metrics = jax.jit(whole_run(make(learner, make_env())))(jax.random.key(0), REFERENCE)
    # In its first epoch the running mean is that epoch's, of the copies that explore.
    seen = np.concatenate([metrics["reward"][0][:, None], metrics["cost"][0]], axis=1)
    np.testing.assert_allclose(seen, metrics["mean_signal"][0], rtol=1e-9)
    leaves = [x for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert all(np.all(np.isfinite(x)) for x in leaves)
    assert {x.dtype for x in leaves} == {np.dtype("float64"), np.dtype("complex64")}


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
def quick_compilation():
    """Compile plainly: most of these tests' time is the compiler's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_interrupted_training_resumes_to_the_same_policy(
    tmp_path, monkeypatch, quick_compilation, table, capsys
):
    """A conditioned run: two limits, each with its own dual."""
    limits = ((2.3, 1.8), (4.0, 1.8))
    config = PolicyRunConfig(
        learner=SMALL,
        limits=limits,
        seeds=(3,),
        conditioned=True,
        chunks=4,
        episodes=4,
        folder=tmp_path / "whole",
    )
    told = []
    whole = train_policies(config, table=table, report=lambda share, note: told.append(share))
    assert [r["limits"] for r in whole] == [*limits]
    assert told == [0.25, 0.5, 0.75, 1.0]
    log = training._log

    def interrupted(file, *args):
        log(file, *args)
        if args[2] == 6:
            # Killed after the line and before the checkpoint, in the middle of the next line.
            file.write('{"epoch": 6, "se')
            file.flush()
            raise KeyboardInterrupt

    config = dataclasses.replace(config, folder=tmp_path / "cut")
    monkeypatch.setattr(training, "_log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_policies(config, table=table)
    monkeypatch.setattr(training, "_log", log)
    resumed = train_policies(config, table=table)
    for one, other in zip(whole, resumed, strict=True):
        assert one["deterministic"] == other["deterministic"]
        chex.assert_trees_all_equal(*(load_policy(Path(r["policy"])).params for r in (one, other)))
    lines = [
        [json.loads(x) | {"chunk_s": 0} for x in (tmp_path / run / "curves.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    assert [(x["epoch"], x["limits"][0]) for x in lines[1]] == [
        (e, d) for e in (2, 4, 6, 8) for d in (2.3, 4.0)
    ]
    with pytest.raises(MegError, match=r"other settings \(seeds\)"):
        train_policies(dataclasses.replace(config, seeds=(4,)), table=table)
    with pytest.raises(MegError, match=r"other settings \(problem\)"):
        train_policies(config, table=table._replace(rewards_SxA=1.01 * table.rewards_SxA))
    # The same problem on another machine, and a checkpoint that was damaged on the way there.
    newest = tmp_path / "cut" / "checkpoints" / "4"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    elsewhere = train_policies(config, table=table._replace(rewards_SxA=(1 + 1e-6) * table.rewards_SxA))
    assert "checkpoints/4 is damaged" in capsys.readouterr().err
    for one, other in zip(whole, elsewhere, strict=True):
        chex.assert_trees_all_equal(*(load_policy(Path(r["policy"])).params for r in (one, other)))
    policy = load_policy(Path(whole[0]["policy"]))
    assert act(policy, 0.0, limits=(3.1, 1.8)).steps in range(4, 13)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limits": ((3.0, float("inf")),)}, "finite"),
        ({"limits": ((0.0, 1.8),)}, "above 0"),
        ({"limits": ()}, "at least one"),
        ({"seeds": (1, 1)}, "once"),
        ({"seeds": (0, 2**32)}, r"seeds \(0, 4294967296\): 0 to 4294967295"),
        ({"seeds": (-1,)}, r"seeds \(-1,\): 0 to"),
        ({"table": "nowhere.npz"}, "not a quality table"),
        ({"table": "tiny", "psnr_db": float("nan")}, "psnr_db nan"),
        ({"learner": PpoConfig(discount=1.0)}, "discount 1.0"),
        ({"learner": PpoConfig(groups=2)}, r"learner\.groups 2: leave it at 1"),
    ],
)
def test_bad_settings_are_refused_before_training(tmp_path, fields, message):
    with pytest.raises(MegError, match=message):
        train_policies(PolicyRunConfig(**fields, folder=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(policy_main, "keep_compilations", lambda: None)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SystemExit) as ended:
        policy_main.main(PolicyRunConfig(table="nowhere.npz", folder=tmp_path / "file"))
    assert ended.value.code == 2
    assert f"--folder {tmp_path / 'file'} cannot be written" in capsys.readouterr().err


def test_impossible_limits_are_refused_before_training(tmp_path):
    with pytest.raises(MegError, match=r"cannot be met.*2\.117"):
        train_policies(PolicyRunConfig(limits=((2.0, 1.8),), folder=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_ppo_trains_at_several_limits_and_on_tables(tmp_path, quick_compilation):
    surface = np.full((2, 2, 2, 1), 0.01)
    problem = Problem(quality=make_table(surface, [4, 12], [0.0, 1.0], [10.0]), payload=wire_payload())

    def saved():
        return sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*") if p.name.isdigit())

    learner = PpoConfig(envs=12, greedy_envs=4, collect_steps=8, epochs=4, minibatches=2, hidden=(8, 8))
    limits = ((3.0, 1.8), (2.5, 1.8))
    config = PolicyRunConfig(
        learner=learner, limits=limits, chunks=4, checkpoint_every=3, episodes=4, folder=tmp_path
    )
    said = []
    results = train_policies(
        config, problem, tabulate(problem, bins=10, ratios=11), lambda share, _: said.append((share, saved()))
    )
    assert said[:2] == [(0.25, []), (0.5, [])]
    assert saved() == [3, 4]  # the last part's, though it is no third
    assert [r["limits"] for r in results] == [*limits]
    for result in results:
        # Whatever is done has the same quality, so its reward is known and is the optimum.
        np.testing.assert_allclose(result["deterministic"]["reward"], -np.log(0.01), rtol=1e-5)
        np.testing.assert_allclose(result["optimum"], -np.log(0.01), rtol=1e-5)


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from megjax.rl.training import PolicyRunConfig, _over_runs
run = lambda key, limits: (jax.random.normal(key), {"twice": 2 * limits})
keys, limits = jax.random.split(jax.random.key(0), 3), jnp.arange(6.0).reshape(3, 2)
spread = jax.jit(_over_runs(PolicyRunConfig(), 3)(run))
assert "num_partitions = 2" in spread.lower(keys, limits).as_text()
drawn, found = spread(keys, limits)
np.testing.assert_array_equal(drawn, jax.vmap(jax.random.normal)(keys))
np.testing.assert_array_equal(found["twice"], 2 * limits)
"""


def test_runs_spread_over_two_devices():
    """Three runs: one more than the devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def constant_policy(steps, ratio, info, observations=3):
    """Return a policy that always does the same."""
    mean = 2.0 * (action_of(steps, ratio) - 0.5)
    bias = jnp.concatenate([mean, jnp.zeros(2)])
    actor = ((jnp.zeros((observations, 4)), jnp.zeros(4)), (jnp.zeros((4, 4)), bias))
    moments = Moments(jnp.ones(()), jnp.zeros(observations), jnp.ones(observations))
    return Policy(PolicyParams(actor, moments, (jnp.asarray(0.01), jnp.asarray(0.01))), info)


INFO = PolicyInfo(((3.0, 1.8),), conditioned=False, min_steps=4, max_steps=12, hidden_layers=1)


def test_saved_policies_come_back_and_act(tmp_path, monkeypatch):
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
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(MegError, match=r"limits \(3\.0,\): give two"):
        act(back, -1.5, limits=(3.0,))


def test_a_conditioned_policy_knows_the_limits_between_those_it_was_trained_on():
    limits = ((2.3, 1.8), (3.0, 1.8), (4.0, 1.8))
    policy = constant_policy(7, 0.25, INFO._replace(limits=limits, conditioned=True), observations=5)
    assert act(policy, -1.5, limits=(2.5, 1.8)) == act(policy, -1.5)
    # It has only ever seen 1.8 kJ, and may say anything of 1.8017: a thousandth is the same limit.
    (weight, bias), *rest = policy.params.actor
    touchy = ((weight.at[4, 0].set(1.0), bias), (rest[0][0].at[0, 1].set(1e4), rest[0][1]))
    moments = policy.params.moments._replace(mean=policy.params.moments.mean.at[4].set(1.8))
    actor = policy._replace(params=policy.params._replace(actor=touchy, moments=moments))
    assert act(actor, -1.5, limits=(2.5, 1.9 * 0.948)) == act(actor, -1.5, limits=(2.5, 1.8))
    for outside in ((2.2, 1.8), (4.1, 1.8), (3.0, 1.7)):
        with pytest.raises(MegError, match=r"from \(2\.3, 1\.8\) to \(4\.0, 1\.8\)"):
            act(policy, -1.5, limits=outside)


def test_generate_obeys_a_policy(tmp_path, monkeypatch, capsys):
    """The ratio follows the link: 0.4 at 0 dB and 0.2 a decibel; more than can be merged is the most."""
    policy = constant_policy(4, 0.4, INFO)
    (weight, _), last = policy.params.actor
    slope = (weight.at[0, 0].set(1e-3), jnp.zeros(4))
    head = (last[0].at[0, 1].set(400.0), last[1])
    sloped = policy._replace(params=policy.params._replace(actor=(slope, head)))
    save_policy(tmp_path / "policy.safetensors", sloped)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setenv("COLUMNS", "100")

    def requested(request, pipeline):
        raise MegError(f"{request.steps} steps, ratio {request.ratio:.3f}")

    monkeypatch.setattr("megjax.cli.generate.load_pipeline", lambda *args, **options: None)
    monkeypatch.setattr("megjax.cli.generate.check", requested)

    def call(*args):
        fixed = ["megjax", "generate", "a red circle", "-o", str(tmp_path / "a.png")]
        monkeypatch.setattr(sys, "argv", [*fixed, *args])
        with contextlib.suppress(SystemExit):
            main()
        return capsys.readouterr().err

    file = ("--policy", str(tmp_path / "policy.safetensors"))
    for snr_db, ratio in (("0", 0.4), ("-1", 0.2), ("5", 15 / 16)):
        assert f"4 steps, ratio {ratio:.3f}" in call(*file, "--snr-db", snr_db)
    assert "trained for the limits" in call(*file, "--limits", "2.0", "1.8")
    assert "give one with --policy" in call("--limits", "2.0", "1.8")
    assert "not a MegJAX policy" in call("--policy", str(tmp_path))


def test_other_files_are_not_policies(tmp_path):
    for name, content in (("empty", b""), ("text", b"hello, hello, hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MegError, match="not a MegJAX policy"):
            load_policy(tmp_path / name)
    with pytest.raises(MegError, match="not a MegJAX policy"):
        load_policy(tmp_path / "missing")


def test_policies_that_cannot_act_are_not_loaded(tmp_path):
    policy = constant_policy(7, 0.25, INFO)
    params, (first, last) = policy.params, policy.params.actor
    broken = {
        "shapes": [
            policy._replace(info=INFO._replace(conditioned=True)),  # which observes two more numbers
            policy._replace(params=params._replace(actor=(first, (last[0][:, :3], last[1][:3])))),
            policy._replace(params=params._replace(actor=((first[0], first[1][:1]), last))),
        ],
        "finite": [
            policy._replace(params=params._replace(actor=(first, (last[0], last[1].at[0].set(jnp.nan))))),
            policy._replace(params=params._replace(std_range=(jnp.asarray(0.0), jnp.asarray(0.01)))),
            policy._replace(info=INFO._replace(limits=((3.0, float("inf")),))),
        ],
        "at least one": [policy._replace(info=INFO._replace(limits=()))],
        "steps 9 to 4": [policy._replace(info=INFO._replace(min_steps=9, max_steps=4))],
    }
    for message, policies in broken.items():
        for one in policies:
            save_policy(tmp_path / "broken.safetensors", one)
            with pytest.raises(MegError, match=f"not a MegJAX policy: .*{message}"):
                load_policy(tmp_path / "broken.safetensors")


def test_evaluation_of_a_constant_policy():
    policy = constant_policy(4, 0.3375, INFO)

    def constant(key, observation):
        return gaussian(policy.params, observation).mean

    found = evaluate(jax.random.key(0), make_env(), constant, REFERENCE, episodes=200)
    np.testing.assert_allclose(found.reward, -np.log(0.02 + 0.02 * 0.3375**2), rtol=1e-4)
    np.testing.assert_allclose(found.costs[0], 3.0, atol=0.01)
    assert 0.3 < float(found.violations[0]) < 0.7
    assert float(found.violations[1]) == float(found.episode_violations[1]) == 0.0

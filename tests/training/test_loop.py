"""The loop: resuming with a position in the data, SIGTERM, steps that are not finite, logs and speed."""

import dataclasses
import json
import os
import signal
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megjax.distill.diffuser import DiffuserConfig
from megjax.errors import MegError
from megjax.training import logs
from megjax.training.logs import Report, Work
from megjax.training.loop import check_run
from megjax.training.sharding import make_mesh
from megjax.training.step import init_state, make_step
from tests.training.runs import KEY, OPTIMIZER, Counting, events, loss, records, run


def test_an_interrupted_run_is_the_same_run(tmp_path):
    whole, stopped = run(tmp_path / "a", 9), [run(tmp_path / "b", n) for n in (1, 4, 9)]
    chex.assert_trees_all_equal(whole, stopped[-1])


@pytest.mark.parametrize("code", [0, 75])
def test_sigterm_saves_and_exits(tmp_path, capsys, code):
    class Terminated(Counting):
        def __next__(self):
            if self.at == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, 9, batches=Terminated(), checkpoint_every=100, sigterm_code=code)
    assert stop.value.code == code
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped at step 5 of 9, which is saved; to resume: " in capsys.readouterr().err
    assert (tmp_path / "run" / "5").is_dir()
    chex.assert_trees_all_equal(run(tmp_path, 9), run(tmp_path / "whole", 9))


def bad_from(first, last=10**9):
    def bad(params, key, batch):
        value, metrics = loss(params, key, batch["x"])
        return jnp.where((batch["i"] >= first) & (batch["i"] < last), jnp.nan, value), metrics

    return {
        "loss": bad,
        "batches": None,
        "batch_at": lambda i: {"x": np.ones(3, np.float32), "i": np.int32(i)},
    }


def test_skipped_steps_are_counted_and_leave_the_means_alone(tmp_path):
    run(tmp_path, 6, **bad_from(1, 3), every=6)
    assert [event.partition(":")[0] for event in events(tmp_path)] == ["step 1", "step 2"]
    (record,) = [r for r in records(tmp_path) if "loss" in r]
    assert record["skipped"] == 2
    assert 0 < record["loss"] < 10
    metadata = json.loads((tmp_path / "run" / "6" / "_CHECKPOINT_METADATA").read_text())
    assert metadata["custom_metadata"]["skipped"] == 2
    assert metadata["custom_metadata"]["in_a_row"] == 0


def test_a_window_without_an_update_has_no_loss_and_is_not_the_best(tmp_path):
    run(tmp_path, 12, **bad_from(3, 6), every=3, checkpoint_every=3)
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [3, 9, 12]
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()} == {"9", "12", best(tmp_path)}


def best(folder):
    losses = {r["step"]: r["loss"] for r in records(folder) if "loss" in r}
    return str(min(losses, key=losses.get))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": 0}, "every 0: at least 1"),
        ({"keep": 0}, "keep 0: at least 1"),
        ({"evaluate_every": -1}, "evaluate_every -1: at least 0"),
        ({"seed": -1}, "seed -1: 0 to"),
        ({"sigterm_code": 256}, "sigterm_code 256: 0 to 255"),
        ({"batch": 6, "accumulate": 4}, "batch 6: must be a multiple of 4"),
        ({"tensorboard": True}, "tensorboardX is not installed"),
        ({"keep": 10**15}, "checkpoints need"),
    ],
)
def test_what_would_be_refused_after_the_data_is_refused_before(tmp_path, monkeypatch, fields, message):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    config = DiffuserConfig(folder=tmp_path / "run")
    state = init_state({"x": jnp.ones(3)}, OPTIMIZER)
    check_run(config, make_mesh(), "student", state)
    with pytest.raises(MegError, match=message):
        check_run(dataclasses.replace(config, **fields), make_mesh(), "student", state)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("every", 0), ("checkpoint_every", 0), ("keep", 0), ("keep", -1), ("evaluate_every", -1)],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path, argument, value):
    with pytest.raises(MegError, match=f"{argument} {value}: must be at least"):
        run(tmp_path, 3, **{argument: value})
    assert list(tmp_path.iterdir()) == []


def test_ten_in_a_row_end_the_run_with_the_step_saved(tmp_path):
    import orbax.checkpoint as ocp

    with pytest.raises(MegError, match="step 12: loss or gradient was not finite for 10 steps in a row"):
        run(tmp_path, 40, **bad_from(3), checkpoint_every=5)
    failed = tmp_path / "run.failed"
    assert json.loads((failed / "step.json").read_text()) == {
        "step": 12,
        "key": np.asarray(jax.random.key_data(KEY)).tolist(),
    }
    batch = np.load(failed / "batch_0.npz")
    assert batch["['i']"] == 12
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((failed / "state").absolute())
    # Nothing has moved since the last finite step.
    chex.assert_trees_all_equal(state["params"], run(tmp_path / "good", 3, **bad_from(3)).params)


def test_the_count_survives_a_restart(tmp_path):
    run(tmp_path, 7, **bad_from(3))
    with pytest.raises(MegError, match="step 12"):
        run(tmp_path, 40, **bad_from(3))


def test_the_log_of_a_resumed_run_has_each_step_once(tmp_path):
    run(tmp_path, 6)
    log = tmp_path / "run.jsonl"
    # Killed while writing, after its last checkpoint.
    log.write_text(log.read_text() + json.dumps({"step": 9, "loss": 0.0}) + '\n{"step": 12, "lo')
    run(tmp_path, 9)
    assert [r["step"] for r in records(tmp_path)] == [3, 6, 9]


def test_evaluations_are_logged_with_their_pictures(tmp_path):
    def evaluate(state):
        return Report({"error": float(state.params["x"][0])}, {"grid": np.full((4, 6, 3), 0.5, np.float32)})

    run(tmp_path, 4, evaluate=evaluate, evaluate_every=2, every=4)
    assert [r["step"] for r in records(tmp_path) if "error" in r] == [2, 4]
    assert sorted(p.name for p in (tmp_path / "run-pictures").iterdir()) == [
        "grid-00000002.png",
        "grid-00000004.png",
    ]


def test_speed_is_told_in_steps_images_and_flops(tmp_path):
    work = Work(images=8, flops=1e9, peak_flops_per_s=1e12)
    run(tmp_path, 6, work=work)
    last = records(tmp_path)[-1]
    np.testing.assert_allclose(last["images_per_s"], 8 * last["steps_per_s"], rtol=1e-6)
    np.testing.assert_allclose(last["flop_utilisation"], last["steps_per_s"] / 1e3, rtol=1e-6)


def test_flops_are_counted_where_the_peak_is_known(monkeypatch):
    def matmul(params, key, x):
        return jnp.sum(x @ params), {}

    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda: init_state(jnp.ones((64, 128)), optimizer))
    step, x = make_step(matmul, optimizer, 0.9), jax.ShapeDtypeStruct((512, 64), jnp.float32)
    assert logs.counted_work(step, state, x, 32) == Work(32)  # a CPU's peak is not known
    work = logs.counted_work(step, state, x, 32, peak=1e12)
    # Forward and the weights' gradient; the update is small beside them.
    assert 1.0 < work.flops / (2 * 2 * 512 * 64 * 128) < 1.1
    assert work.peak_flops_per_s == jax.device_count() * 1e12
    for kind, peak in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA RTX A4000": 0.0,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
    }.items():
        device = type("Device", (), {"device_kind": kind})
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert logs.peak_flops_per_s() == peak


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")

    def evaluate(state):
        return Report({"error": 1.0}, {"grid": np.zeros((4, 6, 3), np.float32)})

    run(tmp_path, 3, tensorboard=True, evaluate=evaluate)
    (events,) = (tmp_path / "tensorboard" / "run").iterdir()
    contents = events.read_bytes()
    assert b"run/loss" in contents
    assert b"run/grid" in contents


def test_one_source_of_batches_is_needed(tmp_path):
    with pytest.raises(MegError, match="one of batch_at and batches"):
        run(tmp_path, 3, batches=None)

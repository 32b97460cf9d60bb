"""Checkpoints that are damaged, of another model, or have no room; which of them stay."""

import errno
import json
import os
import shutil
from unittest.mock import Mock

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.errors import MegError
from megjax.training import checkpoints
from megjax.training.logs import Report
from megjax.training.step import init_state
from tests.training.runs import OPTIMIZER, Counting, events, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 5 steps with checkpoints at 4 and 5, and its final state."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder, 5)


def test_a_run_of_another_meaning_is_refused(tmp_path):
    def claim(**what):
        checkpoints.claim(tmp_path, "student", what)

    claim(kind="ddim_eps")  # of a run that never saved
    claim(kind="velocity", windows=4, teacher={"unet": "ab"})
    (tmp_path / "student" / "2").mkdir(parents=True)
    claim(kind="velocity", windows=4, teacher={"unet": "ab"})
    with pytest.raises(MegError, match="its checkpoints are of windows 4, this run is of 8; choose another"):
        claim(kind="velocity", windows=8, teacher={"unet": "ab"})
    with pytest.raises(MegError, match=r"are of teacher .*ab.*, this run is of None"):
        claim(kind="velocity", windows=4)
    (tmp_path / "student.run.json").write_text("{")
    with pytest.raises(MegError, match="not valid JSON"):
        claim(kind="velocity")


def files(step):
    return sorted(path.relative_to(step) for path in step.rglob("*") if path.is_file())


def damage(path, how):
    if how == "delete":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)


def test_whatever_file_is_damaged_the_run_falls_back_and_says_so(finished, tmp_path):
    source, final = finished
    names = files(source / "run" / "5")
    assert len(names) >= 8
    for number, name in enumerate(names):
        for how in ("delete", "truncate"):
            folder = tmp_path / f"{number}-{how}"
            shutil.copytree(source, folder)
            damage(folder / "run" / "5" / name, how)
            chex.assert_trees_all_equal(run(folder, 5), final)
            (said,) = [event for event in events(folder) if "damaged" in event]
            assert str(name) in said
            assert "falling back" in said
            assert (folder / "run" / "damaged" / "5").is_dir()


def test_damage_is_found_without_a_manifest_too(finished, tmp_path):
    """A run may be killed after a checkpoint is finished and before its manifest is written."""
    source, final = finished
    shutil.copytree(source, tmp_path / "run")
    folder = tmp_path / "run"
    step = folder / "run" / "5"
    (folder / "run" / "5.json").unlink()
    largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damage(largest, "truncate")
    chex.assert_trees_all_equal(run(folder, 5), final)
    assert "falling back" in "".join(events(folder))


def test_a_checkpoint_without_the_datas_position_is_damaged(finished, tmp_path):
    source, final = finished
    shutil.copytree(source, tmp_path / "run")
    folder = tmp_path / "run"
    (folder / "run" / "5.json").unlink()
    (folder / "run" / "5" / "_CHECKPOINT_METADATA").write_text("{}")
    chex.assert_trees_all_equal(run(folder, 5), final)
    assert any("position" in event for event in events(folder))


def test_if_none_is_whole_the_run_does_not_start_anew_silently(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    for step in ("4", "5"):
        damage(tmp_path / "run" / "run" / step / "default" / "manifest.ocdbt", "delete")
    with pytest.raises(MegError, match=r"damaged are those of steps 4, 5"):
        run(tmp_path / "run", 6)


def test_an_error_that_may_pass_moves_nothing(finished, tmp_path, monkeypatch):
    source, final = finished
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    before = files(folder / "run")

    stale = OSError(errno.ESTALE, "Stale file handle")
    for error, kind, message in (
        (stale, MegError, "run/5: cannot be read now"),
        (MemoryError("full"), MemoryError, "full"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.ocp.CheckpointManager, "restore", Mock(side_effect=error))
            with pytest.raises(kind, match=message):
                run(folder, 5)
        assert files(folder / "run") == before
    chex.assert_trees_all_equal(run(folder, 5), final)


def test_another_models_checkpoints_are_refused_and_left_alone(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    before = files(folder / "run")
    other = init_state({"x": jnp.zeros(4), "y": jnp.ones((40, 5))}, OPTIMIZER)
    with (
        checkpoints.open_checkpoints(folder / "run", print) as manager,
        pytest.raises(MegError, match=r"another model's.*\(3,\), here \(4,\)"),
    ):
        checkpoints.restore(manager, other, print)
    assert files(folder / "run") == before


def test_the_last_two_and_the_best_stay(tmp_path):
    errors = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0, 10: 5.0}

    def evaluate(state):
        return Report({"error": errors[int(state.step)]})

    run(tmp_path, 6, evaluate=evaluate, evaluate_every=2, best="error")
    run(tmp_path, 10, evaluate=evaluate, evaluate_every=2, best="error")  # the best is remembered
    kept = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert kept == {"4", "8", "10"}
    assert {path.stem for path in (tmp_path / "run").glob("*.json")} == kept


def test_an_evaluation_counts_for_the_state_that_was_evaluated(tmp_path):
    errors = {4: 1.0, 8: 2.0, 12: float("nan"), 16: 3.0}

    def evaluate(state):
        return Report({"error": errors[int(state.step)]})

    # A log line clears nothing in between.
    run(tmp_path, 16, every=100, evaluate=evaluate, evaluate_every=4, best="error")
    kept = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert kept == {"4", "14", "16"}


def test_no_room_and_no_permission_are_found_before_the_first_step(tmp_path, monkeypatch):
    def batch_at(step):
        raise AssertionError("a step was taken")

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(MegError, match="4 checkpoints need"):
        run(tmp_path, 3, batches=None, batch_at=batch_at)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    state = init_state({"x": jnp.ones(2)}, OPTIMIZER)
    with pytest.raises(MegError, match="cannot be written"):
        checkpoints.require_room(tmp_path / "file" / "run", state, 4)

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoints.tempfile, "TemporaryFile", read_only)
    with pytest.raises(MegError, match="Read-only file system"):
        run(tmp_path, 3, batches=None, batch_at=batch_at)


def test_manifests_agree_with_what_is_there(finished):
    folder = finished[0] / "run"
    for step in ("4", "5"):
        manifest = json.loads((folder / f"{step}.json").read_text())
        assert {name: size for name, (size, _) in manifest.items()} == {
            path.as_posix(): (folder / step / path).stat().st_size for path in files(folder / step)
        }


def test_the_old_layout_is_restored(tmp_path):
    """Before manifests and positions: a state alone, batches a function of the step."""
    import orbax.checkpoint as ocp

    state = run(tmp_path / "new", 2, batches=None, batch_at=lambda i: Counting().__next__())
    (tmp_path / "old").mkdir()
    with ocp.CheckpointManager((tmp_path / "old" / "run").absolute()) as manager:
        manager.save(2, args=ocp.args.StandardSave(state))
    again = run(tmp_path / "old", 2, batches=None, batch_at=lambda i: Counting().__next__())
    np.testing.assert_array_equal(again.params["x"], state.params["x"])


def test_a_note_of_a_former_version_is_completed(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    checkpoints.claim(folder, "run", {"windows": 4})
    checkpoints.claim(folder, "run", {"windows": 4, "guidance": 3.0})
    with pytest.raises(MegError, match=r"checkpoints are of guidance 3\.0, this run is of 7\.5"):
        checkpoints.claim(folder, "run", {"windows": 4, "guidance": 7.5})

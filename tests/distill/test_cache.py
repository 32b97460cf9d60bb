"""Caches: computed once, gone on with half-way, keyed by what they depend on; broken examples."""

import errno
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest

from megjax.distill import cache as caches
from megjax.distill.cache import Block, cached, digest, fingerprint
from megjax.errors import MegError

KEY = {"model": "m", "data": {"source": "scenes"}}


def doubles(calls, broken=lambda i: False):
    def compute(start, stop):
        calls.append((start, stop))
        whole = np.asarray([i for i in range(start, stop) if not broken(i)])
        return Block(
            {"n": whole, "double": np.float16(whole[:, None] % 100 * 2)},
            [f"picture {i}: bad" for i in range(start, stop) if broken(i)],
        )

    return compute


def test_rows_are_computed_once_and_in_order(tmp_path):
    calls = []
    for _ in range(2):
        cache = cached(tmp_path, KEY, 10, doubles(calls), shard=4)
    assert calls == [(0, 4), (4, 8), (8, 10)]
    assert len(cache) == 10
    assert [int(cache[i]["n"]) for i in range(10)] == list(range(10))
    np.testing.assert_array_equal(cache[-1]["double"], np.float16([18]))
    with pytest.raises(IndexError):
        cache[10]
    assert len(cache.first(3)) == 3
    with pytest.raises(IndexError):
        cache.first(3)[3]
    cached(tmp_path, {**KEY, "model": "other"}, 10, doubles(calls), shard=4)
    assert len(calls) == 6


def test_an_interrupted_cache_goes_on(tmp_path):
    calls = []

    def interrupted(start, stop):
        if start == 4:
            raise KeyboardInterrupt
        return doubles(calls)(start, stop)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, KEY, 10, interrupted, shard=4)
    # Killed in the middle of writing a shard: what it left is not taken for one.
    left = tmp_path / digest(KEY) / ".part-000001-x"
    left.mkdir()
    (left / "n.npy").write_bytes(b"half")
    os.utime(left, (0, 0))
    cache = cached(tmp_path, KEY, 10, doubles(calls), shard=4)
    assert calls == [(0, 4), (4, 8), (8, 10)]
    assert [int(cache[i]["n"]) for i in range(10)] == list(range(10))
    assert not left.exists()


def test_a_disk_that_fills_ends_the_run_and_keeps_what_was_computed(tmp_path, monkeypatch):
    calls, save = [], np.save

    def full(path, array):
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(MegError, match=r"part-000001: cannot be .*No space left on device\); make"):
        cached(tmp_path, KEY, 10, doubles(calls), shard=4)
    assert [path.name for path in (tmp_path / digest(KEY)).iterdir() if path.is_dir()] == ["part-000000"]


def test_a_shard_that_another_run_finishes_meanwhile_is_passed_over(tmp_path, monkeypatch):
    own = tmp_path / digest(KEY)
    cached(tmp_path, KEY, 10, doubles([]), shard=4)
    unfinished = own / ".part-000009-x"
    unfinished.mkdir()
    glob = Path.glob

    def finished_after(path, pattern):
        found = list(glob(path, pattern))
        if unfinished in found:
            unfinished.rename(own / "part-000009")
        return found

    monkeypatch.setattr(Path, "glob", finished_after)
    assert len(cached(tmp_path, KEY, 10, doubles([]), shard=4)) == 10
    assert (own / "part-000009").is_dir()


def test_a_file_in_the_caches_place_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(MegError, match=r"--cache .* cannot be written: .*; choose another folder"):
            cached(folder, KEY, 10, doubles([]), shard=4)


def test_two_runs_may_fill_one_cache(tmp_path):
    """The other writes the shard that one is computing, and all after it; both end with the whole cache."""
    calls = []

    def disturbed(start, stop):
        if not calls:
            cached(tmp_path, KEY, 10, doubles(calls), shard=4)
        return doubles([])(start, stop)

    cache = cached(tmp_path, KEY, 10, disturbed, shard=4)
    assert [int(cache[i]["n"]) for i in range(10)] == list(range(10))
    assert sorted(path.name for path in (tmp_path / digest(KEY)).iterdir()) == [
        "key.json",
        "part-000000",
        "part-000001",
        "part-000002",
    ]


def test_broken_examples_are_left_out_counted_and_named(tmp_path):
    said = []
    broken = doubles([], lambda i: i in (3, 4, 5, 6, 7))
    cache = cached(tmp_path, KEY, 200, broken, shard=4, say=said.append)
    assert len(cache) == 195
    assert [int(cache[i]["n"]) for i in (2, 3, 194)] == [2, 8, 199]
    assert said[:2] == ["skipped picture 3: bad", "skipped picture 4: bad"]
    assert said[-1] == "5 of 200 examples were broken and are left out"


@pytest.mark.parametrize("examples", [100, 3000])
def test_more_than_five_percent_stop_the_run_and_a_restart_does_not_forget(tmp_path, examples):
    calls = []
    broken = doubles(calls, lambda i: i % 16 == 0)
    for _ in range(2):
        with pytest.raises(MegError, match=r"broken, more than 5%: picture 0: bad; picture 16: bad"):
            cached(tmp_path, KEY, examples, broken, shard=50)
    # A thousand are seen, or all there are; none twice.
    assert calls[-1][1] == min(1000, examples)
    assert len(set(calls)) == len(calls)
    assert len(cached(tmp_path, KEY, 100, broken, shard=50, max_broken=0.1)) == 93


def test_an_outage_is_not_kept(tmp_path):
    calls, down = [], [True]
    compute = doubles(calls, lambda i: down[0] and i >= 40)
    with pytest.raises(MegError, match="examples 40 to 60: no example is whole: picture 40: bad; picture 41"):
        cached(tmp_path, KEY, 100, compute, shard=20, max_broken=0.9)
    down[0] = False
    assert len(cached(tmp_path, KEY, 100, compute, shard=20)) == 100
    assert calls == [(0, 20), (20, 40), (40, 60), (40, 60), (60, 80), (80, 100)]


def test_two_processes_judge_what_both_have_seen(tmp_path, monkeypatch):
    broken = doubles([], lambda i: i % 2 == 0)
    assert len(cached(tmp_path, KEY, 800, broken, shard=50, max_broken=1.0)) == 400
    monkeypatch.setattr(caches.jax, "process_count", lambda: 2)
    monkeypatch.setattr(caches, "together", lambda _: None)
    for process in range(2):
        monkeypatch.setattr(caches.jax, "process_index", lambda process=process: process)
        with pytest.raises(MegError, match=r"400 of 800 examples are broken, more than 5%: picture 0: bad"):
            cached(tmp_path, KEY, 800, broken, shard=50)


def test_a_cache_of_more_files_than_may_be_open_is_read_and_pickled(tmp_path):
    cached(tmp_path, KEY, 64, doubles([]), shard=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20, hard))
    try:
        cache = cached(tmp_path, KEY, 64, doubles([]), shard=1)
        rows = [cache[i] for i in range(64)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(row["n"]) for row in rows] == list(range(64))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache))[63]["double"], rows[63]["double"])


def test_rows_of_several_axes_come_back_whatever_their_order_in_memory(tmp_path):
    array = np.asfortranarray(np.arange(48, dtype=np.float16).reshape(4, 3, 2, 2))
    cache = cached(tmp_path, KEY, 4, lambda start, stop: Block({"z": array[start:stop]}))
    for i in range(4):
        np.testing.assert_array_equal(cache[i]["z"], array[i])


def test_nothing_whole_is_said(tmp_path):
    with pytest.raises(MegError, match="no example is whole"):
        cached(tmp_path, KEY, 4, lambda start, stop: Block({}, ["a", "b", "c", "d"]), max_broken=1.0)


def test_keys_do_not_depend_on_order_and_fingerprints_see_changed_weights(tmp_path):
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    contents = bytearray(1 << 18)
    found = []
    for place in (0, len(contents) // 2, -1):
        (tmp_path / "model.safetensors").write_bytes(contents)
        found.append(fingerprint(tmp_path))
        contents[place] ^= 1
    assert len(set(found)) == 3
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert fingerprint(tmp_path) not in found

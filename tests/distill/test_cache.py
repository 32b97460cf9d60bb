"""Caches: computed once, gone on with half-way, keyed by what they depend on; broken examples."""

import os

import numpy as np
import pytest

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


def test_nothing_whole_is_said(tmp_path):
    with pytest.raises(MegError, match="no example is whole"):
        cached(tmp_path, KEY, 4, lambda start, stop: Block({}, ["a", "b", "c", "d"]), max_broken=1.0)


def test_keys_do_not_depend_on_order_and_fingerprints_see_changed_weights(tmp_path):
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    found = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        contents = bytearray(1 << 18)
        contents[-1 if number == 1 else 0] = number > 0
        (folder / "model.safetensors").write_bytes(contents)
        found.append(fingerprint(folder))
    assert len(set(found)) == 3

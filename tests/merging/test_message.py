"""Messages rebuild the sender's plan, bit for bit."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.errors import MegError, WireFormatError
from megjax.link import wire
from megjax.link.payload import payload_bits
from megjax.merging import carried, match, merge, pack, partition, rebuild_plan, unmerge, unpack

RATIOS = (0.0, 0.1, 0.4, 0.75, 0.8, 0.9375, 1.0)


@partial(jax.jit, static_argnames="grid")
def send(x, key, ratio, grid):
    plan = match(x, key, ratio, grid)
    return plan, merge(x, plan)


def picture(grid, channels, seed=0):
    return jax.random.normal(jax.random.key(seed), (grid[0] * grid[1], channels))


@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (1, 5)])
def test_receiver_unmerges_as_the_sender(grid):
    x, key = picture(grid, 5), jax.random.key(9)
    for ratio in RATIOS:
        plan, merged = send(x, key, jnp.float32(ratio), grid)
        for dtype, bits in (("float16", 16), ("bfloat16", 16), ("int8", 8)):
            message = pack(merged, plan, key, ratio, grid, dtype=dtype)
            charged = payload_bits(jnp.float32(ratio), len(x), 5, bits, grid=grid)
            assert 8 * (len(message) - wire.HEADER_BYTES) == charged
            received = unpack(message)
            np.testing.assert_array_equal(received.plan.row_N, plan.row_N)
            assert int(received.plan.count) == int(plan.count)
            if dtype == "int8":
                step = float(jnp.abs(merged).max()) / 127
                np.testing.assert_allclose(received.merged_NxD, merged, atol=0.501 * step)
            else:
                sent = merged.astype(dtype).astype(jnp.float32)
                np.testing.assert_array_equal(
                    unmerge(received.merged_NxD, received.plan), unmerge(sent, plan)
                )


@pytest.mark.parametrize("ratio", [0.4, 0.9])
def test_static_plans_send_the_same_bytes(ratio):
    x, key = picture((8, 8), 4), jax.random.key(1)
    plan, merged = send(x, key, jnp.float32(ratio), (8, 8))
    short_plan, short = jax.jit(lambda x: (p := match(x, key, ratio, (8, 8)), merge(x, p)))(x)
    # The header tells one round from two, which a static plan leaves out where nothing is merged in it.
    ours, theirs = pack(short, short_plan, key, ratio, (8, 8)), pack(merged, plan, key, ratio, (8, 8))
    assert ours[wire.HEADER_BYTES :] == theirs[wire.HEADER_BYTES :]
    np.testing.assert_array_equal(unpack(ours).plan.row_N, unpack(theirs).plan.row_N)


def test_sizes_at_a_ratio_of_four_tenths():
    for side, most in ((64, 0.62), (8, 0.64)):
        x, key = picture((side, side), 16), jax.random.key(0)
        plan, merged = send(x, key, jnp.float32(0.4), (side, side))
        whole = side * side * 16 * 2
        assert len(pack(merged, plan, key, 0.4, (side, side))) <= most * whole


def test_one_trace_receives_a_thousand_ratios():
    x, key = picture((8, 8), 2), jax.random.key(0)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def receive(content):
        return unmerge(content["features"], rebuild_plan(content, (8, 8)))

    for ratio in np.linspace(0, 1, 1000):
        plan, merged = send(x, key, jnp.float32(ratio), (8, 8))
        if int(1000 * ratio) % 50:  # Most skip the bytes, which take longer than the plan.
            (merged_1, best_1), (merged_2, best_2) = plan.rounds
            content = {"merged_1": merged_1, "best_1": best_1, "merged_2": merged_2, "best_2": best_2}
            receive({"features": merged, "key_data": jax.random.key_data(key), **content})
            continue
        message = pack(merged, plan, key, ratio, (8, 8), dtype="bfloat16")
        back = receive(carried(wire.decode(message)))
        sent = merged.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(back, unmerge(sent, plan))


def test_a_partition_hangs_on_its_key_alone():
    """Not on how JAX is set up at either end."""
    key = jax.random.key(3, impl="threefry2x32")
    with jax.threefry_partitionable(True):
        ours = partition(key, (8, 8))
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        theirs = partition(key, (8, 8))
    chex.assert_trees_all_equal(ours, theirs)


def test_bad_senders_are_refused():
    x, key = picture((8, 8), 4), jax.random.key(1)
    plan, merged = send(x, key, jnp.float32(0.4), (8, 8))
    with pytest.raises(MegError, match="pack each alone"):
        pack(merged, jax.tree.map(lambda leaf: leaf[None], plan), key, 0.4, (8, 8))
    with pytest.raises(MegError, match="threefry2x32"):
        pack(merged, plan, jax.random.key(0, impl="rbg"), 0.4, (8, 8))
    with pytest.raises(MegError, match=r"39 rows: ratio 0\.5 leaves 32"):
        pack(merged, plan, key, 0.5, (8, 8))
    with pytest.raises(MegError, match="not finite"):
        pack(merged.at[3, 2].set(jnp.nan), plan, key, 0.4, (8, 8))
    with pytest.raises(MegError, match="does not fit float16"):
        pack(1e6 * merged, plan, key, 0.4, (8, 8))
    with pytest.raises(WireFormatError, match="header alone"):
        unpack(b"short")

"""Against tomesd, given the same partition."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.merging import match_partition, merge, merged_counts, partition, to_tokens, unmerge
from tests.merging.reference import offsets_of

torch = pytest.importorskip("torch")
tomesd_merge = pytest.importorskip("tomesd.merge")

pytestmark = pytest.mark.parity

SIDE = 32
RATIOS = [round(0.1 * i, 1) for i in range(8)] + [0.75]


@jax.jit
def ours(x, key, ratio):
    parts = partition(key, (SIDE, SIDE), 1)
    plan = match_partition(x, parts, ratio, (SIDE, SIDE))
    merged = merge(x, plan)
    return parts, plan, merged, unmerge(merged, plan)


@pytest.mark.parametrize("layout", ["patch", "strip"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_same_pairs_and_same_values(layout, ratio, monkeypatch):
    z = np.random.default_rng(0).standard_normal((2, 2 * SIDE, 2 * SIDE, 4)).astype(np.float32)
    x = to_tokens(jnp.asarray(z), layout)
    parts, plan, merged, back = ours(x, jax.random.key(1), jnp.float32(ratio))

    corner = torch.from_numpy(offsets_of(parts, (SIDE, SIDE))[0]).long().reshape(SIDE // 2, SIDE // 2, 1)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: corner)
    (count,) = merged_counts(ratio, (SIDE, SIDE), 1)
    theirs, unmerge_theirs = tomesd_merge.bipartite_soft_matching_random2d(
        torch.from_numpy(np.array(x)), SIDE, SIDE, 2, 2, count, generator=torch.Generator()
    )
    merged_theirs = theirs(torch.from_numpy(np.array(x)))
    np.testing.assert_allclose(back, unmerge_theirs(merged_theirs).numpy(), rtol=0, atol=1e-6)

    valid = int(plan.count[0])
    assert merged_theirs.shape[1] == valid == SIDE * SIDE - count
    if count:
        found = inspect.getclosurevars(theirs).nonlocals
        split = inspect.getclosurevars(found["split"]).nonlocals
        a, b = (np.asarray(split[name])[0, :, 0] for name in ("a_idx", "b_idx"))
        src, dst = (np.asarray(found[name])[..., 0] for name in ("src_idx", "dst_idx"))
        for i in range(2):
            pairs = {(a[s], b[d]) for s, d in zip(src[i], dst[i], strict=True)}
            matches = plan.rounds[0]
            merged_A, best_A = np.asarray(matches.merged_A[i]), np.asarray(matches.best_A[i])
            sources = np.asarray(parts[0].source_A)[merged_A]
            assert pairs == set(
                zip(sources, np.asarray(parts[0].destination_B)[best_A[merged_A]], strict=True)
            )
            # Rows are in another order, ours as the tokens stand: compare them sorted.
            ordered = [np.array(sorted(map(tuple, rows))) for rows in (merged[i, :valid], merged_theirs[i])]
            np.testing.assert_allclose(*ordered, rtol=0, atol=1e-6)

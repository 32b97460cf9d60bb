"""A batch spread over devices is merged where it lies."""

import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from megjax.merging import match, merge, unmerge

def forward(x, key, ratio):
    plan = match(x, key, ratio, (8, 8))
    return unmerge(merge(x, plan), plan)

x = jax.random.normal(jax.random.key(0), (4, 64, 8))
alone = jax.jit(forward)(x, jax.random.key(1), jnp.float32(0.9))
mesh = Mesh(np.array(jax.devices()), "batch")
spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
compiled = jax.jit(forward).lower(spread, jax.random.key(1), jnp.float32(0.9)).compile()
together = compiled(spread, jax.random.key(1), jnp.float32(0.9))
assert len(together.sharding.device_set) == 2 and not together.is_fully_replicated
assert not any(op in compiled.as_text() for op in ("all-gather", "all-to-all", "collective-permute"))
np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-6)
"""


def test_batch_over_two_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]

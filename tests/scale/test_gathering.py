"""A cut network computes what a whole one does, and never holds more than a block of it whole."""

import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec as P

from megjax.errors import MegError
from megjax.models import CLIPTextConfig, UNetConfig, clip_text, unet
from megjax.models.placement import partition
from megjax.training.sharding import make_mesh, param_shardings

MESH = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
TENSOR = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        # The largest axis that 4 divides, of equals the first; the depth axis never.
        ("a/transformer_blocks/ff/net_0/proj/kernel", (8, 128, 1024), P(None, None, "fsdp")),
        ("a/transformer_blocks/attn1/to_q/kernel", (12, 128, 128), P(None, "fsdp", None)),
        ("encoder/layers/mlp/fc2/kernel", (4, 1024, 128), P(None, "fsdp", None)),
        # Not a stack, though it is called so: a list's items have numbers.
        ("layers/0/kernel", (512, 256), P("fsdp", None)),
        ("conv/kernel", (3, 3, 1280, 640), P(None, None, "fsdp", None)),
        ("conv/kernel", (3, 3, 1281, 640), P(None, None, None, "fsdp")),
        ("conv/kernel", (3, 3, 1281, 641), P(None, None, None, None)),
        # Small a layer, however deep.
        ("a/transformer_blocks/norm1/scale", (70, 1280), P()),
        ("b/bias", (10240,), P()),
    ],
)
def test_the_rule(path, shape, spec):
    assert partition(path.split("/"), shape, MESH) == spec


def test_heads_are_cut_over_tensor():
    q, out = "b/transformer_blocks/attn1/to_q/kernel", "b/transformer_blocks/attn1/to_out_0/kernel"
    assert partition(q.split("/"), (2, 640, 640), TENSOR) == P(None, "fsdp", "tensor")
    assert partition(out.split("/"), (2, 640, 640), TENSOR) == P(None, "tensor", "fsdp")


def test_sdxl_is_cut_evenly():
    net, text = unet(UNetConfig()), clip_text(CLIPTextConfig())
    mesh = make_mesh(devices=jax.devices()[:1])
    assert all(
        s.spec == P() or set(s.spec) == {None} for s in jax.tree.leaves(param_shardings(net.shapes, mesh))
    )
    wide = jax.sharding.AbstractMesh((1, 16, 1), ("data", "fsdp", "tensor"))
    for shapes in (net.shapes, text.shapes):
        whole = part = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            whole += leaf.size
            part += leaf.size // (16 if "fsdp" in partition(path, leaf.shape, wide) else 1)
        assert part < 1.02 * whole / 16


def test_meshes_that_do_not_fit():
    for axes in ({"fsdp": 2}, {"data": 1, "fsdp": 1, "tensor": 3}, {"data": -1, "fsdp": -1}, {"data": 0}):
        with pytest.raises(MegError, match="mesh data="):
            make_mesh(**axes, devices=jax.devices()[:1])


# On eight devices that do not exist. The step's loss and gradients are compared with a single device's.
PROGRAM = """
import re
import jax, jax.numpy as jnp, numpy as np
from megjax.models import Options, UNetConfig, placement, unet
from megjax.plan.account import account
from megjax.plan.chips import CHIPS
from megjax.training import sharding
from tests.models.cases import random_params

CONFIG = UNetConfig(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 3), attention_head_dim=(2, 4), cross_attention_dim=48,
    addition_time_embed_dim=16, projection_class_embeddings_input_dim=16 * 6 + 32, norm_num_groups=16)
# Small networks have small leaves.
placement.MIN_SIZE = sharding.MIN_SIZE = 2048
placement.partition.__kwdefaults__["min_size"] = sharding.param_shardings.__kwdefaults__["min_size"] = 2048

net = unet(CONFIG, Options(remat=REMAT))
params = jax.tree.map(jnp.asarray, random_params(net.shapes))
keys = jax.random.split(jax.random.key(1), 3)
inputs = (jax.random.normal(keys[0], (8, 8, 8, 4)), jnp.full(8, 500),
          jax.random.normal(keys[1], (8, 7, 48)), jax.random.normal(keys[2], (8, 32)), jnp.ones((8, 6)))

def loss(params, *inputs):
    def again(_, z):  # a loop over calls, as a solver's
        return z - 0.1 * jax.lax.stop_gradient(net(params, z, *inputs[1:]))
    z = jax.lax.fori_loop(0, 3, again, inputs[0])
    return jnp.mean(jnp.square(net(params, z, *inputs[1:])))

step = jax.value_and_grad(loss)
value, grads = jax.jit(step)(params, *inputs)
mesh = sharding.make_mesh(data=2, fsdp=FSDP, tensor=TENSOR)
shardings = sharding.param_shardings(net.shapes, mesh)
with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings)
    spread = jax.device_put(inputs, sharding.batch_sharding(mesh))
    jitted = jax.jit(step, out_shardings=(sharding.replicated(mesh), shardings))
    compiled = jitted.lower(placed, *spread).compile()
    cut_value, cut_grads = compiled(placed, *spread)
np.testing.assert_allclose(cut_value, value, rtol=1e-5)
for a, b in zip(jax.tree.leaves(cut_grads), jax.tree.leaves(grads)):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5 * float(jnp.abs(b).max()) + 1e-7)

cut = [x for x, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings)) if "fsdp" in s.spec]
assert len(cut) > 20
text = compiled.as_text()
gathers = [c for c in account(text, CHIPS["v5e"]).collectives if c.opcode == "all-gather"]
# No more than a layer at a time, though a compiler may gather several of a layer's leaves at once.
stacked = [x for x in cut if x.ndim == 3]
assert all(f"[{','.join(map(str, x.shape))}]" not in shape
           for x in stacked for shape in re.findall(r"= (.*?) all-gather", text)), "a whole stack is gathered"
# Three layers, gathered by the solver's three calls and the step's forward and backward pass.
layers = sum(c.runs for c in gathers if c.in_loop)
assert layers >= (3 * 3 + 2 * 3) * len(stacked) / 2, layers
assert all(c.runs == 1 for c in gathers if not c.in_loop)
# What blocks recompute is not kept for all layers after all.
kept = re.search(r"\\[3,(\\d+,)*16,16\\]", text)
assert bool(kept) != REMAT, f"the layers' attention scores: {kept}"
"""


@pytest.mark.parametrize(
    ("fsdp", "tensor", "remat"),
    [
        (4, 1, True),
        pytest.param(4, 1, False, marks=pytest.mark.long),
        pytest.param(2, 2, True, marks=pytest.mark.long),
    ],
)
def test_a_cut_unet_computes_the_same(fsdp, tensor, remat):
    program = PROGRAM.replace("REMAT", str(remat)).replace("FSDP", str(fsdp)).replace("TENSOR", str(tensor))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", program], env=flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]

"""Accounts of compiled programs: against XLA's totals, closed forms and unrolled programs."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from megjax import flops
from megjax.models import Options, UNetConfig, unet
from megjax.plan.account import _group_size, account, operation_s, shape_bytes
from megjax.plan.chips import CHIPS

CHIP = CHIPS["v5e"]

SMALL = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 4),
    attention_head_dim=(2, 4),
    cross_attention_dim=48,
    addition_time_embed_dim=16,
    projection_class_embeddings_input_dim=16 * 6 + 32,
    norm_num_groups=16,
)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled_unet():
    net = unet(SMALL, Options())
    args = (spec(2, 8, 8, 4), spec(2), spec(2, 77, 48), spec(2, 32), spec(2, 6))
    return jax.jit(lambda *a: net(*a)).lower(net.shapes, *args).compile().as_text()


def nested(x, ws):
    """Loops in loops, and a branch."""

    def inner(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: jnp.tanh(x @ w @ w), lambda: x + w), None

    return jax.lax.scan(lambda x, w: (jax.lax.scan(inner, x, w)[0], None), x, ws)[0]


def test_operations_add_up_to_the_program():
    for text in (
        compiled_unet(),
        jax.jit(nested).lower(spec(64, 64), spec(3, 5, 64, 64)).compile().as_text(),
    ):
        whole, parts = flops.count_hlo(text), account(text, CHIP)
        assert parts.flops == pytest.approx(whole.flops, rel=1e-6)
        assert parts.bytes_accessed == pytest.approx(whole.bytes_accessed, rel=1e-3)


def test_seconds_are_the_slower_of_work_and_memory():
    text = jax.jit(lambda x, y: x @ y).lower(spec(512, 512), spec(512, 512)).compile().as_text()
    at = account(text, CHIP)
    assert at.seconds == pytest.approx(3 * 4 * 512**2 / CHIP.bytes_per_s, rel=0.05)
    big = flops.Operation(
        flops.operations(flops.Module(text))[0].instruction, 1, False, flops.Cost(1e15, 1, 0)
    )
    assert operation_s(big, CHIP) == 1e15 / CHIP.flops_per_s


def test_a_scanned_unet_accounts_for_what_the_unrolled_one_does(monkeypatch):
    scanned = account(compiled_unet(), CHIP)
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    unrolled = account(compiled_unet(), CHIP)
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.03)
    assert scanned.bytes_accessed == pytest.approx(unrolled.bytes_accessed, rel=0.03)
    assert scanned.seconds == pytest.approx(unrolled.seconds, rel=0.03)


def test_bytes_of_shapes():
    assert shape_bytes("bf16[2,128]{1,0:T(8,128)(2,1)S(1)}") == [512]
    assert shape_bytes("(f32[3]{0}, pred[], s32[4,4]{1,0})") == [12, 1, 64]


COLLECTIVES = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from megjax.plan.account import account
from megjax.plan.chips import CHIPS
from megjax.training.sharding import make_mesh
mesh = make_mesh(fsdp=4)

def body(x, w):
    return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, P())), None

def f(x, ws, v):
    x, _ = jax.lax.scan(body, x, ws)
    return (x @ jax.lax.with_sharding_constraint(v, P())).sum()

def spec(spec, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))

with jax.set_mesh(mesh):
    args = spec(P("fsdp"), 8, 64), spec(P(None, "fsdp"), 5, 64, 64), spec(P("fsdp"), 64, 32)
    a = account(jax.jit(f).lower(*args).compile().as_text(), CHIPS["v5e"])
gathers = [c for c in a.collectives if c.opcode == "all-gather"]
assert sorted((c.output_bytes, c.runs, c.in_loop) for c in gathers) == [
    (64 * 32 * 4, 1, False), (64 * 64 * 4, 5, True)], gathers
assert all(c.sent_bytes == 0.75 * c.output_bytes for c in gathers)
(reduce,) = [c for c in a.collectives if c.opcode == "all-reduce"]
assert (reduce.output_bytes, reduce.sent_bytes) == (4, 6)
assert a.collective_bytes == 0.75 * (64 * 32 * 4 + 5 * 64 * 64 * 4) + 6
assert a.collective_s == a.collective_bytes / CHIPS["v5e"].ici_bytes_per_s
"""


def test_collectives_are_found_in_loops_and_out_of_them():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", COLLECTIVES], env=flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
    ],
)
def test_groups_as_the_compilers_print_them(groups, size):
    assert _group_size(f", channel_id=1, {groups}, use_global_device_ids=true") == size

"""The FLOP counter against closed forms, unrolled programs and the published figures of SDXL."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from megjax import flops
from megjax.errors import MegError
from megjax.hlo import Module
from megjax.models import (
    CLIP_BIG_G,
    CLIPTextConfig,
    UNetConfig,
    VAEConfig,
    clip_text,
    unet,
    vae_decoder,
    vae_encoder,
)

# A loop's own counter costs an addition, a comparison and some index arithmetic a trip.
LOOP_OVERHEAD = 20


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def matmul(x, w):
    return x @ w


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_matrix_product_is_two_flops_a_multiply_add(batch):
    cost = flops.count(matmul, spec(*batch, 5, 7), spec(*batch, 7, 11))
    products = 3 if batch else 1
    assert cost.flops == products * 2 * 5 * 7 * 11
    assert cost.bytes_accessed == products * 4 * (5 * 7 + 7 * 11 + 5 * 11)


def test_transcendentals_are_apart():
    cost = flops.count(jnp.exp, spec(10))
    assert (cost.flops, cost.transcendentals) == (0, 10)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_is_counted_where_its_window_meets_the_picture(stride, padding):
    size, c_in, c_out, kernel = 9, 3, 4, 3

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    out = (size + 2 * padding - kernel) // stride + 1
    taps = sum(0 <= stride * i + k - padding < size for i in range(out) for k in range(kernel))
    cost = flops.count(conv, spec(2, size, size, c_in), spec(kernel, kernel, c_in, c_out))
    assert cost.flops == 2 * 2 * taps**2 * c_in * c_out


def chain(x, ws, *, unroll=1, reverse=False):
    """x tanh(w_1) tanh(w_2) ..., scanned."""

    def body(x, w):
        return jnp.tanh(x) @ w, None

    return jax.lax.scan(body, x, ws, unroll=unroll, reverse=reverse)[0]


def nested(x, ws, *, unroll=1):
    return jax.lax.scan(lambda x, w: (chain(x, w, unroll=unroll), None), x, ws, unroll=unroll)[0]


def rematerialised(x, ws):
    def loss(ws):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=True)
        return jax.lax.scan(body, x, ws)[0].sum()

    return jax.grad(loss)(ws)


def mapped(x, ws, *, unroll=1):
    return jax.vmap(functools.partial(chain, unroll=unroll), in_axes=(None, 0))(x, ws)


def branching(x, ws, *, unroll=1):
    """A loop inside a branch inside a loop."""

    def body(x, ws):
        return jax.lax.cond(x[0, 0] > 0, lambda x: chain(x, ws, unroll=unroll), lambda x: -x, x), None

    return jax.lax.scan(body, x, ws, unroll=unroll)[0]


PROGRAMS = {
    "scan": (chain, (5, 16, 16)),
    "reverse": (functools.partial(chain, reverse=True), (5, 16, 16)),
    "nested": (nested, (3, 5, 16, 16)),
    "vmap": (mapped, (3, 5, 16, 16)),
    "branch": (branching, (3, 5, 16, 16)),
}


def test_rematerialised_layers_are_charged_twice():
    """Forward, recomputed, and two products backward; unrolled, JAX may save some."""
    depth, product = 5, 2 * 8 * 16 * 16
    cost = flops.count(rematerialised, spec(8, 16), spec(depth, 16, 16))
    assert 0 <= cost.flops - 4 * depth * product < product
    assert cost.transcendentals == 2 * depth * 8 * 16
    compiled = flops.count_hlo(
        jax.jit(rematerialised).lower(spec(64, 64), spec(depth, 64, 64)).compile().as_text()
    )
    assert compiled.flops == pytest.approx(4 * depth * 2 * 64**3, rel=0.03)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_scanned_program_costs_what_the_unrolled_one_does(name):
    program, shape = PROGRAMS[name]
    args = spec(8, 16), spec(*shape)
    scanned = flops.count(program, *args)
    unrolled = flops.count(functools.partial(program, unroll=True), *args)
    trips = 15 if len(shape) == 4 else 5
    # The overhead of all the trips is less than one matrix product: the products match to the last one.
    assert 0 <= scanned.flops - unrolled.flops <= 2 * LOOP_OVERHEAD * trips < 2 * 8 * 16 * 16
    assert scanned.transcendentals == unrolled.transcendentals > 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_programs_too(name):
    program, shape = PROGRAMS[name]
    args = spec(64, 64), spec(*shape[:-2], 64, 64)
    scanned = flops.count_hlo(jax.jit(program).lower(*args).compile().as_text())
    unrolled = flops.count(functools.partial(program, unroll=True), *args)
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.03)


def test_other_counting_loops():
    w = spec(16, 16)
    product = 2 * 16**3

    def from_two_in_threes(w):
        return jax.lax.while_loop(lambda c: c[0] < 12, lambda c: (c[0] + 3, c[1] @ w), (2, w))

    def fori(w):
        return jax.lax.fori_loop(3, 10, lambda _, x: x @ w, w)

    def never(w):
        return jax.lax.while_loop(lambda c: c[0] < 0, lambda c: (c[0] + 1, c[1] @ w), (0, w))

    for program, trips in ((from_two_in_threes, 4), (fori, 7), (never, 0)):
        cost = flops.count(program, w)
        assert trips * product <= cost.flops <= trips * product + (trips + 1) * LOOP_OVERHEAD


def doubling(w):
    """Counts 1, 2, 4, 8: not by a constant step."""
    return jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (2 * c[0], c[1] @ w), (1, w))


def until_small(w):
    return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, w)


def downwards(w):
    return jax.lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] @ w), (10, w))


def by_an_argument(w, n):
    return jax.lax.fori_loop(0, n, lambda _, x: x @ w, w)


def by_a_traced_step(w, n):
    return jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + n, c[1] @ w), (0, w))


@pytest.mark.parametrize("program", [doubling, until_small, downwards, by_an_argument, by_a_traced_step])
def test_an_unknown_number_of_trips_is_asked_for(program):
    args = (spec(16, 16), spec(dtype=jnp.int32))[: program.__code__.co_argcount]
    with pytest.raises(MegError, match="dynamic_trips"):
        flops.count(program, *args)
    three, seven = (flops.count(program, *args, dynamic_trips=n).flops for n in (3, 7))
    assert 4 * 2 * 16**3 <= seven - three <= 4 * 2 * 16**3 * 1.1


def test_only_unknown_loops_take_the_assumed_trips():
    def both(x, ws, n):
        return jax.lax.fori_loop(0, n, lambda _, x: chain(x, ws), x)

    args = spec(8, 16), spec(5, 16, 16)
    once = flops.count(chain, *args).flops
    cost = flops.count(both, *args, spec(dtype=jnp.int32), dynamic_trips=4)
    assert 4 * once <= cost.flops <= 4 * (once + LOOP_OVERHEAD)


# As the TPU compiler prints a loop: without a trip count, its counter copied to scalar memory, its bound and
# its step carried along.
TPU_LOOP = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[8,16]{1,0:T(8,128)(2,1)})->bf16[8,16]{1,0:T(8,128)(2,1)}}

%body (p: (s32[], bf16[8,16], s32[], s32[])) -> (s32[], bf16[8,16], s32[], s32[]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %i.copy = s32[]{:T(128)S(6)} copy(%i), backend_config={"flag_configs":[],"aliasing_operands":{"lists":[]}}
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %bound = s32[]{:T(128)} get-tuple-element(%p), index=2
  %step = s32[]{:T(128)} get-tuple-element(%p), index=3
  %next = s32[]{:T(128)} add(%i.copy, %step)
  %y = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} add(%x, %x), metadata={op_name="jit(f)/while/body/add"}
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}) tuple(%next, %y, %bound, %step)
}

%condition (q: (s32[], bf16[8,16], s32[], s32[])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %n = s32[]{:T(128)} get-tuple-element(%q), index=2
  ROOT %lt = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (x.0: bf16[8,16]) -> bf16[8,16] {
  %x.0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %one = s32[]{:T(128)} constant(1)
  %six = s32[]{:T(128)} constant(6)
  %zero.copy = s32[]{:T(128)} copy(%zero)
  %copy-start = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x.0)
  %copy-done = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %init = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}) tuple(%zero.copy, %copy-done, %six, %one)
  %while = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}) while(%init), condition=%condition, body=%body
  ROOT %result = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_a_loop_of_the_tpu_compiler():
    six, seven = (flops.count_hlo(TPU_LOOP.replace("constant(6)", f"constant({n})")) for n in (6, 7))
    assert seven.flops - six.flops == 8 * 16 + 1
    assert six.flops - 6 * (8 * 16 + 1) <= 1
    # A step that changes is no step.
    with pytest.raises(MegError, match="dynamic_trips"):
        flops.count_hlo(TPU_LOOP.replace("%y, %bound, %step)", "%y, %bound, %next)"))


def unet_args(net, *, batch, size):
    text, pooled = net.config.cross_attention_dim, net.config.pooled_dim
    return (
        net.shapes,
        spec(batch, size, size, net.config.in_channels),
        spec(batch),
        spec(batch, 77, text),
        spec(batch, pooled),
        spec(batch, 6),
    )


def test_a_scanned_unet_costs_what_the_unrolled_one_does(monkeypatch):
    net = unet(
        UNetConfig(
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
    )
    args = unet_args(net, batch=2, size=8)
    scanned, scanned_bytes = lowered_cost(net, args)
    compiled = flops.count_hlo(jax.jit(lambda *args: net(*args)).lower(*args).compile().as_text())
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    unrolled, unrolled_bytes = lowered_cost(net, args)
    assert scanned.flops == pytest.approx(unrolled.flops, rel=1e-5)
    assert scanned.transcendentals == unrolled.transcendentals
    assert scanned_bytes == pytest.approx(unrolled_bytes, rel=0.02)
    assert compiled.flops == pytest.approx(unrolled.flops, rel=0.03)


def lowered_cost(net, args):
    """The cost, and the bytes without those of broadcasts: JAX 0.12 makes one for all unrolled blocks."""
    text = jax.jit(lambda *args: net(*args)).lower(*args).as_text("hlo")
    found = flops.operations(Module(text))
    assert flops.count_hlo(text).bytes_accessed == pytest.approx(
        sum(op.runs * op.cost.bytes_accessed for op in found), rel=1e-3
    )
    kept = (op for op in found if op.instruction.opcode != "broadcast")
    return flops.count_hlo(text), sum(op.runs * op.cost.bytes_accessed for op in kept)


@chex.assert_max_traces(n=1)
def traced_once(x):
    return x @ x


def test_counting_traces_once_and_computes_nothing():
    # Operands of 4 TiB, which nothing allocates.
    side = 2**20
    assert flops.count(traced_once, spec(side, side)).flops == 2.0 * side**3


def test_sdxl_unet_at_1024():
    net = unet(UNetConfig())
    cost = flops.count(lambda *args: net(*args), *unet_args(net, batch=2, size=128))
    assert cost.flops == pytest.approx(13.50e12, rel=0.02)


def test_sdxl_vae_at_1024():
    encoder, decoder = vae_encoder(VAEConfig()), vae_decoder(VAEConfig())
    encode = flops.count(lambda *args: encoder(*args), encoder.shapes, spec(1, 1024, 1024, 3))
    decode = flops.count(lambda *args: decoder(*args), decoder.shapes, spec(1, 128, 128, 4))
    assert encode.flops == pytest.approx(4.88e12, rel=0.02)
    assert decode.flops == pytest.approx(10.46e12, rel=0.02)


def test_sdxl_text_encoders():
    small = CLIPTextConfig()
    total = 0.0
    for net in map(clip_text, (small, CLIP_BIG_G)):
        total += flops.count(
            lambda *args, net=net: net(*args), net.shapes, spec(1, 77, dtype=jnp.int32)
        ).flops
    assert total == pytest.approx(0.11e12, rel=0.05)

"""What holds of the networks as programs: sizes, precision, rematerialisation, merging, configs."""

import dataclasses
import inspect
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import flops, merging
from megjax.errors import MegError, WeightsError
from megjax.models import (
    CLIPTextConfig,
    Options,
    UNetConfig,
    VAEConfig,
    clip_text,
    from_dict,
    read,
    to_dict,
    unet,
    vae_decoder,
    vae_encoder,
)
from megjax.models.layers import sinusoidal
from megjax.models.network import network
from megjax.models.unet import DownBlock
from tests.models import cases


def parameters(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_sdxl_has_its_parameters():
    assert parameters(unet(UNetConfig()).shapes) == 2_567_463_684
    both = parameters(vae_encoder(VAEConfig()).shapes) + parameters(vae_decoder(VAEConfig()).shapes)
    assert both == 83_653_863


def test_init_makes_the_shapes_it_announces():
    net = unet(cases.UNETS["odd"][0], Options(param_dtype=jnp.bfloat16))
    params = net.init(jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, net.shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.isfinite(leaf.astype(jnp.float32)).all() for leaf in jax.tree.leaves(params))


def test_timesteps_are_not_rounded_to_bfloat16():
    # 999 is 1000 in bfloat16.
    embedding = sinusoidal(jnp.array([999, 1000]), 320)
    assert embedding.dtype == jnp.float32
    angles = np.outer([999, 1000], 10_000.0 ** -(np.arange(160) / 160))
    np.testing.assert_allclose(embedding, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=2e-4)

    config, size = cases.UNETS["odd"]
    net = unet(config, Options(dtype=jnp.bfloat16))
    params = cases.random_params(net.shapes)
    z, _, *condition = map(jnp.asarray, cases.unet_inputs(config, size))
    out = jax.jit(net)(
        params, z[:1].repeat(2, 0), jnp.array([999, 1000]), *(c[:1].repeat(2, 0) for c in condition)
    )
    assert out.dtype == jnp.float32
    assert not np.array_equal(out[0], out[1])


def test_bfloat16_stays_near_float32():
    config, size = cases.UNETS["odd"]
    inputs = tuple(map(jnp.asarray, cases.unet_inputs(config, size)))
    params = cases.random_params(unet(config).shapes)
    full, half = (
        jax.jit(unet(config, Options(dtype=d)))(params, *inputs) for d in (jnp.float32, jnp.bfloat16)
    )
    assert float(jnp.linalg.norm(full - half) / jnp.linalg.norm(full)) < 0.05


def test_rematerialisation_changes_no_gradient():
    """A block with both of what recomputes: a resnet, and transformer blocks in a scan."""
    config, _ = cases.UNETS["odd"]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 13, 11, 24), (2, 96), (2, 7, 40))
    inputs = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    def block(config, options, *, rngs):
        return DownBlock(config, options, 0, rngs=rngs)

    def gradient(remat):
        net = network(block, config, Options(remat=remat))
        params = cases.random_params(net.shapes)

        def loss(p):
            x, skips = net(p, *inputs, lambda grid: None)
            return jnp.mean(x**2) + sum(jnp.mean(skip**2) for skip in skips)

        assert str(jax.make_jaxpr(jax.grad(loss))(params)).count("remat") == (2 if remat else 0)
        return jax.jit(jax.grad(loss))(params)

    chex.assert_trees_all_close(gradient(False), gradient(True), rtol=2e-4, atol=1e-6)


class TestTokenMerging:
    config, size = cases.UNETS["tiny_like"]

    def program(self, token_merge):
        net = unet(self.config)
        inputs = tuple(map(jnp.asarray, cases.unet_inputs(self.config, self.size)))
        return jax.jit(lambda params: net(params, *inputs, token_merge)), cases.random_params(net.shapes)

    def text(self, token_merge):
        call, params = self.program(token_merge)
        return call.lower(params).as_text()

    def run(self, token_merge):
        call, params = self.program(token_merge)
        return call(params)

    def test_ratio_zero_and_no_level_change_nothing(self):
        plain = self.text(None)
        assert plain == self.text(merging.tome(0.0, self.size))
        assert plain == self.text(merging.tome(0.5, self.size, max_downsample=1))
        assert plain != self.text(merging.tome(0.5, self.size))

    def test_half_the_tokens_change_the_output_a_little(self):
        plain, key = self.run(None), jax.random.key(0)
        merged = [
            self.run(merging.tome(0.5, self.size, key=key, share=share)) for share in ("call", "transformer")
        ]
        for out in merged:
            distance = float(jnp.linalg.norm(out - plain) / jnp.linalg.norm(plain))
            assert 1e-4 < distance < 0.7
        assert not np.array_equal(*merged)

    def test_real_flops_are_saved_at_full_size(self):
        net = unet(UNetConfig())
        S = jax.ShapeDtypeStruct
        args = (
            S((1, 128, 128, 4), jnp.float32),
            S((1,), jnp.float32),
            S((1, 77, 2048), jnp.float32),
            S((1, 1280), jnp.float32),
            S((1, 6), jnp.int32),
        )
        merge = merging.tome(0.5, (128, 128), key=jax.random.key(0))
        counted = flops.count(lambda *a: net(*a, merge), net.shapes, *args).flops
        assert counted <= 5.8e12
        assert counted >= 5.5e12  # half of every self-attention, nothing more

    def test_bad_values(self):
        with pytest.raises(MegError, match=r"0.75"):
            merging.tome(0.8, (16, 16))


class TestConfigs:
    @pytest.mark.parametrize("config", [UNetConfig(), VAEConfig(), CLIPTextConfig(with_projection=True)])
    def test_round_trip(self, config):
        assert from_dict(type(config), to_dict(config)) == config

    def test_another_class_is_refused(self):
        with pytest.raises(WeightsError, match="expected one of UNet2DConditionModel"):
            from_dict(UNetConfig, to_dict(VAEConfig()))

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("act_fn", "gelu"),
            ("attention_type", "gated"),
            ("class_embed_type", "timestep"),
            ("class_embeddings_concat", True),
            ("cross_attention_norm", "layer_norm"),
            ("encoder_hid_dim", 4),
            ("mid_block_only_cross_attention", True),
            ("mid_block_type", None),
            ("mid_block_type", "UNetMidBlock2D"),  # SSD-1B's
            ("resnet_out_scale_factor", 2),
            ("resnet_skip_time_act", True),
            ("reverse_transformer_layers_per_block", [[4, 4, 10], [2, 1, 1], 1]),
            ("time_embedding_act_fn", "silu"),
            ("time_embedding_dim", 64),
            ("timestep_post_act", "silu"),
            ("addition_embed_type", None),
        ],
    )
    def test_what_is_not_implemented_is_refused(self, field, value):
        with pytest.raises(WeightsError, match=f"{field} = .* is not supported; only"):
            from_dict(UNetConfig, to_dict(UNetConfig()) | {field: value})

    @pytest.mark.parametrize(
        ("config", "field", "value"),
        [
            (UNetConfig(), "norm_num_groups", 0),
            (UNetConfig(), "attention_head_dim", 0),
            (UNetConfig(), "attention_head_dim", [5, 10, 0]),
            (UNetConfig(), "block_out_channels", [320, -640, 1280]),
            (UNetConfig(), "block_out_channels", []),
            (UNetConfig(), "layers_per_block", [2, 2, 2]),
            (UNetConfig(), "layers_per_block", True),
            (UNetConfig(), "transformer_layers_per_block", [1, [2, 2], [4, 4]]),
            (UNetConfig(), "transformer_layers_per_block", [0, 0, 10]),
            (UNetConfig(), "cross_attention_dim", [2048, 2048, 2048]),
            (UNetConfig(), "norm_eps", None),
            (UNetConfig(), "norm_eps", math.inf),
            (UNetConfig(), "sample_size", None),
            (UNetConfig(), "freq_shift", 160),
            (UNetConfig(), "addition_time_embed_dim", 255),
            (UNetConfig(), "projection_class_embeddings_input_dim", 1536),
            (UNetConfig(), "use_linear_projection", "yes"),
            (VAEConfig(), "norm_num_groups", 0),
            (VAEConfig(), "scaling_factor", 0),
            (VAEConfig(), "latents_std", [1.0, 1.0, 0.0, 1.0]),
            (VAEConfig(), "latents_mean", [0.0, 0.0, 0.0, 0.0]),
            (VAEConfig(), "down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
            (VAEConfig(), "up_block_types", ["UpDecoderBlock2D"] * 3),
            (CLIPTextConfig(), "num_attention_heads", 0),
            (CLIPTextConfig(), "eos_token_id", [2, 3]),
            (CLIPTextConfig(), "layer_norm_eps", None),
        ],
    )
    def test_values_that_a_field_cannot_have(self, config, field, value):
        with pytest.raises(WeightsError, match=field.replace("[", r"\[")):
            from_dict(type(config), to_dict(config) | {field: value})

    @pytest.mark.parametrize(
        ("config", "field"),
        [(c, f) for c in (UNetConfig(), VAEConfig(), CLIPTextConfig()) for f in c.GIVEN],
    )
    def test_fields_without_a_default(self, config, field):
        raw = {name: value for name, value in to_dict(config).items() if name != field}
        with pytest.raises(WeightsError, match=f"lacks {field}"):
            from_dict(type(config), raw)

    @pytest.mark.parametrize(
        ("config", "more"),
        [
            # What the hub's files of SDXL hold that changes nothing here.
            (
                UNetConfig(),
                {
                    "addition_embed_type_num_heads": 64,
                    "dropout": 0.0,
                    "encoder_hid_dim": None,
                    "mid_block_only_cross_attention": None,
                    "num_attention_heads": None,
                    "reverse_transformer_layers_per_block": None,
                    "time_embedding_dim": None,
                    "upcast_attention": None,
                },
            ),
            (UNetConfig(), {"mid_block_only_cross_attention": False, "upcast_attention": True}),
            (VAEConfig(), {"force_upcast": False, "latents_mean": None, "latents_std": None}),
            (CLIPTextConfig(), {"attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0}),
        ],
    )
    def test_values_that_change_nothing(self, config, more):
        assert from_dict(type(config), to_dict(config) | more) == config

    def test_no_depth_where_there_is_no_attention(self):
        config, _ = cases.UNETS["tiny_like"]
        other = from_dict(UNetConfig, to_dict(config) | {"transformer_layers_per_block": [0, 2]})
        assert unet(other).shapes == unet(config).shapes

    @pytest.mark.parity
    @pytest.mark.parametrize(
        ("config", "ignored"),
        [
            (UNetConfig, {"addition_embed_type_num_heads", "dropout", "upcast_attention"}),
            (VAEConfig, {"down_block_types", "up_block_types", "force_upcast"}),
        ],
    )
    def test_no_argument_of_diffusers_goes_unseen(self, config, ignored):
        theirs = getattr(pytest.importorskip("diffusers"), config.CLASS_NAMES[0])
        seen = {field.name for field in dataclasses.fields(config)} | config.ONLY.keys() | ignored
        assert inspect.signature(theirs.__init__).parameters.keys() - {"self"} == seen

    def test_one_number_for_all_blocks(self):
        raw = to_dict(UNetConfig()) | {"attention_head_dim": 5, "transformer_layers_per_block": 2}
        assert from_dict(UNetConfig, raw).attention_head_dim == (5, 5, 5)

    def test_widths_that_do_not_divide(self):
        with pytest.raises(MegError, match="norm_num_groups"):
            dataclasses.replace(UNetConfig(), block_out_channels=(330, 640, 1280))
        with pytest.raises(MegError, match="entries"):
            dataclasses.replace(UNetConfig(), attention_head_dim=(5, 10))

    def test_files(self, tmp_path):
        path = tmp_path / "config.json"
        with pytest.raises(WeightsError, match="no such file"):
            read(VAEConfig, path)
        for text in ("{", "[]"):
            path.write_text(text)
            with pytest.raises(WeightsError, match="JSON"):
                read(VAEConfig, path)


def test_text_encoder_pools_at_the_first_end_token():
    config = cases.TEXTS["bigg_small"]
    net = clip_text(config)
    params = cases.random_params(net.shapes)
    ids = cases.text_inputs(config)
    _, pooled = net(params, jnp.asarray(ids))
    # A causal encoder does not see what follows the end, so padding with anything pools the same.
    ids[0, 8:] = 5
    np.testing.assert_allclose(net(params, jnp.asarray(ids))[1][0], pooled[0], rtol=1e-5, atol=1e-5)


def test_equal_options_are_equal_however_a_dtype_is_spelt():
    assert Options("bfloat16") == Options(jnp.bfloat16)
    assert hash(Options("bfloat16")) == hash(Options(jnp.bfloat16))
    for wrong in ("foo", None, "int8"):
        with pytest.raises(MegError, match="take float32, bfloat16 or float16"):
            Options(dtype=wrong)

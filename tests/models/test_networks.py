"""What holds of the networks as programs: sizes, precision, rematerialisation, merging, configs."""

import dataclasses
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
    config, size = cases.UNETS["odd"]
    inputs = tuple(map(jnp.asarray, cases.unet_inputs(config, size)))
    params = cases.random_params(unet(config).shapes)

    def gradient(options):
        net = unet(config, options)
        return jax.jit(jax.grad(lambda p: jnp.mean(net(p, *inputs) ** 2)))(params)

    chex.assert_trees_all_close(gradient(Options()), gradient(Options(remat=True)), rtol=2e-4, atol=1e-6)


class TestTokenMerging:
    config, size = cases.UNETS["sdxl_small"]

    def run(self, token_merge):
        net = unet(self.config)
        inputs = tuple(map(jnp.asarray, cases.unet_inputs(self.config, self.size)))
        call = jax.jit(lambda params: net(params, *inputs, token_merge))
        return call(cases.random_params(net.shapes))

    def test_ratio_zero_and_no_level_change_nothing(self):
        plain = self.run(None)
        np.testing.assert_array_equal(plain, self.run(merging.tome(0.0, self.size)))
        np.testing.assert_array_equal(plain, self.run(merging.tome(0.5, self.size, max_downsample=1)))

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
        ("field", "value"), [("act_fn", "gelu"), ("class_embed_type", "timestep"), ("encoder_hid_dim", 4)]
    )
    def test_what_is_not_implemented_is_refused(self, field, value):
        with pytest.raises(WeightsError, match=field):
            from_dict(UNetConfig, to_dict(UNetConfig()) | {field: value})

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
        path.write_text("{")
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

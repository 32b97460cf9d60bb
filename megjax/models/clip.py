"""CLIP's text encoders: `CLIPTextModel` (CLIP-L) and `CLIPTextModelWithProjection` (OpenCLIP bigG)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from megjax.models.attention import attention
from megjax.models.configs import CLIPTextConfig
from megjax.models.layers import gelu, layer_norm, linear, quick_gelu, scan, stack
from megjax.models.network import Network, Options, network


class _SelfAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig, options: Options, *, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear(config.hidden_size, config.hidden_size, options, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x_BxLxD: Array) -> Array:
        q, k, v = (
            layer(x_BxLxD).reshape(*x_BxLxD.shape[:2], self.heads, -1)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q, k, v, causal=True).reshape(x_BxLxD.shape))


class _MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig, options: Options, *, rngs: nnx.Rngs):
        self.activation = {"quick_gelu": quick_gelu, "gelu": gelu}[config.hidden_act]
        self.fc1 = linear(config.hidden_size, config.intermediate_size, options, rngs=rngs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, options, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.activation(self.fc1(x)))


class _Layer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, options: Options, *, rngs: nnx.Rngs):
        self.layer_norm1 = layer_norm(config.hidden_size, config.layer_norm_eps, options, rngs=rngs)
        self.self_attn = _SelfAttention(config, options, rngs=rngs)
        self.layer_norm2 = layer_norm(config.hidden_size, config.layer_norm_eps, options, rngs=rngs)
        self.mlp = _MLP(config, options, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, options: Options, *, rngs: nnx.Rngs):
        def embed(count: int) -> nnx.Embed:
            return nnx.Embed(
                count, config.hidden_size, dtype=options.dtype, param_dtype=options.param_dtype, rngs=rngs
            )

        self.token_embedding = embed(config.vocab_size)
        self.position_embedding = embed(config.max_position_embeddings)

    def __call__(self, ids_BxL: Array) -> Array:
        positions = jnp.arange(ids_BxL.shape[1])[None, :]
        return self.token_embedding(ids_BxL) + self.position_embedding(positions)


class _Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig, options: Options, *, rngs: nnx.Rngs):
        self.layers = stack(config.num_hidden_layers, lambda rngs: _Layer(config, options, rngs=rngs), rngs)


class _TextTransformer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, options: Options, *, rngs: nnx.Rngs):
        self.embeddings = _Embeddings(config, options, rngs=rngs)
        self.encoder = _Encoder(config, options, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, options, rngs=rngs)


class CLIPText(nnx.Module):
    """A causal text transformer; SDXL reads its last layer but one and bigG's projected end token."""

    def __init__(self, config: CLIPTextConfig, options: Options, *, rngs: nnx.Rngs):
        self.config = config
        self.options = options
        self.text_model = _TextTransformer(config, options, rngs=rngs)
        if config.with_projection:
            self.text_projection = linear(
                config.hidden_size, config.projection_dim, options, bias=False, rngs=rngs
            )

    def __call__(self, ids_BxL: Int[Array, "B L"]) -> tuple[Float[Array, "B L D"], Float[Array, "B P"]]:
        """Encode token ids.

        Returns:
            The penultimate hidden state, and the pooled output: the last layer's normalised state at the end
            of the text, projected where the class has a projection. Float32.
        """
        model = self.text_model

        def layer(module: _Layer, x: Array) -> Array:
            return module(x)

        x = model.embeddings(ids_BxL)
        penultimate = scan(model.encoder.layers, layer, x, options=self.options, layers=slice(None, -1))
        last = scan(model.encoder.layers, layer, penultimate, options=self.options, layers=slice(-1, None))
        # Old configs say 2, whatever the vocabulary: there the highest id ends the text.
        eos = self.config.eos_token_id
        end_B = jnp.argmax(ids_BxL if eos == 2 else ids_BxL == eos, axis=-1)
        pooled = jnp.take_along_axis(last, end_B[:, None, None], axis=1)[:, 0]
        pooled = model.final_layer_norm(pooled)
        if hasattr(self, "text_projection"):
            pooled = self.text_projection(pooled)
        return penultimate.astype(jnp.float32), pooled.astype(jnp.float32)


def clip_text(config: CLIPTextConfig, options: Options = Options()) -> Network:
    """The text encoder as a function `(params, ids) -> (penultimate, pooled)`; see `CLIPText.__call__`."""
    return network(CLIPText, config, options)

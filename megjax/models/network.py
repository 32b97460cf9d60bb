"""A Flax NNX module as a pure function of its parameter tree: the border beyond which nobody sees NNX."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from megjax.errors import MegError
from megjax.models.placement import gathered, gathering

Params = dict[str, Any]
"""Nested dict of arrays. Repeated transformer blocks are stacked on a leading depth axis."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a network computes; what it computes is its config.

    Args:
        dtype: of activations; norms, softmax and timestep embeddings stay in float32.
        param_dtype: of the parameters that `init` makes.
        remat: recompute each block's activations in the backward pass.
        attention: the U-Net's and VAE's, `xla` or `cudnn` (NVIDIA GPUs, bfloat16/float16).
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    attention: str = "xla"

    def __post_init__(self) -> None:
        # One spelling, so that equal options are equal: networks are cached by them.
        for name in ("dtype", "param_dtype"):
            given = getattr(self, name)
            try:
                dtype = jnp.dtype(given)
            except TypeError:
                dtype = None
            if given is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                raise MegError(f"{name} {given!r}: take float32, bfloat16 or float16")
            object.__setattr__(self, name, dtype)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, so that `jax.jit` takes it as a function
class Network:
    """A module's graph and its parameters' shapes. Teacher, student and EMA share one.

    Args:
        config: the frozen configuration that the module was built from.
        graphdef: the NNX graph without arrays.
        shapes: the parameter tree of `jax.ShapeDtypeStruct`.
        make: builds the module, given its `rngs`.
        dtype: of activations.
        remat: whether its blocks recompute their activations in the backward pass.
    """

    config: Any
    graphdef: Any
    shapes: Params
    make: Callable[..., nnx.Module] = dataclasses.field(repr=False)
    dtype: Any = jnp.float32
    remat: bool = False

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters, as the layers' initialisers draw them."""
        return jax.jit(lambda key: _params(self.make(rngs=nnx.Rngs(key))))(key)

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """The module's output for these parameters, gathered where they are used if a mesh cuts them."""

        def run(params: Params) -> Any:
            params = _with_int_keys(gathered(params, self.dtype))
            return nnx.merge(self.graphdef, params)(*args, **kwargs)

        return gathering(run, params, (args, kwargs), remat=self.remat)


@functools.lru_cache(maxsize=64)  # Tracing a module takes seconds, and who asks again gets the same.
def network(module: Callable[..., nnx.Module], config: Any, options: Options) -> Network:
    """Describe `module(config, options)` without allocating a parameter."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return module(config, options, rngs=rngs)

    # A key is an argument, so that not even the random bits are computed.
    abstract = nnx.eval_shape(lambda key: make(nnx.Rngs(key)), jax.eval_shape(lambda: jax.random.key(0)))
    graphdef, _ = nnx.split(abstract)
    return Network(config, graphdef, _params(abstract), make, options.dtype, options.remat)


def _params(module: nnx.Module) -> Params:
    return _with_str_keys(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def _with_str_keys(tree: Any) -> Any:
    return {str(k): _with_str_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _with_int_keys(tree: Any) -> Any:
    # NNX keeps a list's items under integers, file formats (and people) want strings.
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _with_int_keys(v) for k, v in tree.items()}

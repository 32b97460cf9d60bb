"""What stages share in one run: the pipeline, loaded when first needed, and the results so far."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jaxtyping import Array

import megjax
from eval.prompts import refuse_windows
from eval.suite import cache, methods
from eval.suite.config import MIN_STEPS, SAMPLE, SuiteConfig
from megjax import weights
from megjax.data.grammar import captions
from megjax.data.scenes import sample_scenes
from megjax.errors import MegError
from megjax.models import Options, UNetConfig, from_dict
from megjax.pipeline.load import GATE, Pipeline, load_pipeline, open_backbone
from megjax.pipeline.split import condition
from megjax.text import tokenize

PACKAGES = ("optax", "flax", "scipy", "pillow", "dm-pix", "scikit-image")
"""What results depend on, besides JAX and NumPy."""
LOADED = (".safetensors", ".msgpack", ".json", ".txt")
"""Files of a model's folder that decide its pictures."""


class Stage(NamedTuple):
    """A pure function of settings and of other stages' results."""

    name: str
    """What the progress bar shows."""
    settings: Mapping[str, Any]
    """All that the result depends on, besides what it needs and the model."""
    run: Callable[..., dict[str, Any]]
    """(context, settings, *results of what it needs) to nested dicts of numbers, strings and arrays."""
    needs: tuple[Stage, ...] = ()
    model: bool = True
    """Whether the weights enter."""


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """One run of the suite."""

    config: SuiteConfig
    say: Callable[[str], None] = print
    """Takes one line."""
    on_stage: Callable[[Stage], None] = lambda stage: None
    """Told each stage that is computed before it is."""
    on_share: Callable[[float, str], None] = lambda share, note: None
    """Told how far the stage at hand is, and where it stands."""
    done: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Results by key."""
    records: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By stage: settings, key, device, seconds."""

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The model under test; raises `MegError` for one that does not run with so few steps."""
        dtype = jnp.dtype(self.config.dtype)
        loaded = load_pipeline(self.config.model, Options(dtype=dtype, param_dtype=dtype))
        refuse_windows(loaded, MIN_STEPS)
        return loaded

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """Of what computes."""
        return {
            "megjax": megjax.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        }

    @functools.cached_property
    def device(self) -> str:
        """What computes."""
        kind = jax.devices()[0].device_kind
        return f"{len(jax.devices())} x {kind}" if kind != "cpu" else f"CPU, {platform.machine()}"

    @functools.cached_property
    def code(self) -> str:
        """Digest of the code and of what runs it."""
        return cache.digest([cache.source_digest(), self.versions, self.device])

    @functools.cached_property
    def root(self) -> Path:
        """The model's folder."""
        return open_backbone(self.config.model).path

    @property
    def sample_size(self) -> int:
        """Side of the model's latents, from its config alone."""
        folder = weights.open_folder(self.root)
        return from_dict(UNetConfig, folder.configs["unet"], origin=str(self.root / "unet")).sample_size

    @functools.cached_property
    def weights(self) -> str:
        """Digest of what is loaded of the model's folder, not of its pictures and notes."""
        return cache.files_digest([p for p in self.root.rglob("*") if p.suffix in LOADED], self.root)

    @functools.cached_property
    def prunings(self) -> tuple[methods.Name, ...]:
        """The prunings compared: without a learned gate, magnitudes alone."""
        return methods.PRUNINGS if (self.root / GATE).is_file() else ("pruning_magnitude",)

    @functools.cached_property
    def prompts(self) -> list[str]:
        """The sample, if one was given or there is no file, then the file's or fresh captions."""
        config = self.config
        if config.prompts is None:
            # Split: the data of distillation are drawn with the keys of `fold_in` themselves.
            key, _ = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
            return [config.sample or SAMPLE, *captions(sample_scenes(key, config.pictures - 1))]
        try:
            lines = [line.strip() for line in config.prompts.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise MegError(f"{config.prompts} cannot be read: {error}") from None
        found = [line for line in (config.sample, *lines) if line]
        if len(found) < config.pictures:
            raise MegError(f"{config.prompts}: {len(found)} prompts, --pictures {config.pictures} are wanted")
        return found[: config.pictures]

    @functools.cached_property
    def conditioning(self) -> list[tuple[Any, Any]]:
        """Of each batch of prompts, and of as many empty ones."""
        pipeline, batch = self.pipeline, self.config.batch
        size = (pipeline.image_size, pipeline.image_size)

        def encode(texts: list[str]) -> Any:
            ids = jnp.asarray(tokenize(pipeline.tokenizers, texts, allow_empty=True))
            return condition(pipeline, pipeline.params, ids, size=size)

        empty = encode([""] * batch)
        starts = range(0, len(self.prompts), batch)
        return [(encode(self.prompts[i : i + batch]), empty) for i in starts]

    def keys(self, purpose: int) -> Array:
        """Return one key a picture, the same ones for every method."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), purpose)
        return jax.random.split(key, self.config.pictures)

    @functools.cached_property
    def method(self) -> Callable[[methods.Name], methods.Method]:
        """The baselines by name, each made once."""
        return functools.cache(lambda name: methods.method(self.pipeline, name, self.config.rules))

    @property
    def folder(self) -> Path:
        """Where results are kept."""
        return self.config.out / "cache"


def key_of(context: Context, stage: Stage) -> str:
    """Return what names a stage's result: its settings, its needs, the weights and the code."""
    model = context.weights if stage.model else None
    needs = [key_of(context, need) for need in stage.needs]
    return cache.digest([stage.name, dict(stage.settings), needs, model, context.code])


def get(context: Context, stage: Stage) -> dict[str, Any]:
    """Return a stage's result: from this run, from the cache, or computed and kept."""
    key = key_of(context, stage)
    if key in context.done:
        return context.done[key]
    path = path_of(context, stage)
    record = cache.read(path, context.say)
    if record is None:
        inputs = [get(context, need) for need in stage.needs]
        context.on_stage(stage)
        start, processor = time.perf_counter(), time.process_time()
        result = stage.run(context, stage.settings, *inputs)
        record = {
            "settings": dict(stage.settings),
            "key": key,
            "device": context.device,
            "versions": context.versions,
            "seconds": time.perf_counter() - start,
            "processor_seconds": time.process_time() - processor,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **result.pop("cost", {}),
            # So that the provenance is whole where the cache spares what was needed.
            "needs": _records(context, stage),
            "result": result,
        }
        cache.write(path, record)
    context.done[key] = record["result"]
    own = {k: v for k, v in record.items() if k not in ("result", "needs")}
    for name, each in (*record["needs"].items(), (stage.name, own)):
        same = context.records.get(name, each)
        context.records[name if same["key"] == each["key"] else f"{name}, {each['key'][:8]}"] = each
    return record["result"]


def _records(context: Context, stage: Stage) -> dict[str, Any]:
    """The records of all that a stage needs, by name."""
    keys = set()

    def add(one: Stage) -> None:
        for need in one.needs:
            keys.add(key_of(context, need))
            add(need)

    add(stage)
    return {name: record for name, record in context.records.items() if record["key"] in keys}


def path_of(context: Context, stage: Stage) -> Path:
    """Return the file of a stage's result."""
    name = "".join(c if c.isalnum() else "-" for c in stage.name)
    return context.folder / f"{name}-{key_of(context, stage)[:16]}.msgpack"


def is_kept(context: Context, stage: Stage) -> bool:
    """Say whether a stage's result is at hand, so that nothing need be computed."""
    return (
        key_of(context, stage) in context.done or cache.read(path_of(context, stage), context.say) is not None
    )

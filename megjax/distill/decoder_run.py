"""Distilling the device's decoder from cached latents: MEG, MEG-Split-Finetune, MEG-Pruning; at any width."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from safetensors.numpy import save

from megjax import weights
from megjax.checks import above, known_dtype, within
from megjax.data.loader import DataConfig, shuffled_batches
from megjax.distill.cache import Cache
from megjax.distill.decoder import (
    Degrade,
    Latents,
    Objective,
    Ranges,
    decoder_distillation_loss,
    gated,
    magnitude_pruned,
    merged,
)
from megjax.distill.encoding import ENCODERS, encoded_latents, model_key, sampled_latents
from megjax.distill.export import on_every_process, save_weights
from megjax.distill.pruning import init_gate
from megjax.errors import MegError
from megjax.files import writable_folder
from megjax.link.features import PSNR_DB, FeatureRules
from megjax.models import Network, Options, Params, VAEConfig, read, vae_decoder
from megjax.pipeline.load import DECODERS, GATE_FILE, STUDENT, Pipeline, load_pipeline, read_gate, release
from megjax.pipeline.split import noise_unit, unet_params
from megjax.training.checkpoints import claim
from megjax.training.logs import Report, Work, counted_work
from megjax.training.loop import Evaluate, check_run, fit
from megjax.training.optimizer import make_optimizer
from megjax.training.placing import place
from megjax.training.processes import together
from megjax.training.sharding import (
    batch_part,
    even_sharding,
    make_mesh,
    replicated,
    state_shardings,
)
from megjax.training.step import Loss, Metrics, Step, TrainState, init_state, make_step

Method: TypeAlias = Literal["meg", "split_finetune", "pruning", "magnitude_pruning"]
"""What happens on the air: merging, noise alone, the variational gate, or the largest scalars alone."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Which decoder to distil, and how."""

    method: Method = "meg"
    latents: Literal["sampled", "encoded"] = "sampled"
    """Of the student after 4 to 12 steps, or pictures' own, which need no U-Net."""
    start: Path | None = None
    """A distilled decoder's folder to go on from, instead of the frozen decoder."""
    model: str = "tiny"
    """Whose latents and frozen decoder: with a few-step student, or its teacher is sampled."""
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(pictures=4096))
    """Whose captions."""
    folder: Path = Path("runs/decoder")
    """Where checkpoints, logs and the decoder go, each in a part named after the method."""
    cache: Path = Path("runs/cache")
    seed: int = 0
    steps: int = 8000
    batch: int = 16
    """Over all devices."""
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 1000
    clip: float = 1.0
    weight_decay: float = 0.01
    ema_decay: float = 0.9999
    guidance: float = 2.5
    """Of the latents' sampler."""
    rules: FeatureRules = "default"
    """Tokens, merging and noise: MegJAX's, or the paper's."""
    ratios: tuple[float, float] = (0.0, 1.0)
    """Drawn uniformly, per sample; `split_finetune` merges nothing."""
    psnr_db: tuple[float, float] = (5.0, 20.0)
    """Of the features, likewise."""
    kl_weight: float = 8e-6
    """beta of the gate of `pruning`."""
    objective: Objective = "mse"
    """Mean squared error (the paper's), or `quality`, the mean of its logarithm."""
    width: float = 1.0
    """Of the decoder's channels. Another width than 1 starts from random weights; 0.3 costs a tenth."""
    dtype: str = "float32"
    remat: bool = False
    replicas: int = -1
    fsdp: int = 1
    sample_batch: int = 64
    """Captions sampled at a time."""
    held_out: int = 64
    """The last so many examples are evaluated on."""
    test_ratios: tuple[float, ...] = (0.0, 0.2, 0.4, 0.8)
    test_psnr_db: float | None = None
    """Left out, the rules' own: 10, of the paper 20."""
    every: int = 100
    checkpoint_every: int = 500
    evaluate_every: int = 500
    keep: int = 2
    tensorboard: bool = False
    distributed: bool = False
    """Join the run's other processes first, see `megjax.training.processes`."""
    sigterm_code: int = 0
    """Exit code of a run that SIGTERM ended, for launchers that take 0 for the end of the work."""
    peak_flops_per_s: float = 0.0
    """Of one device, for the FLOP utilisation; 0 looks it up by the device's name."""


def check(config: DecoderConfig) -> None:
    """Refuse settings that cannot be trained with.

    Raises:
        MegError: naming the setting, its value and what is allowed.
    """
    within(config, 1, math.inf, "steps", "batch", "accumulate", "sample_batch", "held_out")
    within(config, 0, math.inf, "learning_rate", "warmup", "weight_decay", "kl_weight", "guidance")
    within(config, 0, 1, "ema_decay", "ratios", "test_ratios")
    within(config, -100, 300, "psnr_db", "test_psnr_db")
    above(config, 0, "clip")
    known_dtype(config.dtype)
    for name in ("ratios", "psnr_db"):
        low, high = getattr(config, name)
        if low > high:
            raise MegError(f"{name} {low} {high}: give the lower end first")
    if not config.test_ratios:
        raise MegError("test_ratios: give at least one")


class Program(NamedTuple):
    """The compiled part of a run, on shapes alone.

    Args:
        step: the update.
        decoder: the network that learns.
        optimizer: of `init_state`.
        state: shapes of the training state.
    """

    step: Step
    decoder: Network
    optimizer: optax.GradientTransformation
    state: TrainState


def decoder_distillation(config: DecoderConfig, pipeline: Pipeline) -> Program:
    """Put the decoder's training program together; of the pipeline's parameters only the shapes are read."""
    options = Options(dtype=config.dtype, remat=config.remat)
    decoder = vae_decoder(narrowed(pipeline.vae_decoder.config, config.width), options)
    optimizer = make_optimizer(
        config.learning_rate,
        config.steps,
        warmup=config.warmup,
        clip=config.clip,
        weight_decay=config.weight_decay,
    )
    # A decoder to start from has the shapes of any other, and no file is read while tracing.
    fresh = dataclasses.replace(config, start=None)
    shapes = jax.eval_shape(
        lambda key: init_state(_start(fresh, pipeline, decoder, key), optimizer), jax.random.key(0)
    )
    loss = rows_loss(config, decoder, _ranges(config))
    step = make_step(loss, optimizer, config.ema_decay, accumulate=config.accumulate)
    return Program(step, decoder, optimizer, shapes)


def narrowed(config: VAEConfig, width: float) -> VAEConfig:
    """The same autoencoder with fewer channels, each level's a multiple of the groups of its norms.

    Raises:
        MegError: a width that is not above 0 and at most 1.
    """
    if not 0 < width <= 1:
        raise MegError(f"decoder width {width}: above 0, up to 1 is allowed")
    groups = config.norm_num_groups
    channels = tuple(max(groups, round(width * c / groups) * groups) for c in config.block_out_channels)
    return dataclasses.replace(config, block_out_channels=channels)


def rows_loss(config: DecoderConfig, decoder: Network, ranges: Ranges) -> Loss:
    """Eq. (21) over rows of the cache."""
    loss = decoder_distillation_loss(decoder, _degrade(config, decoder.config), ranges, config.objective)

    def of_rows(params: Any, key: Key[Array, ""], rows: Any) -> tuple[Float[Array, ""], Metrics]:
        picture = rows["picture"].astype(jnp.float32) / 255
        return loss(params, key, Latents(rows["z"], picture))

    return of_rows


def _degrade(config: DecoderConfig, vae: VAEConfig) -> Degrade:
    unit = noise_unit(config.rules, vae)
    match config.method:
        case "pruning":
            return gated(config.kl_weight, unit)
        case "magnitude_pruning":
            return magnitude_pruned(unit)
        case "meg" | "split_finetune":
            return merged(config.rules, unit)


def _ranges(config: DecoderConfig) -> Ranges:
    return Ranges((0.0, 0.0) if config.method == "split_finetune" else config.ratios, config.psnr_db)


def _start(config: DecoderConfig, pipeline: Pipeline, decoder: Network, key: Key[Array, ""]) -> Params:
    """The frozen decoder's weights, or random ones at another width; and the gate."""
    key_decoder, key_gate = jax.random.split(key)
    params: Params = {}
    if config.start is not None:
        started, own, gate = load_decoder(config.start)
        if started.config != decoder.config or (config.method == "pruning") != (gate is not None):
            raise MegError(f"{config.start}: a decoder of another width or method; start from one like this")
        params["decoder"] = own
        if gate is not None:
            params["gate"] = gate
        return params
    if decoder.config == pipeline.vae_decoder.config:
        own = pipeline.params["vae_decoder"]
        params["decoder"] = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), own)
    else:
        params["decoder"] = decoder.init(key_decoder)
    if config.method == "pruning":
        vae = pipeline.vae_decoder.config
        side = pipeline.image_size // vae.downsampling
        params["gate"] = init_gate(key_gate, side * side * vae.latent_channels)
    return params


def train_decoder(config: DecoderConfig) -> Path:
    """Distil, resuming from the newest checkpoint; returns the decoder's folder, `folder/decoders/METHOD`.

    Raises:
        MegError: see `check`, `check_run`, `claim`, `fit`, `open_pictures` and `cached`.
    """
    check(config)
    mesh = make_mesh(config.replicas, config.fsdp)
    pipeline = load_pipeline(config.model, Options(config.dtype, config.dtype))
    writable_folder(config.folder, "folder")
    program = decoder_distillation(config, pipeline)
    # Before the latents, which may take days to sample.
    check_run(config, mesh, config.method, program.state)
    claim(config.folder, config.method, _meaning(config, pipeline))
    key_init, key_run = jax.random.split(jax.random.key(config.seed))
    shardings = state_shardings(program.state, mesh)
    params = place(_start(config, pipeline, program.decoder, key_init), shardings.params)
    rows = _rows(config, pipeline)
    release(pipeline, "vae_decoder")
    if len(rows) < config.held_out + config.batch:
        raise MegError(
            f"{len(rows)} examples: {config.held_out} are held out and a batch has {config.batch}; take more"
        )
    with jax.set_mesh(mesh):
        start = jax.jit(lambda params: init_state(params, program.optimizer), out_shardings=shardings)(params)
    state = fit(
        program.step,
        start,
        key=key_run,
        steps=config.steps,
        folder=config.folder,
        name=config.method,
        batches=shuffled_batches(
            rows.first(len(rows) - config.held_out), config.batch, config.seed, batch_part(mesh)
        ),
        mesh=mesh,
        every=config.every,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep,
        best="mse_mean",
        evaluate=_evaluation(config, program.decoder, rows, mesh),
        evaluate_every=config.evaluate_every,
        work=_work(config, pipeline, rows),
        tensorboard=config.tensorboard,
        sigterm_code=config.sigterm_code,
    )
    folder = config.folder / DECODERS / config.method
    extra: dict[str, bytes] = {}
    if "gate" in state.ema:
        gathered = on_every_process(state.ema["gate"])
        gate = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(gathered).items()}
        extra[GATE_FILE] = save(gate)
    save_weights(folder, program.decoder, state.ema["decoder"], extra=extra)
    together("exported")
    return folder


def _meaning(config: DecoderConfig, pipeline: Pipeline) -> dict[str, Any]:
    """What a run's checkpoints are of, beyond their shapes."""
    meaning = {"rules": config.rules, "latents": config.latents, "vae": model_key(pipeline, ("vae",))}
    if config.latents == "sampled":
        sampler = unet_params(pipeline)[1]
        unet = STUDENT if sampler == "perflow" else "unet"
        meaning |= {"sampler": model_key(pipeline, (unet, "scheduler", *ENCODERS))}
        meaning |= {"guidance": config.guidance}
    return meaning


def _work(config: DecoderConfig, pipeline: Pipeline, rows: Cache) -> Work:
    data = {k: jax.ShapeDtypeStruct((config.batch, *v.shape), v.dtype) for k, v in rows[0].items()}
    program = decoder_distillation(dataclasses.replace(config, remat=False), pipeline)
    return counted_work(program.step, program.state, data, config.batch, config.peak_flops_per_s)


def _rows(config: DecoderConfig, pipeline: Pipeline) -> Cache:
    where = (pipeline, config.data, config.cache, config.sample_batch, {"dtype": config.dtype})
    if config.latents == "encoded":
        return encoded_latents(*where)
    return sampled_latents(*where, guidance=config.guidance, seed=config.seed)


def load_decoder(folder: Path) -> tuple[Network, Params, Params | None]:
    """Read a distilled decoder of any width: the network, its parameters, and its gate if it was pruned."""
    config = read(VAEConfig, folder / "config.json")
    decoder = vae_decoder(config)
    gate = None
    if (folder / GATE_FILE).is_file():
        gate = read_gate(folder / GATE_FILE)
    return decoder, weights.load(folder, decoder.shapes, dtype=jnp.float32), gate


def _evaluation(config: DecoderConfig, decoder: Network, rows: Cache, mesh: Mesh) -> Evaluate:
    """The EMA's error on held-out examples at some ratios and one noise level, and its pictures."""
    held_out = [rows[i] for i in range(len(rows) - config.held_out, len(rows))]
    data = {name: np.stack([row[name] for row in held_out]) for name in held_out[0]}
    ratios = (0.0,) if config.method == "split_finetune" else config.test_ratios
    degrade = _degrade(config, decoder.config)
    key = jax.random.key(config.seed + 2)
    # As many at a time as a step has: all of them might not fit.
    parts = np.array_split(np.arange(config.held_out, dtype=np.int32), -(-config.held_out // config.batch))
    test_psnr_db = PSNR_DB[config.rules] if config.test_psnr_db is None else config.test_psnr_db
    # The longest run's latents: there only merging and noise count.
    longest = data["z"][:, -1].astype(np.float32)
    given = [place((own, longest[own]), (even_sharding(len(own), mesh),) * 2) for own in parts]

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def decoded(params: Params, numbers: Array, z: Array, ratio: Array) -> Array:
        keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)
        psnr_db = jnp.float32(test_psnr_db)
        received, _ = jax.vmap(degrade, in_axes=(None, 0, 0, None, None))(params, keys, z, ratio, psnr_db)
        return jnp.clip(decoder(params["decoder"], received), 0.0, 1.0)

    def evaluate(state: TrainState) -> Report:
        reference = data["picture"].astype(np.float32) / 255
        scalars, columns = {}, [np.concatenate(reference[:4])]
        for ratio in ratios:
            shown = [np.asarray(decoded(state.ema, *both, jnp.float32(ratio))) for both in given]
            pictures = np.concatenate(shown)
            scalars[f"mse_{ratio:g}"] = float(np.mean(np.square(pictures - reference)))
            columns.append(np.concatenate(pictures[:4]))
        scalars["mse_mean"] = float(np.mean(list(scalars.values())))
        return Report(scalars, {"pictures": np.concatenate(columns, axis=1)})

    return evaluate

"""Distilling a backbone's U-Net into a few-step student: data, teacher, student and mesh put together."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from megjax import weights
from megjax.checks import above, known_dtype, within
from megjax.data.loader import DataConfig, data_key, shuffled_batches
from megjax.diffusion import Conditioning, conditioned, ddim, guided, perflow
from megjax.diffusion.perflow import WINDOWS, Flow, Parametrisation, flow_file, read_flow
from megjax.distill.cache import Cache
from megjax.distill.encoding import ENCODERS, caption_ids, encoded_pictures, model_key, progress_bar
from megjax.distill.export import copy_backbone, delta, save_weights
from megjax.distill.perflow import SolverOrder
from megjax.distill.student_loss import Batch, Measure, Solved, perflow_loss, solved_loss
from megjax.distill.windows import check_draws, solved_windows
from megjax.errors import MegError
from megjax.files import writable_folder
from megjax.models import Network, Options, Params, time_ids, unet
from megjax.models.attention import IMPLEMENTATIONS
from megjax.pipeline.load import STUDENT, Pipeline, load_pipeline, open_backbone, release
from megjax.pipeline.split import condition
from megjax.training.checkpoints import claim
from megjax.training.logs import Report, Work, counted_work
from megjax.training.loop import Evaluate, check_run, fit
from megjax.training.lora import init_lora, lora_loss, merge_lora
from megjax.training.optimizer import MIN_SIDE, Moments, Rule, make_optimizer
from megjax.training.placing import place, place_key
from megjax.training.processes import together
from megjax.training.sharding import (
    batch_part,
    even_sharding,
    make_mesh,
    param_shardings,
    replicated,
    state_shardings,
)
from megjax.training.step import (
    Inputs,
    Loss,
    Metrics,
    Step,
    TrainState,
    init_state,
    make_step,
    scalars,
)

NAME = "student"
GRID_STEPS = (4, 6, 8, 12)


@dataclasses.dataclass(frozen=True)
class DiffuserConfig:
    """What to distil, how, and on which devices."""

    model: str = "tiny"
    """The teacher: an embedded backbone, a folder in diffusers layout or a hub id."""
    start: Path | None = None
    """A student's folder to go on from, instead of the teacher's weights."""
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(pictures=16384))
    folder: Path = Path("runs/diffuser")
    """Where checkpoints, logs, sample grids and the student go."""
    cache: Path = Path("runs/cache")
    """Where latents and text embeddings are kept, for all runs."""
    seed: int = 0
    steps: int = 10_000
    batch: int = 32
    """Over all devices."""
    accumulate: int = 1
    """Parts of a batch, one after the other."""
    learning_rate: float = 1e-4
    decay: bool = False
    """Let the learning rate fall to zero by a cosine."""
    warmup: int = 100
    clip: float = 1.0
    weight_decay: float = 0.01
    ema_decay: float = 0.9999
    optimizer: Rule = "adamw"
    """`adafactor` keeps the least; `muon` half of AdamW's, and learns more in a step, which takes longer."""
    moments: Moments = "float32"
    """Of the optimiser's first moment."""
    offload_ema: bool = False
    """Keep the moving average in the hosts' memory."""
    kind: Parametrisation = "ddim_eps"
    """What the student predicts: the noise of a DDIM step across its window, the diffusion's, or dz/dt."""
    windows: int = WINDOWS
    """K, the fewest steps that the student will serve."""
    solver_steps: int = 10
    """Of the teacher in each window."""
    solver_order: SolverOrder = 1
    """Of the teacher's solver inside a window: 1 is DDIM, the paper's; 2 errs less in the same calls."""
    solve_once: bool = False
    """Solve each example's windows once, before the first step, and keep both ends."""
    chained: bool = False
    """With `solve_once`: start each window where the teacher left the one before, instead of by Eq. (10)."""
    rollout: float = 0.0
    """With `chained`: weight of the student's error after its whole way, one step to a window."""
    rollout_width: float | None = None
    """Of the pseudo-Huber loss of that error, instead of the squared one."""
    guidance: float = 7.5
    """Of the teacher's solver and of its pictures in the sample grid."""
    pure_noise: bool = False
    """Start the noisiest window from noise alone, as samplers do, instead of Eq. (10)'s noisy latents."""
    text_drop: float = 0.1
    """Share of captions replaced by the empty prompt for the student; the teacher always reads them."""
    huber: float | None = None
    """Width of the Huber loss, instead of the squared error."""
    measure: Measure = "output"
    """What errors are measured of: the student's output (the paper's), or its velocity."""
    window_draws: tuple[int, ...] = ()
    """Draws of each window, the noisiest first, in proportion; `solve_once` keeps as many trajectories."""
    start_share: float = 0.0
    """Of the times that are moved to their window's start, where a sampler of few steps is most often."""
    lora_rank: int = 0
    """Train factors of this rank in place of the weights: no second U-Net in memory nor in the state."""
    lora_scale: float = 1.0
    """alpha/rank."""
    dtype: str = "float32"
    """Of the teacher and of all activations; the student's weights stay in float32."""
    remat: bool = False
    """Recompute the student's activations in the backward pass."""
    attention: str = "xla"
    """Or `cudnn`, on NVIDIA GPUs in bfloat16 or float16."""
    replicas: int = -1
    """Copies of the states, each with its part of the batch; -1 takes the devices that are left."""
    fsdp: int = 1
    """Devices that the states, and a replica's part of the batch, are cut over; -1 likewise."""
    tensor: int = 1
    """Devices that attention's heads are cut over."""
    encode_batch: int = 64
    """Pictures encoded at a time."""
    held_out: int = 64
    """The last so many examples measure the teacher-consistency error instead of training."""
    grid_prompts: int = 4
    every: int = 100
    """Steps between log lines."""
    checkpoint_every: int = 500
    evaluate_every: int = 500
    keep: int = 2
    """Checkpoints, besides the best by the teacher-consistency error."""
    tensorboard: bool = False
    distributed: bool = False
    """Join the run's other processes first, see `megjax.training.processes`."""
    sigterm_code: int = 0
    """Exit code of a run that SIGTERM ended, for launchers that take 0 for the end of the work."""
    peak_flops_per_s: float = 0.0
    """Of one device, for the FLOP utilisation; 0 looks it up by the device's name."""


def check(config: DiffuserConfig, pipeline: Pipeline) -> None:
    """Refuse settings that cannot be trained with.

    Raises:
        MegError: naming the setting, its value and what is allowed.
    """
    counts = ("steps", "batch", "accumulate", "windows", "encode_batch", "held_out", "grid_prompts")
    within(config, 1, math.inf, *counts)
    within(config, 0, math.inf, "learning_rate", "warmup", "weight_decay", "lora_rank", "rollout", "guidance")
    within(config, 0, 1, "ema_decay", "text_drop", "start_share")
    above(config, 0, "clip", "huber", "rollout_width")
    known_dtype(config.dtype)
    if config.attention not in IMPLEMENTATIONS:
        raise MegError(f"attention {config.attention}: choose from {', '.join(IMPLEMENTATIONS)}")
    if config.optimizer == "muon" and 0 < config.lora_rank < MIN_SIDE:
        raise MegError(
            f"lora_rank {config.lora_rank} with muon: it leaves matrices narrower than {MIN_SIDE} to AdamW; "
            f"take a rank of {MIN_SIDE} or more, or --optimizer adamw"
        )
    if config.attention == "cudnn" and config.dtype == "float32":
        raise MegError("attention cudnn in float32: choose --dtype bfloat16, or --attention xla")
    timesteps = len(pipeline.schedule.abar)
    within(config, 1, timesteps // config.windows, "solver_steps")
    check_draws(config.windows, config.window_draws, config.chained)
    if config.chained and not config.solve_once:
        raise MegError("chained: only windows solved beforehand can be; add --solve-once")
    if config.rollout and not config.chained:
        raise MegError(f"rollout {config.rollout}: it needs the teacher's whole trajectories; add --chained")


class Program(NamedTuple):
    """The compiled part of a run, on shapes alone: nothing is allocated.

    Args:
        step: the update.
        init: student's parameters, from the key and the teacher's.
        optimizer: of `init_state`.
        state: shapes of the training state.
        student: (trained parameters, teacher) -> the U-Net's parameters.
    """

    step: Step
    init: Callable[[Key[Array, ""], Params], Params]
    optimizer: optax.GradientTransformation
    state: TrainState
    student: Callable[[Params, Params], Params]


def distillation(config: DiffuserConfig, pipeline: Pipeline) -> Program:
    """Put the student's training program together.

    Args:
        config: how.
        pipeline: its networks, schedule and sizes; of its parameters only the shapes are read.

    Raises:
        MegError: see `check`.
    """
    check(config, pipeline)
    teacher = pipeline.unet
    options = Options(dtype=config.dtype, remat=config.remat, attention=config.attention)
    loss = distillation_loss(config, pipeline, unet(teacher.config, options))
    if config.lora_rank:
        loss = lora_loss(loss, config.lora_scale)
    optimizer = make_optimizer(
        config.learning_rate,
        config.steps,
        rule=config.optimizer,
        warmup=config.warmup,
        clip=config.clip,
        weight_decay=config.weight_decay,
        decay=config.decay,
        moments=config.moments,
    )

    def init(key: Key[Array, ""], params: Params) -> Params:
        if config.lora_rank:
            return init_lora(key, params, config.lora_rank)
        return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)

    def student(trained: Params, params: Params) -> Params:
        return merge_lora(params, trained, config.lora_scale) if config.lora_rank else trained

    shapes = jax.eval_shape(
        lambda key, p: init_state(init(key, p), optimizer), jax.random.key(0), teacher.shapes
    )
    step = make_step(
        loss, optimizer, config.ema_decay, accumulate=config.accumulate, offload_ema=config.offload_ema
    )
    return Program(step, init, optimizer, shapes, student)


def distillation_loss(config: DiffuserConfig, pipeline: Pipeline, student: Network) -> Loss:
    """Eq. (12) over `Inputs`: rows of the cache, and `{"teacher", "empty"}`, the empty prompt as one row."""
    side = pipeline.image_size
    common = {
        "windows": config.windows,
        "kind": config.kind,
        "text_drop": config.text_drop,
        "huber": config.huber,
        "measure": config.measure,
        "draws": config.window_draws,
        "start_share": config.start_share,
    }
    if config.solve_once:
        rollout = {"rollout": config.rollout, "rollout_width": config.rollout_width}
        solved = solved_loss(student, pipeline.schedule, **rollout, **common)

        def of_solved(params: Any, key: Key[Array, ""], inputs: Inputs) -> tuple[Float[Array, ""], Metrics]:
            rows, frozen = inputs
            prompt, empty = _conditions(rows, frozen["empty"], side)
            return solved(params, key, Solved(rows["z_s"], rows["z_e"], prompt, empty))

        return of_solved
    loss = perflow_loss(
        student,
        pipeline.schedule,
        guidance=config.guidance,
        solver_steps=config.solver_steps,
        solver_order=config.solver_order,
        pure_noise=config.pure_noise,
        teacher_unet=pipeline.unet,
        **common,
    )

    def of_rows(params: Any, key: Key[Array, ""], inputs: Inputs) -> tuple[Float[Array, ""], Metrics]:
        rows, frozen = inputs
        prompt, empty = _conditions(rows, frozen["empty"], side)
        return loss(params, key, Batch(frozen["teacher"], rows["z0"], prompt, empty))

    return of_rows


def _conditions(rows: Any, empty: PyTree, side: int) -> tuple[Conditioning, Conditioning]:
    B = len(rows["z0"])
    sizes = time_ids(side, side, B)
    text, pooled = (rows[name].astype(jnp.float32) for name in ("text", "pooled"))
    no_text, no_pooled = (jnp.broadcast_to(x, (B, *x.shape[1:])) for x in empty)
    return Conditioning(text, pooled, sizes), Conditioning(no_text, no_pooled, sizes)


def train_diffuser(config: DiffuserConfig) -> Path:
    """Distil, resuming from the newest checkpoint; returns the folder of the backbone with its student.

    `folder/model` is the teacher's backbone with `unet_student` in it; `folder/unet_delta`, the student minus
    the teacher, makes a few-step model of any fine-tune (`megjax.distill.export.add_delta`).

    Raises:
        MegError: see `check`, `check_run`, `claim`, `fit`, `open_pictures` and `cached`; `start` with LoRA,
            or of other weights or another flow.
    """
    known_dtype(config.dtype)
    mesh = make_mesh(config.replicas, config.fsdp, config.tensor)
    pipeline = load_pipeline(config.model, Options(config.dtype, config.dtype, attention=config.attention))
    check(config, pipeline)
    writable_folder(config.folder, "folder")
    program = distillation(config, pipeline)
    # Before the data, which may take days to encode: what does not fit must not wait for it.
    check_run(config, mesh, NAME, program.state)
    shares = param_shardings(pipeline.unet.shapes, mesh)
    started = None if config.start is None else _started(config.start, config, pipeline, shares)
    claim(config.folder, NAME, _meaning(config, pipeline))
    preset = {"dtype": config.dtype}
    rows = encoded_pictures(pipeline, config.data, config.cache, config.encode_batch, preset)
    if len(rows) < config.held_out + config.batch:
        raise MegError(
            f"{len(rows)} examples: {config.held_out} are held out and a batch has {config.batch}; take more"
        )
    if config.solve_once:
        rows = _solved(config, pipeline, rows)
    key_init, key_run = jax.random.split(jax.random.key(config.seed))
    teacher = place(pipeline.params["unet"], shares)
    first = teacher if started is None else started
    shardings = state_shardings(program.state, mesh, offload_ema=config.offload_ema)
    with jax.set_mesh(mesh):
        start = jax.jit(
            lambda key, params: init_state(program.init(key, params), program.optimizer),
            out_shardings=shardings,
        )(place_key(key_init, mesh), first)
    empty = jax.tree.map(np.asarray, _empty(pipeline))
    del first, started
    release(pipeline, "vae_decoder")
    frozen = {"teacher": teacher, "empty": place(empty, jax.tree.map(lambda _: replicated(mesh), empty))}
    learned = rows.first(len(rows) - config.held_out)
    batches = shuffled_batches(learned, config.batch, config.seed, batch_part(mesh))
    state = fit(
        program.step,
        start,
        key=key_run,
        steps=config.steps,
        folder=config.folder,
        name=NAME,
        batches=batches,
        frozen=frozen,
        mesh=mesh,
        every=config.every,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep,
        best="consistency",
        evaluate=_evaluation(config, pipeline, program, rows, frozen, mesh),
        evaluate_every=config.evaluate_every,
        work=_work(config, pipeline, frozen, rows),
        tensorboard=config.tensorboard,
        sigterm_code=config.sigterm_code,
    )
    if config.lora_rank:
        # Merged in the teacher's own dtype, small changes would be rounded away.
        teacher = jax.tree.map(lambda p: p.astype(jnp.float32), teacher)
    return _export(config, pipeline, program.student(_on_device(config, state.ema, mesh), teacher), teacher)


def _meaning(config: DiffuserConfig, pipeline: Pipeline) -> dict[str, Any]:
    """What a run's checkpoints are of, beyond their shapes."""
    flow = Flow(config.kind, config.windows)._asdict()
    scale = {"lora_scale": config.lora_scale} if config.lora_rank else {}
    teacher = {"teacher": model_key(pipeline, ("unet", "scheduler")), "guidance": config.guidance}
    return flow | scale | teacher | {"optimizer": config.optimizer}


def _started(folder: Path, config: DiffuserConfig, pipeline: Pipeline, shares: PyTree) -> Params:
    if config.lora_rank:
        raise MegError(f"--start {folder}: factors start from the teacher's weights; leave --lora-rank out")
    if (flow := read_flow(folder)) != Flow(config.kind, config.windows):
        raise MegError(
            f"--start {folder}: a student of --kind {flow.kind} --windows {flow.windows}, this run is of "
            f"{config.kind}, {config.windows}"
        )
    return weights.load(folder, pipeline.unet.shapes, dtype=jnp.float32, shardings=shares)


def _on_device(config: DiffuserConfig, ema: Params, mesh: Mesh) -> Params:
    """The moving average in the devices' memory, each with its part."""
    if not config.offload_ema:
        return ema
    # Compiled, as each of several processes can reach its own devices alone.
    move = jax.jit(
        lambda x: jax.device_put(x, jax.memory.Space.Device), out_shardings=param_shardings(ema, mesh)
    )
    return move(ema)


def _solved(config: DiffuserConfig, pipeline: Pipeline, rows: Cache) -> Cache:
    key = {
        "preset": {"dtype": config.dtype},
        "model": model_key(pipeline, (*ENCODERS, "unet", "scheduler")),
        "data": data_key(config.data),
    }
    with progress_bar("windows", len(rows)) as (_, progress):
        return solved_windows(
            pipeline,
            rows,
            _empty(pipeline),
            config.cache,
            key,
            config.encode_batch,
            guidance=config.guidance,
            windows=config.windows,
            draws=config.window_draws,
            chained=config.chained,
            pure_noise=config.pure_noise,
            solver_steps=config.solver_steps,
            solver_order=config.solver_order,
            seed=config.seed,
            progress=progress,
        )


def _empty(pipeline: Pipeline) -> tuple[Array, Array]:
    ids, _ = caption_ids(pipeline, [""])
    size = (pipeline.image_size, pipeline.image_size)
    text, pooled, _ = condition(pipeline, pipeline.params, jnp.asarray(ids), size=size)
    return text, pooled


def _work(config: DiffuserConfig, pipeline: Pipeline, frozen: Any, rows: Cache) -> Work:
    data = {k: jax.ShapeDtypeStruct((config.batch, *v.shape), v.dtype) for k, v in rows[0].items()}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
    # The model's FLOPs: what is recomputed to save memory does not count. A kernel's cannot be counted, nor
    # lowered for the CPU, where they are.
    config = dataclasses.replace(config, remat=False, attention="xla")
    teacher = unet(pipeline.unet.config, Options(config.dtype, config.dtype))
    program = distillation(config, dataclasses.replace(pipeline, unet=teacher))
    return counted_work(
        program.step, program.state, Inputs(data, shapes), config.batch, config.peak_flops_per_s
    )


def _evaluation(
    config: DiffuserConfig, pipeline: Pipeline, program: Program, rows: Cache, frozen: Any, mesh: Mesh
) -> Evaluate:
    """The EMA's teacher-consistency error on held-out examples, and its samples beside the teacher's.

    `learned_...` are the same errors on as many of the examples that it learns from: where they are far
    lower, these are being learned by heart, and more pictures help where more steps do not.
    """

    def stacked(first: int, number: int) -> dict[str, np.ndarray]:
        some = [rows[i] for i in range(first, first + number)]
        return {name: np.stack([row[name] for row in some]) for name in some[0]}

    number = min(config.grid_prompts, config.held_out)
    data = stacked(len(rows) - config.held_out, config.held_out)
    learned = stacked(0, min(config.held_out, len(rows) - config.held_out))
    noise = np.asarray(
        jax.random.normal(jax.random.key(config.seed + 1), data["z0"][:number].shape, jnp.float32)
    )
    # Without its text an example's error says what a caption is worth, not how near the student is.
    loss = distillation_loss(dataclasses.replace(config, text_drop=0.0), pipeline, pipeline.unet)
    steps = [T for T in GRID_STEPS if config.windows <= T]
    side, sched = pipeline.image_size, pipeline.schedule

    @jax.jit
    def errors(trained: Params, key: Key[Array, ""], inputs: Inputs) -> Metrics:
        value, metrics = loss(program.student(trained, inputs.frozen["teacher"]), key, inputs)
        return {"consistency": value, **metrics}

    def scalars_of(trained: Params, inputs: Inputs, prefix: str = "") -> dict[str, float]:
        return scalars(errors(trained, key, inputs), prefix)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def sample(trained: Params, inputs: Inputs, noise: Array, T: Array) -> Array:
        params = program.student(trained, inputs.frozen["teacher"])
        prompt, _ = _conditions(inputs.data, inputs.frozen["empty"], side)
        student = conditioned(pipeline.unet, params, prompt)
        return perflow(student, noise, sched, T, kind=config.kind, windows=config.windows)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def teacher_sample(inputs: Inputs, noise: Array) -> Array:
        both = _conditions(inputs.data, inputs.frozen["empty"], side)
        return ddim(guided(pipeline.unet, inputs.frozen["teacher"], *both, config.guidance), noise, sched, 50)

    def placed(data: dict[str, np.ndarray]) -> Inputs:
        where = even_sharding(len(data["z0"]), mesh)
        return Inputs(place(data, jax.tree.map(lambda _: where, data)), frozen)

    known, everyone = placed(learned), placed(data)
    few = Inputs({name: array[:number] for name, array in data.items()}, frozen)
    key = jax.random.key(config.seed + 2)

    @functools.cache
    def reference() -> np.ndarray:
        return np.asarray(teacher_sample(few, noise))

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def decoded(params: Params, z: Array) -> Array:
        return jnp.clip(pipeline.vae_decoder(params, z), 0.0, 1.0)

    def pictures(z: np.ndarray) -> np.ndarray:
        return np.concatenate(np.asarray(decoded(pipeline.params["vae_decoder"], z)))

    def evaluate(state: TrainState) -> Report:
        ema = _on_device(config, state.ema, mesh)
        found = scalars_of(ema, everyone) | scalars_of(ema, known, "learned_")
        columns = [reference()]
        for T in steps:
            z = np.asarray(sample(ema, few, noise, jnp.int32(T)))
            found[f"mse_to_teacher_{T}"] = float(np.mean(np.square(z - columns[0])))
            columns.append(z)
        grid = np.concatenate([pictures(z) for z in columns], axis=1)
        return Report(found, {"samples": grid.astype(np.float32)})

    return evaluate


def _export(config: DiffuserConfig, pipeline: Pipeline, student: Params, teacher: Params) -> Path:
    part, model = config.folder / STUDENT, config.folder / "model"
    flow = flow_file(Flow(config.kind, config.windows))
    save_weights(part, pipeline.unet, student, extra=flow)
    save_weights(config.folder / "unet_delta", pipeline.unet, delta(student, teacher), extra=flow)
    if jax.process_index() == 0:
        source = open_backbone(config.model).path
        copy_backbone(source, model, {STUDENT: part})
    together("exported")
    return model

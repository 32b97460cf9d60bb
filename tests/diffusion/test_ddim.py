"""The DDIM solver: against closed forms, against diffusers' rule for the timesteps, and its compilation."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megjax.diffusion import Conditioning, ddim, ddim_timesteps, noised, perflow, read_schedule, schedule
from megjax.errors import MegError, WeightsError

SCHEDULES = {
    "leading": schedule(spacing="leading", offset=1),
    "trailing": schedule(spacing="trailing", offset=0),
    "linspace": schedule(spacing="linspace", offset=0),
}


def test_schedule_is_sdxls():
    abar = np.asarray(schedule().abar, np.float64)
    assert abar.shape == (1000,)
    # 1 - 0.00085, and the value that SDXL's terminal signal-to-noise ratio is known for.
    np.testing.assert_allclose(abar[0], 0.99915, rtol=1e-6)
    np.testing.assert_allclose(abar[-1], 0.0047, atol=5e-5)


def diffusers_timesteps(steps, spacing):
    """`DDIMScheduler.set_timesteps`, written with numpy as its documentation states it."""
    if spacing == "leading":
        return (np.arange(steps) * (1000 // steps))[::-1] + 1
    if spacing == "linspace":
        return np.linspace(0, 999, steps).round()[::-1]
    return np.round(np.linspace(1000, 0, steps, endpoint=False)).astype(int) - 1


@pytest.mark.parametrize("spacing", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 4, 7, 8, 12, 30, 50, 999])
def test_timesteps(steps, spacing):
    t, t_next = jax.jit(ddim_timesteps)(SCHEDULES[spacing], steps, np.arange(steps))
    np.testing.assert_array_equal(t, diffusers_timesteps(steps, spacing))
    np.testing.assert_array_equal(t - t_next, 1000 // steps)


@pytest.mark.parity
@pytest.mark.parametrize("spacing", SCHEDULES)
def test_timesteps_against_diffusers(spacing):
    diffusers = pytest.importorskip("diffusers")
    sched = SCHEDULES[spacing]
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=sched.offset)
    ours = jax.jit(lambda steps: ddim_timesteps(sched, steps, jnp.arange(50))[0])
    # Where 1000 / steps ends in a half (48, say), diffusers rounds what floating point leaves of it.
    for steps in (*range(1, 13), 20, 25, 30, 40, 50):
        theirs.set_timesteps(steps)
        np.testing.assert_array_equal(ours(steps)[:steps], theirs.timesteps.numpy(), err_msg=str(steps))


def gaussian(std, abar_S):
    """The exact noise prediction where z_0 ~ N(0, std^2), and the exact end of its ODE from timestep t."""

    def denoise(z, t_B):
        abar = abar_S[t_B][:, None, None, None]
        return jnp.sqrt(1 - abar) * z / (abar * std**2 + 1 - abar)

    def end(z, t):
        variance = lambda a: a * std**2 + 1 - a  # noqa: E731
        return z * jnp.sqrt(variance(abar_S[0]) / variance(abar_S[t]))

    return denoise, end


def test_first_order_convergence_on_gaussian_data():
    sched = SCHEDULES["trailing"]
    denoise, end = gaussian(0.5, sched.abar)
    z = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    # Divisors of 1000: for others diffusers' timesteps and strides do not meet exactly.
    steps = np.array([10, 20, 40, 125, 250])
    errors = [float(jnp.abs(ddim(denoise, z, sched, n) - end(z, 999)).max()) for n in steps.tolist()]
    orders = np.log(np.array(errors[:-1]) / errors[1:]) / np.log(steps[1:] / steps[:-1])
    assert np.all((orders > 0.8) & (orders < 1.25)), (errors, orders)


def test_single_point_data_is_found_in_one_step():
    # Where every picture is the same one, eps is exact and constant on the way.
    sched, target = SCHEDULES["trailing"], 0.7

    def denoise(z, t_B):
        abar = sched.abar[t_B][:, None, None, None]
        return (z - jnp.sqrt(abar) * target) / jnp.sqrt(1 - abar)

    z = jax.random.normal(jax.random.key(1), (1, 2, 2, 4))
    # The noise found at the start is added again as the last timestep has it, in however many steps.
    first, last = (np.asarray(sched.abar, float)[i] for i in (-1, 0))
    eps = (np.asarray(z, float) - np.sqrt(first) * target) / np.sqrt(1 - first)
    for n in (1, 4, 10):
        end = np.sqrt(last) * target + np.sqrt(1 - last) * eps
        np.testing.assert_allclose(ddim(denoise, z, sched, n), end, atol=2e-4)


@pytest.mark.parametrize("sampler", [ddim, perflow])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_latents_of_sixteen_bits_are_carried_in_float32(sampler, dtype):
    sched = SCHEDULES["leading"]
    denoise, _ = gaussian(1.0, sched.abar)
    seen = []

    def network(z, t_B):
        seen.append(z.dtype)
        return denoise(z.astype(jnp.float32), t_B).astype(z.dtype)

    z = jax.random.normal(jax.random.key(1), (1, 2, 2, 4), dtype)
    found = sampler(network, z, sched, 50)
    assert found.dtype == z.dtype == seen[0]
    # A rounding of what the network sees and says a step, and none of the sum.
    exact = sampler(denoise, z.astype(jnp.float32), sched, 50)
    half = 0.5 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found.astype(np.float32), exact, rtol=half, atol=half)


def test_one_executable_for_every_number_of_steps():
    sched = SCHEDULES["leading"]
    denoise, _ = gaussian(1.0, sched.abar)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(z, steps, start):
        return ddim(denoise, z, sched, steps, start)

    z = jnp.ones((1, 2, 2, 1))
    for steps in range(1, 13):
        assert np.isfinite(run(z, steps, steps // 2)).all()


@settings(max_examples=30, deadline=None)
@given(t=st.integers(0, 999), seed=st.integers(0, 100))
def test_noised_keeps_unit_variance(t, seed):
    z0, noise = jax.random.normal(jax.random.key(seed), (2, 1, 32, 32, 4))
    z = noised(schedule(), z0, noise, jnp.array([t]))
    np.testing.assert_allclose(float(z.std()), 1.0, atol=0.06)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[t]
    np.testing.assert_allclose(z, np.sqrt(abar) * z0 + np.sqrt(1 - abar) * noise, atol=1e-5)


def test_guidance_one_is_the_conditional_prediction():
    from megjax.diffusion import conditioned, guided

    def unet(params, z, t_B, text, pooled, sizes, token_merge):
        del pooled, sizes, token_merge
        return params["gain"] * z + text.mean((1, 2))[:, None, None, None] + t_B[:, None, None, None]

    def condition(value):
        return Conditioning(jnp.full((2, 3, 4), value), jnp.zeros((2, 5)), jnp.zeros((2, 6)))

    z, t = jnp.ones((2, 4, 4, 1)), jnp.array([3, 5])
    alone = conditioned(unet, {"gain": 2.0}, condition(1.0))(z, t)
    np.testing.assert_allclose(guided(unet, {"gain": 2.0}, condition(1.0), condition(0.0), 1.0)(z, t), alone)
    thrice = guided(unet, {"gain": 2.0}, condition(1.0), condition(0.0), 3.0)(z, t)
    np.testing.assert_allclose(thrice, alone + 2.0)


def test_bad_schedules(tmp_path):
    with pytest.raises(MegError, match="beta_start"):
        schedule(beta_start=0.0)
    with pytest.raises(MegError, match="log"):
        schedule(spacing="log")
    config = tmp_path / "scheduler_config.json"
    with pytest.raises(WeightsError, match="scheduler"):
        read_schedule(config)
    with pytest.raises(MegError, match="num_train_timesteps 0"):
        schedule(num_train_timesteps=0)
    config.write_text("[]")
    with pytest.raises(WeightsError, match="no JSON object"):
        read_schedule(config)


# stable-diffusion-xl-base-1.0's, on the hub.
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},  # sdxl-turbo
        {"rescale_betas_zero_snr": False, "sigma_max": None, "sigma_min": None, "timestep_type": "discrete"},
        {"use_karras_sigmas": True, "use_beta_sigmas": False, "final_sigmas_type": "zero"},
    ],
)
def test_schedules_that_load(tmp_path, more):
    config = tmp_path / "scheduler_config.json"
    config.write_text(json.dumps(SDXL | more))
    sched = read_schedule(config)
    np.testing.assert_array_equal(sched.abar, schedule().abar)
    assert (sched.spacing, sched.offset) == ((SDXL | more)["timestep_spacing"], 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_end", "0.012"),
        ("beta_schedule", "linear"),
        ("beta_start", None),
        ("beta_start", "gone"),
        ("clip_sample", True),
        ("interpolation_type", "log_linear"),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", None),
        ("prediction_type", "v_prediction"),
        ("rescale_betas_zero_snr", True),
        ("set_alpha_to_one", True),
        ("sigma_data", 0.5),
        ("steps_offset", 0.5),
        ("steps_offset", -1),
        ("thresholding", True),
        ("timestep_type", "continuous"),
        ("trained_betas", [0.1, 0.2]),
        ("use_flow_sigmas", True),
        ("timestep_spacing", "log"),
        ("timestep_spacing", None),
    ],
)
def test_schedules_that_are_not_sdxls(tmp_path, field, value):
    config = tmp_path / "scheduler_config.json"
    config.write_text(json.dumps({k: v for k, v in (SDXL | {field: value}).items() if v != "gone"}))
    said = field.removeprefix("steps_").replace("timestep_spacing", "timestep spacing")
    with pytest.raises(WeightsError, match=f"scheduler_config.json: .*{said}"):
        read_schedule(config)

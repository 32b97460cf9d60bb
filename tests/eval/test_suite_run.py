"""The evaluation suite end to end on an untrained backbone: numbers recomputed, a second run, killed runs."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.suite.config import ITEMS, SAMPLE, SuiteConfig
from eval.suite.measure import AIR, NOISE
from eval.suite.numbers import without_times
from eval.suite.run import run
from megjax.link.channel import LinkParams, sample_distance_m
from megjax.pipeline import load_pipeline
from megjax.pipeline.split import condition, decode, denoise, send
from megjax.text import tokenize
from tests.small import save_random

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SMALL = {"pictures": 4, "batch": 2, "seeds": 1, "cvpo_epochs": 8, "ppo_epochs": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("backbone") / "model")


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    return SuiteConfig(
        model=str(folder), out=tmp_path_factory.mktemp("suite"), ratios=(0.0, 0.4, 0.9375), **SMALL
    )


@pytest.fixture(scope="module")
def results(config):
    run(config)
    return json.loads((config.out / "results.json").read_text())


def table(results, name):
    tables = [t for item in results["items"].values() for t in item["tables"] if t["id"] == name]
    return {row["label"]: row["cells"] for row in tables[0]["rows"]}


def test_everything_is_written_and_a_second_run_computes_nothing(config, results, monkeypatch):
    assert list(results["items"]) == list(ITEMS)
    for item in results["items"].values():
        for figure in item["figures"]:
            for suffix in (".png", ".svg", "-dark.png", "-dark.svg"):
                assert (config.out / "figures" / f"{figure['id']}{suffix}").stat().st_size > 1000
            assert figure["alt"]
            assert figure["caption"]
        for found in item["tables"]:
            for suffix in (".csv", ".md"):
                assert (config.out / "tables" / f"{found['id']}{suffix}").stat().st_size > 50
    page = (config.out / "report.html").read_text()
    assert page.count("<figcaption>") == sum(len(item["figures"]) for item in results["items"].values())
    for record in results["stages"].values():
        assert {"settings", "device", "versions", "seconds", "finished", "key"} <= set(record)

    computed, loaded = [], []
    monkeypatch.setattr("eval.suite.context.load_pipeline", lambda *args: loaded.append(args))
    run(config, on_stage=computed.append, say=lambda text: None)
    assert computed == loaded == []
    assert json.loads((config.out / "results.json").read_text()) == results


def test_a_modelled_latency_by_hand(config, results):
    key = jax.random.key(config.seed)
    distance_m = np.asarray(sample_distance_m(key, LinkParams(), (config.pictures,)), float)
    snr_db = 30 + 94 - 35.3 - 37.6 * np.log10(distance_m)
    rate_bps = 1e6 * np.log2(1 + 10 ** (snr_db / 10))
    merged = int(np.float32(0.4) * 4096 + 1e-4)
    bits = (4096 - merged) * 256 + 3072 + 10 * merged
    flops = {k: v["used"]["value"] for k, v in table(results, "table1").items() if k.startswith("FLOPs")}
    server = (flops["FLOPs, text encoders"] + 7 * 2 * flops["FLOPs, U-Net call with token merging"]) / 58
    latency = server + np.mean(bits / rate_bps) + flops["FLOPs, VAE decoder"] / 29
    found = table(results, "table2-modelled")["MEG, 7 steps"]
    assert found["bits"]["value"] == pytest.approx(bits / 1e6, abs=1e-5)
    assert found["total"]["value"] == pytest.approx(latency, rel=1e-4)
    assert found["total"]["tag"] == "modelled"


def test_a_measured_error_by_hand(config, results, folder):
    """MEG's picture of Fig. 4, one alone and function by function."""
    pipeline = load_pipeline(folder)
    ids = [jnp.asarray(tokenize(pipeline.tokenizers, [text], allow_empty=True)) for text in (SAMPLE, "")]
    prompt, empty = (condition(pipeline, pipeline.params, i, size=(64, 64)) for i in ids)

    def key(purpose):
        return jax.random.split(jax.random.fold_in(jax.random.key(config.seed), purpose), config.pictures)[0]

    noise = jax.random.normal(key(NOISE), (16, 16, 4))[None]
    params, start = pipeline.params["unet"], jnp.zeros_like(noise)

    def latent(steps, tome_ratio):
        return denoise(pipeline, params, noise, prompt, empty, steps, 2.5, start, 1.0, tome_ratio=tome_ratio)

    received = send(key(AIR), latent(7, 0.5), 0.4, 10.0).z_BxHxWxC
    shown, reference = (
        decode(pipeline, pipeline.params["vae_decoder"], z) for z in (received, latent(12, 0.0))
    )
    samples = results["items"]["fig4"]["figures"][0]["samples"]
    found = next(s for s in samples if s["label"].startswith("MEG, 7"))
    assert found["mse"]["value"] == pytest.approx(float(jnp.mean((shown - reference) ** 2)), rel=1e-3)


def test_the_fitted_line_by_hand(results):
    panel = results["items"]["fig3"]["figures"][0]["panels"][0]
    curves = [curve for curve in panel["lines"] if curve["series"] != "fit"]
    x, y = (np.concatenate([curve[k] for curve in curves]) for k in ("x", "y"))
    r_squared = np.corrcoef(x, y)[0, 1] ** 2
    assert table(results, "fig3-lines")["all"]["r2"]["value"] == pytest.approx(r_squared, rel=1e-6)


def test_a_run_killed_three_times_ends_the_same(config, results, folder, tmp_path):
    command = [sys.executable, "-m", "eval.suite", "--model", str(folder), "--out", str(tmp_path)]
    command += [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command += ["--ratios", "0", "0.4", "0.9375"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(15, 60))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    found = json.loads((tmp_path / "results.json").read_text())
    assert without_times(found) == without_times(results)


def test_a_damaged_cache_is_computed_again(config, results):
    for path in (config.out / "cache").glob("*.msgpack"):
        if path.name.startswith(("MEG-Split--8", "counting")):
            path.write_bytes(path.read_bytes()[:-5])
    said, computed = [], []
    run(config, say=said.append, on_stage=lambda stage: computed.append(stage.name))
    assert any("is damaged; computing it again" in line for line in said)
    assert {name.split(",")[0] for name in computed} == {"MEG-Split", "counting FLOPs"}
    assert without_times(json.loads((config.out / "results.json").read_text())) == without_times(results)

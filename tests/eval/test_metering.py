"""The line of Fig. 3: recovered from exact points; meters are read around the calls."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import metering
from eval.metering import Measurement, fit_line, measure
from megjax.errors import MegError


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move."""
    now = [0.0]
    monkeypatch.setattr(metering, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_line_through_exact_points():
    points = [Measurement(f, 0.01 + f / 5e12, None) for f in (1e11, 3e11, 9e11)]
    line = fit_line(points)
    np.testing.assert_allclose(
        [line.flops_per_s, line.intercept_s, line.r_squared], [5e12, 0.01, 1.0], rtol=1e-6
    )
    noisy = [p._replace(seconds=p.seconds + e) for p, e in zip(points, (0.05, -0.05, 0.02), strict=True)]
    assert 0.0 < fit_line(noisy).r_squared < 0.99


def test_joules_are_a_calls_share(clock):
    readings = iter([100.0, 160.0])
    calls = []

    def call():
        calls.append(1)
        clock[0] += 1.0
        return jnp.ones(3)

    point = measure(call, 7.0, calls=4, meter=lambda: next(readings))
    assert len(calls) == 5  # one to warm up, four timed
    assert point.joules == 15.0
    assert point.flops == 7.0
    assert point.seconds == 1.0
    assert measure(call, 1.0, calls=1).joules is None
    assert len(calls) == 7


def test_short_calls_are_metered_for_longer_than_a_counter_stands_still(clock):
    """30 W on a counter that moves every 0.1 s: calls of 4 ms are 0.12 J, of which one reads 0 or 3 J."""

    def call():
        clock[0] += 0.004
        return jnp.ones(3)

    def meter():
        return 30.0 * np.floor(clock[0] / 0.1 + 1e-9) * 0.1

    point = measure(call, 1.0, calls=1, meter=meter)
    np.testing.assert_allclose(point.joules, 0.12, rtol=0.06)
    np.testing.assert_allclose(point.seconds, 0.004)
    assert clock[0] >= 2.0
    clock[0] = 0.0
    measure(call, 1.0, calls=3)
    assert clock[0] < 0.02  # without a meter the calls are enough


def test_a_counter_that_stands_still_is_refused(clock):
    def call():
        clock[0] += 1.0
        return jnp.ones(3)

    with pytest.raises(MegError, match=r"energy 0 J a call.*--power-w"):
        measure(call, 1.0, calls=2, meter=lambda: 5.0)


def zone(folder, name, microjoules):
    """A domain of the kernel's powercap tree."""
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text("999999\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder


def test_rapl_counts_across_its_wrap(tmp_path, monkeypatch):
    package = zone(tmp_path / "intel-rapl:0", "package-0", 900000)
    (tmp_path / "intel-rapl:0:0").mkdir()  # a core of that package: already counted
    monkeypatch.setattr(metering, "_RAPL", tmp_path)
    name, joules = metering.energy_meter()
    assert name == "RAPL"
    assert joules() == 0.0
    (package / "energy_uj").write_text("400000\n")
    np.testing.assert_allclose(joules(), 0.5)


def test_rapl_counts_the_packages_and_not_the_platform_that_holds_them(tmp_path, monkeypatch):
    zones = [
        zone(tmp_path / f"intel-rapl:{i}", name, 0)
        for i, name in enumerate(("package-0", "package-1", "psys"))
    ]
    monkeypatch.setattr(metering, "_RAPL", tmp_path)
    _, joules = metering.energy_meter()
    for each, microjoules in zip(zones, (200000, 100000, 900000), strict=True):
        (each / "energy_uj").write_text(f"{microjoules}\n")
    np.testing.assert_allclose(joules(), 0.3)


def test_a_tpus_energy_is_not_its_hosts(tmp_path, monkeypatch):
    monkeypatch.setattr(metering, "_RAPL", tmp_path)
    zone(tmp_path / "intel-rapl:0", "package-0", 5)
    assert metering.energy_meter() is not None
    monkeypatch.setattr(metering.jax, "default_backend", lambda: "tpu")
    assert metering.energy_meter() is None


def test_no_meter_is_said_and_not_invented(tmp_path, monkeypatch):
    monkeypatch.setattr(metering, "_RAPL", tmp_path)
    assert metering.energy_meter() is None
    zone(tmp_path / "intel-rapl:0", "psys", 0)
    assert metering.energy_meter() is None


@pytest.mark.parametrize(
    ("visible", "joules"),
    [(None, 1.0), ("2", 3.0), ("1,0", 2.0), ("GPU-c,GPU-a", 3.0), ("MIG-b", 2.0), ("7", None), ("", None)],
)
def test_nvml_reads_the_gpu_that_jax_runs_on(visible, joules, monkeypatch):
    millijoules = {0: 1000, 1: 2000, 2: 3000, "GPU-a": 1000, "MIG-b": 2000, "GPU-c": 3000}
    stub = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: {0: 0, 1: 1, 2: 2}[index],
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", stub)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = metering.energy_meter()
    if joules is None:
        assert meter is None
    else:
        name, read = meter
        assert name == "NVML"
        assert read() == joules

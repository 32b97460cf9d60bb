"""The line of Fig. 3: recovered from exact points; meters are read around the calls."""

import jax.numpy as jnp
import numpy as np

from megjax.link import metering
from megjax.link.metering import Measurement, fit_line, measure


def test_line_through_exact_points():
    points = [Measurement(f, 0.01 + f / 5e12, None) for f in (1e11, 3e11, 9e11)]
    line = fit_line(points)
    np.testing.assert_allclose(
        [line.flops_per_s, line.intercept_s, line.r_squared], [5e12, 0.01, 1.0], rtol=1e-6
    )
    noisy = [p._replace(seconds=p.seconds + e) for p, e in zip(points, (0.05, -0.05, 0.02), strict=True)]
    assert 0.0 < fit_line(noisy).r_squared < 0.99


def test_joules_are_a_calls_share():
    readings = iter([100.0, 160.0])
    calls = []
    point = measure(lambda: calls.append(1) or jnp.ones(3), 7.0, calls=4, meter=lambda: next(readings))
    assert len(calls) == 5  # one to warm up, four timed
    assert point.joules == 15.0
    assert point.flops == 7.0
    assert point.seconds > 0.0
    assert measure(lambda: jnp.ones(3), 1.0, calls=1).joules is None


def test_rapl_counts_across_its_wrap(tmp_path, monkeypatch):
    package = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()  # a core of that package: already counted
    package.mkdir()
    (package / "max_energy_range_uj").write_text("999999\n")
    (package / "energy_uj").write_text("900000\n")
    monkeypatch.setattr(metering, "_RAPL", tmp_path)
    name, joules = metering.energy_meter()
    assert name == "RAPL"
    assert joules() == 0.0
    (package / "energy_uj").write_text("400000\n")
    np.testing.assert_allclose(joules(), 0.5)


def test_no_meter_is_said_and_not_invented(tmp_path, monkeypatch):
    monkeypatch.setattr(metering, "_RAPL", tmp_path)
    assert metering.energy_meter() is None

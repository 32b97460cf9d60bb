"""Hardware profiles: the paper's numbers, Table II's calibration, files."""

import json

import numpy as np
import pytest

from megjax.errors import MegError
from megjax.link import profiles
from megjax.link.cost import SDXL_UNMERGED, frame_cost

TABLE_2 = [(12, False, 7.5806), (8, False, 5.2122), (7, True, 3.2316), (4, True, 2.0287)]


@pytest.mark.parametrize(("steps", "tome", "seconds"), TABLE_2)
def test_table2_reproduces_the_computation_column(steps, tome, seconds):
    compute = profiles.compute(profiles.load("table2"), tome=tome)
    assert abs(float(frame_cost(compute, steps, 0.0, 1.0).latency_s) - seconds) < 8e-3


def test_step_timed_profiles_charge_the_calls_of_a_step():
    alone, both = (
        profiles.compute(profiles.load("table2"), SDXL_UNMERGED._replace(calls_per_step=n)) for n in (1, 2)
    )
    assert (both.es_step_s, both.es_step_j) == (2 * alone.es_step_s, 2 * alone.es_step_j)
    assert both.es_fixed_s == alone.es_fixed_s


def test_no_flop_linear_profile_fits_table2():
    """The slopes' ratio is 1.50, the FLOPs' 1.18: why `table2` is a kind of its own."""
    table2 = profiles.load("table2")
    paper = profiles.load("paper")
    plain = profiles.compute(paper, SDXL_UNMERGED).es_step_s
    assert 1.45 < table2.step_s / table2.tome_step_s < 1.55
    np.testing.assert_allclose(plain / profiles.compute(paper).es_step_s, 1.18, atol=0.005)


def test_paper_profile():
    compute = profiles.compute(profiles.load("paper"))
    np.testing.assert_allclose(compute.es_step_s, 2 * 5.73 / 58)
    np.testing.assert_allclose(compute.ue_s, 10.5 / 29)
    # Half the speed at 0.8 of the FLOPs per joule.
    np.testing.assert_allclose(compute.ue_j / 10.5e12 * 0.8, 5.2e-12)


@pytest.mark.parametrize("name", profiles.names())
def test_every_profile_loads_and_says_where_it_is_from(name):
    profile = profiles.load(name)
    compute = profiles.compute(profile)
    assert compute.es_step_s > 0
    assert compute.es_step_j > 0
    sources = [profile.source] if name == "table2" else [profile.server.source, profile.device.source]
    assert all(sources)


@pytest.mark.parametrize("name", ["paper", "table2", "h100"])
def test_a_saved_profile_comes_back(tmp_path, name):
    profile = profiles.load(name)
    profiles.save(tmp_path / "deep" / "mine.json", profile)
    assert profiles.load(tmp_path / "deep" / "mine.json") == profile
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "mine.json"]


def test_errors_name_the_value(tmp_path):
    with pytest.raises(MegError, match=r"'k80'.*a40"):
        profiles.load("k80")
    with pytest.raises(MegError, match=r"'toaster'.*phone"):
        profiles.load("a40", device="toaster")
    broken = tmp_path / "broken.json"
    profiles.save(broken, profiles.load("paper"))
    good = json.loads(broken.read_text())
    for wrong in (
        {"name": "x"},
        good | {"fixed_j": float("nan")},
        good | {"server": good["server"] | {"flops_per_s": 0}},
        good | {"device": good["device"] | {"j_per_flop": "much"}},
    ):
        broken.write_text(json.dumps(wrong))
        with pytest.raises(MegError, match=r"broken\.json is not a hardware profile"):
            profiles.load(broken)
    broken.write_text("[" * 100_000)
    with pytest.raises(MegError, match=r"broken\.json is not a hardware profile"):
        profiles.load(broken)

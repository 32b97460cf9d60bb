"""The programs of `eval` refuse at once, in one line, what they cannot do; prompts and their latents."""

import dataclasses
import importlib
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.merging import TINY as STUDY
from configs.quality_table import SMOKE
from eval import backbone, bench, distillation, profile
from eval.bench import policy as policy_bench
from eval.metering import Measurement
from eval.prompts import draw, prompts_of, refuse_windows
from megjax.errors import MegError
from megjax.link.profiles import load as load_profile
from megjax.pipeline import load_pipeline
from megjax.pipeline.split import condition, denoise
from megjax.text import tokenize

NOWHERE = Path("no/such/folder/out.json")


def refused(main, config, capsys):
    """What a main says of a config, when it ends at once with code 2."""
    with pytest.raises(SystemExit) as ended:
        main(config)
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    return said[0]


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (backbone, {"model": "no/such/model"}, "no/such/model"),
        (backbone, {"captions": 0}, "captions 0, batch 50: at least 1 caption, a multiple of the batch"),
        (backbone, {"captions": 75}, "captions 75, batch 50: at least 1 caption"),
        (backbone, {"batch": 0}, "batch 0"),
        (backbone, {"output": NOWHERE}, "there is no folder no/such/folder"),
        (backbone, {"seed": -1}, "seed -1: 0 to 4294967295 is allowed"),
        (backbone, {"steps": 0}, "steps 0: at least 1 is allowed"),
        (backbone, {"steps": 1001}, "steps 1001: from 1 to 1000 are allowed"),
        (backbone, {"guidance": float("nan")}, "guidance nan"),
        (distillation, {"model": "no/such/model"}, "no/such/model"),
        (distillation, {"captions": -50}, "captions -50, pictures 2000, batch 50: multiples of a batch"),
        (distillation, {"pictures": 30}, "pictures 30, batch 50: multiples of a batch"),
        (distillation, {"batch": 0}, "batch 0"),
        (distillation, {"captions": 1, "batch": 1}, "captions 1, pictures 2000, batch 1: multiples of a"),
        (distillation, {"seed": 2**64}, "seed 18446744073709551616: 0 to 4294967295 is allowed"),
        (distillation, {"output": NOWHERE}, "there is no folder no/such/folder"),
        (profile, {"out": NOWHERE}, "there is no folder no/such/folder"),
        (profile, {"calls": 0}, "calls 0, batches (1, 2, 4, 8, 16): at least 1 call"),
        (profile, {"batches": ()}, "batches ()"),
        (profile, {"power_w": float("nan")}, "power_w nan: finite numbers of watts above 0"),
        (profile, {"power_w": 10.0, "device": "toaster"}, "unknown device 'toaster'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(module, changes, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in refused(module.main, module.Config(**changes), capsys)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("merging", dataclasses.replace(STUDY, scenes=1), "1 scenes, 64 crops, batch 32"),
        ("merging", dataclasses.replace(STUDY, seed=-1), "seed -1: 0 to 4294967295 is allowed"),
        ("merging", dataclasses.replace(STUDY, folder=Path("/dev/null/x")), "/dev/null/x cannot be written"),
        ("quality_table", dataclasses.replace(SMOKE, output=NOWHERE), "there is no folder no/such/folder"),
    ],
)
def test_presets_mains_refuse_in_one_line(name, config, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in refused(importlib.import_module(f"eval.{name}.__main__").main, config, capsys)


@dataclasses.dataclass(frozen=True)
class Comparison:
    rounds: int = 1
    json: Path | None = None


def test_a_comparisons_process_that_cannot_be_or_fails_is_one_line():
    with pytest.raises(MegError, match="core 99999: this process may use "):
        bench.child("platform", env={}, core=99999)
    with pytest.raises(MegError, match=r"python -m eval\.bench\.nothing ended with exit code 1"):
        bench.child("eval.bench.nothing", env={})
    assert bench.child("platform", env={}).strip()


def test_a_comparison_sees_to_its_file_and_its_rounds_first(capsys, monkeypatch):
    def main(config):
        bench.alternate("eval.bench.tasks", ("megjax", "torch"), config.rounds, core=0, args=[])

    for *arguments, message in (("--json", str(NOWHERE), "no folder"), ("--rounds", "0", "rounds 0")):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        said = refused(lambda config: bench.start(main, config, "eval.bench.x"), Comparison, capsys)
        assert message in said


def test_the_policies_comparison_asks_for_what_it_runs_alone(capsys, monkeypatch):
    monkeypatch.setattr(policy_bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(policy_bench, "bars", lambda config: {"runs": []})
    for what, said in (("env", "gymnasium.*megjax\\[rl\\]"), ("update", "torch.*megjax\\[parity\\]")):
        with pytest.raises(MegError, match=said):
            policy_bench.main(policy_bench.Config(what))
    policy_bench.main(policy_bench.Config("bars"))
    assert capsys.readouterr().out == '{"runs": []}\n'


def test_a_given_power_needs_no_meter(monkeypatch, tmp_path):
    point = Measurement(1e9, 0.01, None)
    monkeypatch.setattr(profile, "energy_meter", lambda: pytest.fail("read"))
    monkeypatch.setattr(
        profile, "programs", lambda batches: iter([("a", jnp.sin, (1.0,)), ("b", jnp.sin, (1.0,))])
    )
    monkeypatch.setattr(profile.flops, "count", lambda *args: types.SimpleNamespace(flops=1.0))
    points = iter([point, point._replace(flops=2e9, seconds=0.02)])
    monkeypatch.setattr(profile, "measure", lambda *args: next(points))
    profile.main(profile.Config(out=tmp_path / "profile.json", power_w=10.0))
    assert load_profile(tmp_path / "profile.json").server.j_per_flop == pytest.approx(10.0 / 1e11)


def test_usage_names_the_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/an/absolute/path.py", "--help"])
    with pytest.raises(SystemExit):
        bench.start(lambda config: None, Comparison, "eval.bench.tasks")
    assert "usage: python -m eval.bench.tasks" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny")


@pytest.mark.parametrize(("sampler", "part"), [("ddim", "unet"), ("perflow", "student")])
def test_prompts_are_drawn_by_the_samplers_own_network(pipeline, sampler, part):
    texts, key = ["a red circle", "a blue square"], jax.random.key(0)
    prompts = prompts_of(pipeline, texts, key)
    ids = [jnp.asarray(tokenize(pipeline.tokenizers, t, allow_empty=True)) for t in (texts, ["", ""])]
    prompt, empty = (condition(pipeline, pipeline.params, i, size=(64, 64)) for i in ids)
    noise = jax.random.normal(key, (2, 16, 16, 4))
    own = (prompt, empty, 4, 3.0, jnp.zeros_like(noise), 1.0)
    expected = denoise(pipeline, pipeline.params[part], noise, *own, sampler=sampler)
    np.testing.assert_array_equal(draw(pipeline, prompts, sampler, 4, 3.0), expected)


def without(pipeline, *names):
    """A backbone that lacks parts, or decoders."""
    params = {name: part for name, part in pipeline.params.items() if name not in names}
    params["decoders"] = {k: v for k, v in params.get("decoders", {}).items() if k not in names}
    return dataclasses.replace(pipeline, params=params)


def test_what_a_backbone_lacks_is_not_measured(pipeline, capsys, monkeypatch):
    for lacking, changes, message in (
        (without(pipeline, "student"), {"pictures": 0}, "tiny: has no student"),
        (without(pipeline, "student"), {"captions": 0}, "tiny: has no student"),
        (without(pipeline, "decoders"), {}, "tiny: has no decoder meg, split_finetune, pruning"),
        (without(pipeline, "meg"), {"captions": 0}, "tiny: has no decoder meg; distil it"),
        (without(pipeline, "pruning"), {}, "tiny: has no decoder pruning"),
    ):
        monkeypatch.setattr(distillation, "load_pipeline", lambda model, found=lacking: found)
        assert message in refused(distillation.main, distillation.Config(**changes), capsys)
    distillation.refuse_model(pipeline, distillation.Config())
    distillation.refuse_model(without(pipeline, "decoders"), distillation.Config(pictures=0))
    distillation.refuse_model(without(pipeline, "gate", "pruning"), distillation.Config())


def test_fewer_steps_than_a_student_has_windows_are_not_measured(pipeline):
    for windows, changes, fewest in ((5, {}, 4), (5, {"pictures": 0}, 4), (8, {"captions": 0}, 7)):
        student = dataclasses.replace(pipeline, flow=pipeline.flow._replace(windows=windows))
        message = f"tiny: its student has {windows} windows .* {fewest} steps are measured"
        with pytest.raises(MegError, match=message):
            distillation.refuse_model(student, distillation.Config(**changes))
    seven = dataclasses.replace(pipeline, flow=pipeline.flow._replace(windows=7))
    distillation.refuse_model(seven, distillation.Config(captions=0))
    # A teacher has none.
    teacher = dataclasses.replace(without(pipeline, "student"), flow=pipeline.flow._replace(windows=99))
    refuse_windows(teacher, 1)


def test_without_a_gate_the_learned_pruning_is_left_out(pipeline, monkeypatch):
    pictures = jnp.zeros((2, 64, 64, 3))
    monkeypatch.setattr(distillation, "fresh_prompts", lambda *args: (None, None))
    for name in ("draw", "decode", "received_pictures"):
        monkeypatch.setattr(distillation, name, lambda *args: pictures)
    config = distillation.Config(pictures=2, batch=2)
    ungated = dataclasses.replace(pipeline, params={k: v for k, v in pipeline.params.items() if k != "gate"})
    for model, expected in ((pipeline, {"pruning", "pruning_magnitude"}), (ungated, {"pruning_magnitude"})):
        names = {place.split("/")[1] for place in distillation.decoders(model, config)["mse"]}
        assert {name for name in names if name.startswith("pruning")} == expected

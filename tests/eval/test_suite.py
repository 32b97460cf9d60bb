"""The evaluation suite's parts: settings, cache, numbers, what each method sends, tables, figures, page."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from configs.suite import PRESETS
from eval.suite import cache, methods, physical, table1
from eval.suite.__main__ import main
from eval.suite.config import ITEMS, SuiteConfig, check, items
from eval.suite.context import Context, Stage, get
from eval.suite.curves import SHARES
from eval.suite.numbers import Interval, axis, interval, line, mean, number, psnr, ratio, without_times
from eval.suite.paper import SDXL_FLOPS, TABLE_II
from eval.suite.physical import SDXL_LATENT, TABLE2_RATE_BPS
from eval.suite.policies import PAPER_PPO
from eval.suite.present.figures import _panel, draw
from eval.suite.present.report import report
from eval.suite.present.tables import csv_text, html_table, markdown, significant
from megjax.data.loader import DataConfig, open_pictures
from megjax.errors import MegError
from megjax.link.payload import rgb_bits
from megjax.link.profiles import compute, load
from megjax.pipeline import load_pipeline
from megjax.rl.ppo import pid_multiplier, prices, violations


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rules", ["default", "paper"])
@pytest.mark.parametrize("physical", ["sdxl", "tiny"])
def test_every_preset_is_allowed_under_all_rules(preset, rules, physical):
    check(dataclasses.replace(PRESETS[preset][1], rules=rules, physical=physical))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small"], "unknown preset 'small': choose from tiny, sdxl"),
        (["--only", "table2,fig9"], "unknown figure or table 'fig9': choose from claims, table1"),
        (["--out", "/dev/null/suite"], "--out /dev/null/suite cannot be written: "),
        (["--pictures", "7"], "pictures 7, batch 32: at least 2 pictures, a multiple of the batch"),
        (["--ratios", "0.5", "0.1"], "ratios (0.5, 0.1): at least two, increasing"),
        (["--ratios", "0", "nan"], "ratios (0.0, nan): at least two, increasing"),
        (
            ["--ratios", "0", "0.5"],
            "increasing from 0 to 0.9375 are allowed",
        ),
        (["--ratios", "0.1", "0.9375"], "ratios (0.1, 0.9375): at least two"),
        (["--rules", "paper", "--ratios", "0", "0.7"], "increasing from 0 to 0.75 are allowed"),
        (["--seed", "-1"], "seed -1: 0 to 4294967293 is allowed"),
        (["--guidance", "nan"], "guidance nan: finite numbers from 0 on are allowed"),
        (["--profile", "nope"], "unknown hardware profile 'nope'"),
        (["--prompts", "nope.txt", "--only", "fig4"], "nope.txt cannot be read"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")
    assert message in said[-1]


def test_items_come_in_the_reports_order():
    assert items(SuiteConfig(only="fig5, table1")) == ("table1", "fig5")
    assert items(SuiteConfig()) == tuple(ITEMS)


def test_cached_values_come_back_and_damage_is_noticed(tmp_path):
    value = {"a": np.arange(3.0), "b": [1, (2.5, "x")], "c": None, "d": {"e": 0.1}}
    path, said = tmp_path / "stage.msgpack", []
    assert cache.read(path, said.append) is None
    cache.write(path, value)
    found = cache.read(path, said.append)
    np.testing.assert_array_equal(found["a"], value["a"])
    assert (found["b"], found["c"], found["d"]) == ([1, [2.5, "x"]], None, {"e": 0.1})
    assert said == []
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"", whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        path.write_bytes(damaged)
        assert cache.read(path, said.append) is None
    assert said == ["cache: stage.msgpack is damaged; computing it again"] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["stage.msgpack"]


def test_stages_of_one_name_are_both_recorded(tmp_path):
    context = Context(SuiteConfig(out=tmp_path))
    for x in (1, 2, 1):
        get(context, Stage("one", {"x": x}, lambda context, settings: {"value": 0}, model=False))
    assert sorted(record["settings"]["x"] for record in context.records.values()) == [1, 2]


def test_stages_are_computed_once_and_anew_when_their_settings_change(tmp_path):
    computed = []

    def one(context, settings):
        computed.append(("one", settings["x"]))
        return {"value": settings["x"] * 2}

    def two(context, settings, first):
        computed.append(("two", first["value"]))
        return {"value": first["value"] + 1}

    def result(x):
        context = Context(SuiteConfig(out=tmp_path))  # a new one each time: only the folder is shared
        first = Stage("one", {"x": x}, one, model=False)
        return get(context, Stage("two", {}, two, (first,), model=False))["value"], context.records

    assert result(3)[0] == 7
    assert computed == [("one", 3), ("two", 6)]
    value, records = result(3)
    assert value == 7
    assert set(records) == {"one", "two"}  # provenance is whole though nothing was computed
    assert len(computed) == 2
    assert result(4)[0] == 9
    assert computed[2:] == [("one", 4), ("two", 8)]


def test_intervals_hold_the_means_and_ratios_are_paired():
    rng = np.random.default_rng(0)
    covered = sum(own.low <= 1 <= own.high for own in (mean(rng.exponential(size=60)) for _ in range(100)))
    assert 85 <= covered <= 99
    common = rng.exponential(size=60)
    paired = ratio(2 * common, common)
    np.testing.assert_allclose(paired, 2)
    assert psnr(np.zeros(4)) is None
    found = psnr(np.array([0.01, 0.01]))
    np.testing.assert_allclose([found["value"], found["low"], found["high"]], 20)


def test_times_are_all_that_two_runs_may_differ_in():
    a = {"x": [number(1, "measured"), number(2, "measured", timed=True)], "seconds": 3.0}
    b = {"x": [number(1, "measured"), number(5, "measured", timed=True)], "seconds": 4.0}
    assert without_times(a) == without_times(b)
    assert without_times(a) != without_times({**a, "x": [number(7, "measured"), a["x"][1]]})


def test_table_2_is_the_papers_within_one_percent():
    profile = load("table2")
    for row in TABLE_II:
        bits = (
            rgb_bits(1024, 1024)
            if row.method is None
            else methods.bits(row.method, SDXL_LATENT, row.ratio, "free")
        )
        assert bits / TABLE2_RATE_BPS == pytest.approx(row.transmission_s, rel=0.01)
        found = compute(profile, tome=row.tome)
        assert found.es_fixed_s + row.steps * found.es_step_s == pytest.approx(row.computation_s, rel=0.01)


@pytest.mark.parametrize(("rules", "beyond_meg"), [("default", []), ("paper", [0.15])])
def test_every_method_meets_every_length_it_is_compared_at(rules, beyond_meg):
    whole = 16 * 128 * 128 * 4
    for name in ("pruning", "pruning_magnitude", "meg"):
        for share in SHARES:
            level = methods.level_at(name, SDXL_LATENT, int(share * whole), rules)
            if name == "meg" and share in beyond_meg:
                assert level is None
                continue
            sent = methods.bits(name, SDXL_LATENT, level, rules) / whole
            assert share - 0.002 <= sent <= share, (name, share)


@pytest.fixture(scope="module")
def tiny():
    return load_pipeline("tiny")


def test_a_student_of_more_windows_than_steps_is_refused(tiny, tmp_path, monkeypatch):
    student = dataclasses.replace(tiny, flow=tiny.flow._replace(windows=5))
    monkeypatch.setattr("eval.suite.context.load_pipeline", lambda *args: student)
    with pytest.raises(MegError, match=r"its student has 5 windows .* of 4 steps are measured"):
        _ = Context(SuiteConfig(out=tmp_path)).pipeline


def test_without_a_gate_only_magnitudes_are_pruned_and_their_map_is_charged(tiny, tmp_path):
    context = Context(SuiteConfig())
    assert context.prunings == methods.PRUNINGS
    context.__dict__.pop("prunings")
    context.__dict__["root"] = tmp_path
    assert context.prunings == ("pruning_magnitude",)
    ungated = dataclasses.replace(tiny, params={k: v for k, v in tiny.params.items() if k != "gate"})
    with pytest.raises(MegError, match="no learned gate to prune by; take pruning_magnitude"):
        methods.method(ungated, "pruning")
    assert (
        methods.method(ungated, "pruning_magnitude").decoder is tiny.params["decoders"]["magnitude_pruning"]
    )
    shape = (16, 16, 4)
    assert methods.bits("pruning_magnitude", shape, 0.1) == methods.bits("pruning", shape, 0.1) + 1024


def test_what_merges_is_one_executable(tiny):
    ways = {methods.method(tiny, name).send for name in ("split", "split_finetune", "meg", "meg_plain")}
    assert len(ways) == 1


def test_a_centralised_server_decodes_and_a_split_one_does_not():
    counted = {
        "picture": [1024, 1024],
        "latent": [128, 128, 4],
        "text_encoder_flops": 1e12,
        "vae_encoder_flops": 5e12,
        "unet_call_flops": 6e12,
        "unet_call_tome_flops": 4e12,
        "vae_decoder_flops": 10e12,
    }
    scale, profile = physical.scale("test", counted, 2.5), load("paper")
    split = physical.computation(profile, scale, tome=True)
    whole = physical.computation(profile, scale, tome=False, centralised=True)
    assert split.es_step_s == pytest.approx(2 * 4e12 / 58e12)
    assert split.ue_s == pytest.approx(10e12 / 29e12)
    assert whole.es_fixed_s == pytest.approx(11e12 / 58e12)
    assert whole.ue_s == 0
    snr_P = physical.draw_channels(0, 5)
    costs = physical.costs(split, 7, 1e6, snr_P)
    by_hand = 1e12 / 58e12 + 7 * split.es_step_s + 1e6 / (1e6 * np.log2(1 + snr_P)) + split.ue_s
    np.testing.assert_allclose(costs["latency_s"], by_hand, rtol=1e-5)


def small_results():
    table = {
        "id": "t",
        "title": "A table",
        "caption": "What it is.",
        "columns": [
            {"key": "mse", "label": "MSE", "unit": "", "digits": 3},
            {"key": "s", "label": "time", "unit": "s", "digits": 3},
            {"key": "verdict", "label": "verdict", "unit": "", "digits": 0},
            {"key": "found", "label": "found", "unit": "", "digits": 3},
        ],
        "rows": [
            {
                "label": "MEG <1>",
                "cells": {
                    "mse": interval(Interval(0.012345, 0.01, 0.02), "measured"),
                    "s": number(2.5, "modelled", "s"),
                    "verdict": "holds",
                    "found": [{"label": "R²", **number(0.98765, "measured")}],
                },
            },
            {"label": "Split", "cells": {"mse": None, "s": number(0, "paper", "s")}},
        ],
    }
    curves = [
        line("meg", "MEG", [4, 8, 12], [Interval(0.03, 0.02, 0.04)] * 3, "measured"),
        line("ppo", "PPO", [4, 12], [0.05, 0.01], "modelled", points=True),
    ]
    panel = {"x": axis("steps"), "y": axis("MSE", "", "log"), "lines": curves, "levels": [
        {"axis": "y", "value": 0.02, "series": "meg", "tag": "measured"}]}  # fmt: skip
    figure = {"id": "f", "title": "A figure", "caption": "Of it.", "alt": "Two curves.", "panels": [panel]}
    item = {"title": "Fig. 0: all", "text": ["Text & more."], "tables": [table], "figures": [figure]}
    stage = {"seconds": 1.0, "device": "CPU", "finished": "2026-01-01", "settings": {}}
    results = {
        "settings": {
            "model": "tiny",
            "rules": "default",
            "physical": "sdxl",
            "profile": "paper",
            "pictures": 8,
            "seeds": 1,
        },
        "device": "CPU",
        "processors": 2,
        "versions": {"jax": "0.10"},
        "items": {"fig0": item},
        "stages": {"one": stage},
    }
    return json.loads(json.dumps(results))


def test_tables_say_value_interval_unit_and_tag():
    table = small_results()["items"]["fig0"]["tables"][0]
    rows = csv_text(table).splitlines()
    assert rows[0] == ',MSE,"MSE, low","MSE, high","MSE, tag","time, s","time, s, tag",verdict,found'
    assert rows[1] == "MEG <1>,0.012345,0.01,0.02,measured,2.5,modelled,holds,R²: 0.988"
    assert rows[2] == "Split,,,,,0.0,paper,,"
    text = markdown(table)
    assert "| MSE (measured) | time, s | verdict |" in text
    assert "| MEG <1> | 0.0123 [0.0100, 0.0200] | 2.50 | holds | R²: 0.988 |" in text
    page = html_table(table)
    assert "MEG &lt;1&gt;" in page
    assert ">holds<" in page


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.012345, 3, "0.0123"),
        (60.468, 4, "60.47"),
        (-0.5, 2, "−0.50"),
        (0.0, 3, "0"),
        (12345.6, 3, "12346"),
        (7, 3, "7"),
    ],
)
def test_significant_digits(value, digits, shown):
    assert significant(value, digits) == shown


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.addresses, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[k] for k in ("src", "href", "srcset", "action", "poster") if k in found]
        if tag == "img":
            self.images.append((found, list(self.open)))
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing():
    results = small_results()
    figures = {"f": draw(results["items"]["fig0"]["figures"][0])}
    assert set(figures["f"]) == {".png", ".svg", "-dark.png", "-dark.svg"}
    assert figures["f"][".png"].startswith(b"\x89PNG")
    page, reader = report(results, figures), Page()
    reader.feed(page)
    assert reader.open == []
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    assert not re.search(r"@import|url\(", page)
    for image, around in reader.images:
        assert image["alt"]
        assert "figure" in around
    assert page.count("<figcaption>") == len(reader.images) == 1
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_same_results_give_the_same_figures():
    figure = small_results()["items"]["fig0"]["figures"][0]
    assert draw(figure) == draw(figure)


def test_unreadable_prompts_are_named(tmp_path):
    with pytest.raises(MegError, match=r"prompts\.txt"):
        _ = Context(SuiteConfig(prompts=tmp_path / "prompts.txt")).prompts
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    with pytest.raises(MegError, match="2 prompts, --pictures 64"):
        _ = Context(SuiteConfig(prompts=tmp_path / "prompts.txt")).prompts
    few = SuiteConfig(prompts=tmp_path / "prompts.txt", pictures=2, batch=1)
    assert Context(few).prompts == ["one", "two"]
    assert Context(dataclasses.replace(few, sample="three")).prompts == ["three", "one"]


@pytest.mark.parametrize("seed", [0, 1])
def test_captions_are_not_those_that_distillation_draws(seed):
    drawn = open_pictures(DataConfig(pictures=512, seed=seed), 64).read(0, 512)
    learned = [example.caption for example in drawn]
    fresh = Context(SuiteConfig(seed=seed)).prompts[1:]
    # A scene's numbers of its own: one in thousands may say the same.
    assert len(set(fresh) & set(learned)) < 8


def test_settings_of_a_kind_that_cannot_be_are_refused_before_anything_runs():
    with pytest.raises(MegError, match="dtype 'float33': choose from float32, bfloat16, float16"):
        check(SuiteConfig(dtype="float33"))
    with pytest.raises(MegError, match="at least one of noise"):
        check(SuiteConfig(noise_psnrs_db=()))


def test_bits_a_scalar_are_those_charged(monkeypatch):
    counted = dict.fromkeys(SDXL_FLOPS, 1e12) | {"picture": [1024, 1024], "latent": [128, 128, 4]}
    monkeypatch.setattr(table1, "get", lambda context, stage: counted)

    def used():
        rows = table1.table1(Context(SuiteConfig()))["tables"][0]["rows"]
        return next(row["cells"]["used"]["value"] for row in rows if row["label"] == "bits per scalar")

    assert used() == 16
    whole = methods.bits("split", SDXL_LATENT, 0.0)
    monkeypatch.setattr(methods, "bits", lambda *args: whole // 2)
    assert used() == 8


def test_the_authors_gains_act_on_an_episodes_excess():
    pid = PAPER_PPO.pid
    violation = violations(pid, jnp.asarray([3.3, 1.83]), jnp.asarray([3.0, 1.8]))
    lam, integral = pid_multiplier(pid, violation, jnp.zeros(2), jnp.zeros(2))
    # 0.3 s, and 0.3 of their units of 100 J.
    np.testing.assert_allclose(lam, 64 * 0.3 * (0.05 + 0.0005 + 0.1), rtol=1e-4)
    np.testing.assert_allclose(integral, 64 * 0.3 * 0.0005, rtol=1e-4)
    # A price of 100 J is a tenth of a kilojoule's.
    np.testing.assert_allclose(prices(pid, lam), [lam[0], 10 * lam[1]], rtol=1e-6)


def test_points_are_marked_however_dense_a_line_is():
    dense = line("optimum", "optimum", range(64), range(64), "measured")
    points = line("cvpo", "MEG-CVPO", [3.0], [4.0], "measured", points=True)
    panel = {"x": axis("x", "s"), "y": axis("y", "dB"), "lines": [dense, points]}
    axes = Figure().subplots()
    _panel(axes, panel, "light")
    shown = {each.get_label(): each.get_marker() for each in axes.get_lines()}
    assert shown["optimum"] in ("", "None")
    assert shown["MEG-CVPO"] == "o"


def test_the_least_level_is_nothing_left_out_where_that_fits():
    whole = methods.bits("meg", SDXL_LATENT, 0.0)
    assert methods.level_at("meg", SDXL_LATENT, whole) == 0.0
    assert methods.level_at("meg", SDXL_LATENT, whole - 1) > 0.0

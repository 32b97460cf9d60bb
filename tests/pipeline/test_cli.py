"""The command line: what it writes, what it prints, and one line with exit code 2 for bad values."""

import functools
import importlib
import sys

import numpy as np
import pytest
from PIL import Image

from megjax.cli import main
from megjax.cli.output import engineering
from megjax.errors import MegError
from megjax.pipeline import load_pipeline
from tests.small import save_random

command = importlib.import_module("megjax.cli.generate")
PAPER = ["--rules", "paper"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("backbone") / "model")


load_once = functools.cache(load_pipeline)


@pytest.fixture
def run(monkeypatch, folder, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    # Loaded and compiled once for all tests.
    monkeypatch.setattr(command, "load_pipeline", lambda model, options, on_part: load_once(model, options))

    def call(*args):
        model = [] if "--model" in args else ["--model", str(folder)]
        monkeypatch.setattr(sys, "argv", ["megjax", "generate", *args, *model])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_writes_the_picture_and_prints_what_it_cost(run, tmp_path):
    code, out, _ = run("a red circle left of a blue square", "--steps", "2", "-o", "picture.png")
    assert not code
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (64, 64)
    for word in ("edge server", "channel", "device", "payload", "10136 bits", "39 tokens", "MSE", "PSNR"):
        assert word in out
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


def test_features_may_meet_the_links_noise(run, monkeypatch):
    def stop(pipeline, request, start, on_stage):
        raise MegError(f"asked for {request.feature_psnr_db:.3f} dB")

    monkeypatch.setattr(command, "generate", stop)
    for args, psnr_db in (
        (["--tie-psnr"], "5.000"),
        (["--psnr-db", "7"], "7.000"),
        ([], "10.000"),
        (PAPER, "20.000"),
    ):
        assert f"asked for {psnr_db} dB" in run("a red circle", "--snr-db", "5", *args)[2]


def test_image_to_image_and_contact_sheet(run, tmp_path):
    Image.fromarray(np.full((90, 70, 3), 128, np.uint8)).save(tmp_path / "start.png")
    code, *_ = run("a red circle", "--init-image", "start.png", "--grid", "-o", "sheet.png")
    assert not code
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 5 * 128
        assert sheet.height > 4 * 128


def test_a_grey_picture_of_16_bits_keeps_its_greys(tmp_path):
    Image.fromarray(np.full((8, 8), 257 * 51, np.uint16)).save(tmp_path / "grey.png")
    found = command._fitted(command._read_picture(tmp_path / "grey.png"), (8, 8))
    np.testing.assert_allclose(found, np.full((8, 8, 3), 0.2), atol=1e-6)


def test_a_thin_picture_is_cropped_before_it_is_enlarged():
    """64 x 6.4 million pixels else."""
    thin = Image.new("RGB", (1, 100_000), (51, 51, 51))
    np.testing.assert_allclose(command._fitted(thin, (64, 64)), np.full((64, 64, 3), 0.2), atol=1e-6)


def test_the_papers_ratio_is_told_as_it_is_used(run):
    code, out, _ = run("a red circle", "--steps", "2", "--ratio", "0.9", *PAPER)
    assert not code
    assert "2 steps, ratio 0.75" in out
    # An odd grid has one token more to each that stays.
    odd = "--height", "72", "--width", "72"
    _, out, _ = run("a red circle", "--steps", "2", "--ratio", "0.9", *odd, *PAPER)
    assert "2 steps, ratio 0.802" in out
    assert "5136 bits" in out


@pytest.mark.parametrize(("windows", "steps"), [(1, (4, 6, 8, 12)), (7, (8, 12)), (13, (13,))])
def test_a_contact_sheet_has_the_steps_that_the_student_takes(monkeypatch, folder, windows, steps):
    monkeypatch.setattr(command, "fewest_steps", lambda *_: windows)
    assert command._grid_steps(load_once(folder), None) == steps


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--ratio", "7"], "ratio 7.0"), (["--init-image", "none.png"], "no such file"), ([], "no such folder")],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(run, args, message):
    code, _, err = run("a red circle", "--model", "nowhere", *args)
    assert (code, message in err) == (2, True)


@pytest.mark.parametrize("grid", [[], ["--grid"]])
def test_any_file_name_is_printed_as_it_is(run, tmp_path, grid):
    (tmp_path / "[").mkdir()
    code, out, err = run("a red circle", "-o", "[/b].png", *(grid or ["--steps", "2"]))
    assert not code
    assert "[/b].png: " in out + err
    assert (tmp_path / "[" / "b].png").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 s"),
        (0.0123, "12.3 ms"),
        (4e-11, "0.04 ns"),
        (5e7, "5e+04 ks"),
        (float("inf"), "inf s"),
        (float("nan"), "nan s"),
    ],
)
def test_numbers_for_readers(value, text):
    assert engineering(value, "s") == text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a red circle", "--ratio", "1.2"], "from 0 to 0.9375 are allowed"),
        (["a red circle", "--steps", "0"], "from 1 to 1000 are allowed"),
        ([""], "is empty"),
        (["red " * 200], "30 at most"),
        (["a red circle", "--init-image", "nowhere.png"], "no such file"),
        (["a red circle", "--init-image", "text.png"], "not a readable picture"),
        (["a red circle", "--init-image", "cut.png"], "not a readable picture"),
        (["a red circle", "--distance-m", "0"], "from 1 to 100000 m are allowed"),
        (["a red circle", "--snr-db", "nan"], "from -100 to 200 dB are allowed"),
        (["a red circle", "--profile", "abacus"], "unknown hardware profile"),
        (["a red circle", "-o", "nowhere/out.png"], "no folder"),
        (["a red circle", "-o", "out.jpg"], "ends in .png"),
        (["a red circle", "--model", "nowhere"], "no such folder"),
        (["a red circle", "--model", "~nobody-of-this-name/x"], "~nobody-of-this-name/x: Could not"),
        (["a red circle", "--height", "1000000"], "multiples of 8 pixels up to 256"),
        (
            ["a red circle", "--grid", "--steps", "6"],
            "steps 6: --grid chooses steps and ratio; leave it out",
        ),
        (
            ["a red circle", "--policy", "p", "--ratio", "0"],
            "ratio 0.0: --policy chooses steps and ratio",
        ),
        (["a red circle", "--policy", "p", "--grid"], "--policy chooses one; leave one out"),
        (["a red circle", "--negative-prompt", "a " * 100], "negative_prompt 'a a"),
    ],
)
def test_bad_values_are_one_line(run, tmp_path, args, message):
    (tmp_path / "text.png").write_text("no picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1

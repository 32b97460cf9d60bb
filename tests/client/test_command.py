"""`megjax device`: the picture that it writes, what it prints, and one line with exit code 2 for failures."""

import importlib
import json
import sys

import httpx
import numpy as np
import pytest
from PIL import Image

from megjax import client
from megjax.cli import main
from megjax.client import connect, emulated, recall

command = importlib.import_module("megjax.cli.device")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, device, show, message, answer):
    """(arguments) -> exit code, output, errors and the requests that a server got; it answers as asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MEGJAX_TOKEN", raising=False)
    monkeypatch.setattr(command, "load_device", lambda *_, **__: device)
    monkeypatch.setattr(client, "viewer", lambda _: show)
    requests = []

    async def pieces(content):
        for i in range(0, len(content), 400):
            yield content[i : i + 400]

    def serve(request):
        requests.append(request)
        body = json.loads(request.content)
        by_policy = "limits" in body
        sent = message(body["seed"], 0.4 if by_policy else body["ratio"], body["dtype"])
        chosen = {"chosen_by": "policy", "steps": 5} if by_policy else {"steps": body["steps"]}
        status, headers, content = answer(sent, body["seed"], **chosen)
        return httpx.Response(status, headers=headers, content=pieces(content))

    def local(server, token):
        return connect(server, token, transport=httpx.MockTransport(serve))

    monkeypatch.setattr(client, "connect", local)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["megjax", "device", *args])
        requests.clear()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr(), list(requests)

    return call


def shown(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def expected(show, message, seed, ratio, psnr_db, dtype="float16"):
    return np.round(show(message(seed, ratio, dtype), seed, psnr_db) * 255).astype(np.uint8)


def test_writes_the_picture_and_prints_where_the_time_went(run, tmp_path, device, show, message):
    code, out, _, (request,) = run("a red circle", "--seed", "3", "--ratio", "0.6", "-o", "picture.png")
    assert not code
    body = json.loads(request.content)
    assert (body["steps"], body["ratio"], body["seed"]) == (8, 0.6, 3)
    assert (body["height"], body["width"]) == device.size  # whatever the server's own is
    # A network adds no noise.
    np.testing.assert_array_equal(shown("picture.png"), expected(show, message, 3, 0.6, np.inf))
    size = len(message(3, 0.6)) - 32
    for words in ("edge server", "106 ms", "500 ms", "denoising", "network", "612 ms", f"{size} bytes"):
        assert words in out
    assert "Authorization" not in request.headers
    # What it measured is told the next time, and then kept.
    assert json.loads(run("a red circle")[3][0].content)["channel"]["rate_bps"] > 0
    assert recall("http://127.0.0.1:8000").rate_bps > 0
    assert {path.name for path in tmp_path.iterdir()} == {"picture.png", "megjax.png", "cache"}


def test_an_emulated_channel_adds_its_noise_and_takes_its_time(run, show, message):
    args = "--emulate", "paper", "--seed", "2", "--latency-s", "0.05", "--psnr-db", "7"
    code, out, _, (request,) = run("a red circle", *args)
    assert not code
    channel = emulated("paper", 2)
    assert json.loads(request.content)["channel"] == {"rate_bps": channel.rate_bps, "psnr_db": 7.0}
    np.testing.assert_array_equal(shown("megjax.png"), expected(show, message, 2, 0.4, 7.0))
    row = next(line for line in out.splitlines() if "emulated channel" in line)
    measured_ms = float(row.split("│")[2].split()[0])
    # 8 (size - 32) / rate and t0; a real clock is only ever later.
    assert measured_ms >= 50 + 8000 * (len(message(2, 0.4)) - 32) / channel.rate_bps - 1
    # The network was not measured.
    assert recall("http://127.0.0.1:8000").rate_bps is None


def test_the_policy_chooses(run):
    code, out, _, (request,) = run("a red circle", "--limits", "3", "1.8", "--features", "int8")
    assert not code
    body = json.loads(request.content)
    assert body["limits"] == {"latency_s": 3.0, "energy_j": 1800.0}
    assert not {"steps", "ratio"} & set(body)
    assert "5 steps, ratio 0.4, the policy's choice" in out


def test_the_token_comes_from_the_command_line_or_the_environment(run, monkeypatch):
    assert run("a red circle", "--token", "abc")[3][0].headers["Authorization"] == "Bearer abc"
    monkeypatch.setenv("MEGJAX_TOKEN", "xyz")
    assert run("a red circle")[3][0].headers["Authorization"] == "Bearer xyz"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-o", "out.jpg"], "ends in .png"),
        (["-o", "nowhere/out.png"], "no folder"),
        (["--server", "ftp://here"], "http://HOST:PORT"),
        (["--server", "http://127.0.0.1:99999"], "ports from 1 to 65535"),
        (["--server", "http://127.0.0.1:-1"], "ports from 1 to 65535"),
        (["--token", "a b"], "no blanks"),
        (["--limits", "3", "1.8", "--steps", "4"], "the policy chooses"),
        (["--distance-m", "100"], "add --emulate paper"),
        (["--psnr-db", "3"], "add --emulate paper"),
        (["--emulate", "paper", "--distance-m", "0"], "from 1 to 100000 m"),
        (["--emulate", "paper", "--psnr-db", "nan"], "psnr_db nan"),
        (["--seed", "-1"], "seed -1: 0 to 4294967295"),
        (["--height", "64"], "both or neither"),
    ],
)
def test_bad_values_are_one_line(run, tmp_path, args, message):
    code, out, err, requests = run("a red circle", *args)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not requests
    assert not list(tmp_path.glob("*.png"))


def test_a_server_that_is_not_there_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setattr(client, "connect", connect)
    # Nobody listens on the discard port.
    code, out, err, _ = run("a red circle", "--server", "http://127.0.0.1:9", "--patience-s", "0.1")
    assert code == 2
    assert out == ""
    assert "cannot get a message from http://127.0.0.1:9" in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.png"))


def test_a_servers_words_are_printed_as_they_are(run, monkeypatch):
    async def said():
        yield b'{"error": "[/b]"}'

    def busy(request):
        return httpx.Response(503, headers={"Retry-After": "0"}, content=said())

    def local(server, token):
        return connect(server, token, transport=httpx.MockTransport(busy))

    monkeypatch.setattr(client, "connect", local)
    code, _, err, _ = run("a red circle", "--patience-s", "0.2")
    assert code == 2
    assert "the server is not ready (503): [/b]; tried" in err


def test_a_missing_extra_is_told(run, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)
    code, _, err, _ = run("a red circle")
    assert code == 2
    assert "pip install 'megjax[device]'" in err

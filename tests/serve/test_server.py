"""A server as a process: sockets, signals, the command's errors."""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.serve.conftest import BODY

TOKEN = "correct-horse"


@contextlib.contextmanager
def serving(folder, *args, **env):
    command = [sys.executable, "-c", "from megjax.cli import main; main()", "serve"]
    command += ["--port", "0", "--model", str(folder), "--batch-sizes", "1", *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
    lines = []

    def read():
        lines.extend(process.stderr)

    thread = threading.Thread(target=read)
    try:
        first = process.stderr.readline()
        thread.start()
        yield process, first.split()[-1], lines
    finally:
        process.kill()
        process.wait()
        thread.join()


def wait_until_ready(http):
    for _ in range(3000):
        if http.get("/readyz").status_code == 200:
            return
        time.sleep(0.1)
    raise AssertionError("not ready")


def whole_answer(address, head):
    """What a client gets whose body never ends, until the server hangs up."""
    with socket.create_connection(address, 60) as client:
        token = f"Authorization: Bearer {TOKEN}\r\n".encode()
        client.sendall(head + b"Host: localhost\r\n" + token + b"Content-Length: 1000000000\r\n\r\nx")
        return b"".join(iter(lambda: client.recv(4096), b""))


def test_sigterm_loses_nothing_and_slow_clients_are_cut_off(folder):
    with serving(folder, "--queue", "8", MEGJAX_TOKEN=TOKEN) as (process, url, lines):
        http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        with http:
            assert httpx.get(f"{url}/readyz").status_code == 401
            alive = httpx.get(f"{url}/healthz")
            assert (alive.status_code, "server" in alive.headers) == (200, False)
            wait_until_ready(http)
            answers, lost, stopped = [], [], threading.Event()

            def load(seed):
                while not stopped.is_set():
                    begun = time.monotonic()
                    try:
                        with httpx.Client(base_url=url, headers=http.headers, timeout=60) as client:
                            answers.append(client.post("/v1/generate", json={**BODY, "seed": seed}))
                    except httpx.ConnectError:
                        return
                    except httpx.HTTPError as error:
                        lost.append((begun, error))
                        return
                    if answers[-1].status_code == 503:
                        return

            threads = [threading.Thread(target=load, args=(seed,)) for seed in range(4)]
            slow = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
            slow.sendall(b"GET / HTTP/1.1\r\n")
            address = slow.getpeername()
            for head, status in (
                (b"GET /healthz HTTP/1.1\r\n", b"400"),
                (b"POST /v1/generate HTTP/1.1\r\nContent-Type: text/plain\r\n", b"415"),
            ):
                assert whole_answer(address, head).split()[1] == status
            for thread in threads:
                thread.start()
            while len(answers) < 8:
                time.sleep(0.01)
            stopping = time.monotonic()
            process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
            stopped.set()
            assert process.wait(60) == 0
        assert not [error for begun, error in lost if begun < stopping]
        assert {answer.status_code for answer in answers} <= {200, 503}
        for answer in answers:
            if answer.status_code == 200:
                assert (
                    8 * (len(answer.content) - 32)
                    == json.loads(answer.headers["megjax-result"])["payload_bits"]
                )
            else:
                assert answer.headers["retry-after"] == "5"
        slow.settimeout(60)
        assert slow.recv(1) == b""
        slow.close()
    log = "".join(lines)
    assert [line.split()[-1] for line in lines].count("ready") == 1
    assert "SIGTERM" in log
    assert "Traceback" not in log
    assert BODY["prompt"] not in log
    assert TOKEN not in log


@pytest.fixture
def command(folder, pipeline, monkeypatch, capsys):
    """Arguments of a server that does not start -> what it says, and its exit code."""
    from megjax.cli import main

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("MEGJAX_TOKEN", raising=False)
    monkeypatch.setattr(importlib.import_module("megjax.cli.serve"), "load_pipeline", lambda *_: pipeline)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["megjax", "serve", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        return capsys.readouterr().err, stop.value.code

    return call


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host", "0.0.0.0"], "a token is required"),
        (["--sizes", "64"], "size '64': give height and width"),
        (["--policy", "nowhere.safetensors"], "nowhere.safetensors is not a MegJAX policy"),
        (["--sizes", "63x64"], "height 63: multiples of"),
        (["--max-steps", "2000"], "steps 2000"),
    ],
)
def test_what_cannot_be_served_is_one_line(command, args, words):
    printed, code = command("--port", "0", *args)
    assert code == 2
    assert words in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--profile", "abacus"], "unknown hardware profile"),
        (["--policy", "none"], "none is not a MegJAX policy"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(command, monkeypatch, args, words):
    loaded = []
    monkeypatch.setattr(importlib.import_module("megjax.cli.serve"), "load_pipeline", loaded.append)
    printed, code = command("--port", "0", *args)
    assert (code, words in printed, loaded) == (2, True, [])


def test_a_missing_extra_is_one_line(command, monkeypatch):
    monkeypatch.delitem(sys.modules, "megjax.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    expected = "megjax: megjax serve needs uvicorn: pip install 'megjax[serve]'\n"
    assert command() == (expected, 2)


def test_an_address_that_is_taken_is_one_line(command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        printed, code = command("--port", port)
    assert code == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in printed

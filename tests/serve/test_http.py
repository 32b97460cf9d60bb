"""The routes: what they answer, to whom, and what they refuse."""

import asyncio
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from megjax.link import wire
from megjax.pipeline import Request, generate
from megjax.serve import engine
from megjax.serve.guard import HEADERS
from tests.serve.conftest import BODY, PROMPT, Gate

TOKEN = "correct-horse"
ROUTES = ("/", "/v1/info", "/readyz", "/metrics", "/openapi.json", "/nothing", "/style.css", "/healthz/")


def basic(credentials):
    return "Basic " + base64.b64encode(credentials.encode()).decode()


def test_a_message_equals_the_one_made_in_this_process(run, pipeline):
    async def test(server):
        return [await server.post(seed=seed, steps=5, ratio=ratio) for seed, ratio in ((3, 0.4), (4, 0.8))]

    for answer, (seed, ratio) in zip(run(test), ((3, 0.4), (4, 0.8)), strict=True):
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/vnd.megjax.message"
        result = json.loads(answer.headers["megjax-result"])
        request = Request(PROMPT, seed=seed, steps=5, ratio=ratio)
        task = engine.prepare(pipeline, request, "float16")
        sent = engine.messages(pipeline, [task], result["batch"])[0][0]
        assert answer.content == sent.message
        assert int(answer.headers["content-length"]) == len(sent.message)
        assert 8 * (len(answer.content) - wire.HEADER_BYTES) == result["payload_bits"]
        expected = {"steps": 5, "ratio": ratio, "seed": seed, "chosen_by": "request", "tokens": sent.tokens}
        assert expected.items() <= result.items()
        assert set(result["timings"]) == {"queue_s", "text_s", "denoise_s", "merge_s", "total_s"}
        for costs, parts in (("latency_s", ("es", "tx", "ue")), ("energy_j", ("es", "tx", "ue", "fixed"))):
            assert result[costs]["total"] == pytest.approx(sum(result[costs][p] for p in parts), rel=1e-4)
        # Eq. (4) at the paper's middle distance.
        assert result["latency_s"]["tx"] == pytest.approx(result["payload_bits"] / 777_407, rel=1e-3)


def test_the_channel_reported_is_the_one_charged(run):
    async def test(server):
        return await server.post(channel={"rate_bps": 1e5, "psnr_db": None})

    result = json.loads(run(test).headers["megjax-result"])
    assert result["latency_s"]["tx"] == pytest.approx(result["payload_bits"] / 1e5, rel=1e-4)


def test_a_picture_is_the_pipelines_own(run, pipeline):
    async def test(server):
        return await server.post("/v1/picture", seed=5, steps=6, ratio=0.5)

    answer = run(test).json()
    expected = generate(pipeline, Request(PROMPT, seed=5, steps=6, ratio=0.5))
    for name, picture in (("image", expected.image_HxWx3), ("reference", expected.reference_HxWx3)):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer[name]))))
        assert np.abs(shown - picture * 255.0).max() <= 2
    assert answer["mse"] == pytest.approx(expected.mse, rel=0.05, abs=1e-6)
    assert answer["result"]["tokens"] == expected.tokens


async def _get(server, path="/v1/info"):
    return (await server.http.get(path)).json()


def test_info_tells_the_bounds(run):
    info = run(_get, max_steps=9, generates=False)
    assert info["steps"] == [4, 9]
    assert info["ratio"] == [0.0, 0.9375]
    assert info["sizes"] == [[64, 64]]
    assert info["batch_sizes"] == [1]
    assert info["policies"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": None}, "prompt: field required"),
        ({"prompt": ""}, "prompt: string should have at least 1 character"),
        ({"prompt": "a" * 1001}, "prompt: string should have at most 1000"),
        ({"prompt": 3}, "prompt: input should be a valid string"),
        ({"prompt": "a " * 100}, "shorten it to 30"),
        ({"negative_prompt": "a " * 100}, "shorten it to 30"),
        ({"seed": -1}, "seed: input should be greater"),
        ({"seed": 2**32}, "seed: input should be less"),
        ({"seed": "1"}, "seed: input should be a valid integer"),
        ({"seed": True}, "seed: input should be a valid integer"),
        ({"steps": 3}, "steps: from 4 to 12"),
        ({"steps": 13}, "steps: from 4 to 12"),
        ({"steps": None}, "steps and ratio: give both"),
        ({"ratio": None}, "steps and ratio: give both"),
        ({"ratio": 0.95}, "0.9375"),
        ({"ratio": -0.1}, "ratio: input should be greater"),
        ({"guidance": 21}, "guidance: input should be less"),
        ({"height": 128}, "height and width: give both"),
        ({"height": 128, "width": 64}, "this server makes 64 x 64"),
        ({"dtype": "float64"}, "dtype: input should be 'float16'"),
        ({"deadline_s": 0}, "deadline_s: input should be greater"),
        ({"deadline_s": 61}, "deadline_s: at most 60 s"),
        ({"sampler": "ddim"}, "sampler: no such field"),
        ({"channel": {"rate_bps": 0}}, "channel.rate_bps: input should be greater"),
        ({"channel": {"snr": 1}}, "channel.snr: no such field"),
        ({"limits": {"latency_s": 3, "energy_j": 1800}}, "only a policy keeps them"),
        ({"limits": {"latency_s": 3, "energy_j": 1800}, "steps": None, "ratio": None}, "no policy is loaded"),
        ({"steps": None, "ratio": None}, "give steps and ratio, or limits"),
        ({"prompt": 1, "seed": "x", "ratio": "y"}, "; ratio: input"),
    ],
)
def test_malformed_requests_get_one_readable_line(run, changes, words):
    answer = run(lambda server: server.post(**changes), generates=False)
    assert answer.status_code == 422
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 422),
        (b"", {}, 422),
        (b"\xff\xff", {}, 400),
        (b"[" * 16000, {}, 400),
        (b'{"seed": ' + b"1" * 8000 + b"}", {}, 400),
        (b'{"prompt": "\\ud800", "steps": 4, "ratio": 0}', {}, 422),
        (b'{"prompt": "a", "steps": 4, "ratio": NaN}', {}, 422),
        (b"null", {}, 422),
        (json.dumps({**BODY, "prompt": "a" * 20000}).encode(), {}, 413),
        (json.dumps(BODY).encode(), {"Content-Type": "text/plain"}, 415),
        (json.dumps(BODY).encode(), {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (json.dumps(BODY).encode(), {"Host": "evil.example"}, 400),
        (json.dumps(BODY).encode(), {"Host": "127.0.0.1.evil.example"}, 400),
    ],
)
def test_odd_bodies_and_headers_are_refused(run, content, headers, status):
    async def test(server):
        headers_all = {"Content-Type": "application/json", **headers}
        return await server.http.post("/v1/generate", content=content, headers=headers_all)

    answer = run(test, generates=False)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]


def test_a_body_without_a_length_is_measured_as_it_comes(run):
    async def endless():
        for _ in range(1000):
            yield b" " * 100

    async def test(server):
        return await server.http.post(
            "/v1/generate", content=endless(), headers={"Content-Type": "application/json"}
        )

    assert run(test, generates=False).status_code == 413


def test_a_body_must_be_there_in_time(run):
    async def test(server):
        sent = []

        async def receive():
            await asyncio.sleep(60)

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": headers}
        await server.app(scope, receive, send)
        return sent[0]["status"]

    assert run(test, receive_s=0.05, generates=False) == 408


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": "Bearer "},
        {"Authorization": TOKEN},
        {"Authorization": f"Digest {TOKEN}"},
        {"Authorization": "Basic !!!"},
        {"Authorization": basic(TOKEN)},
        {"Authorization": basic(f"{TOKEN}:")},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
)
def test_without_the_token_there_is_nothing_but_401_and_healthz(run, headers):
    async def test(server):
        answers = [await server.http.get(path, headers=headers) for path in ROUTES]
        answers += [
            await server.http.request(method, path, headers=headers, content=b"{")
            for method, path in (
                ("POST", "/v1/generate"),
                ("POST", "/v1/picture"),
                ("PUT", "/v1/generate"),
                ("OPTIONS", "/v1/generate"),
                ("DELETE", "/"),
            )
        ]
        return answers, await server.http.get("/healthz", headers=headers)

    answers, alive = run(test, token=TOKEN, generates=False)
    assert {answer.status_code for answer in answers} == {401}
    assert all(answer.json() == {"error": "a valid token is needed"} for answer in answers)
    assert all(answer.headers["www-authenticate"].startswith("Basic ") for answer in answers)
    assert alive.status_code == 200


@pytest.mark.parametrize(
    "given",
    [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(f"me:{TOKEN}")],
)
def test_the_token_opens_the_rest(run, given):
    async def test(server):
        server.http.headers["Authorization"] = given
        info = await server.http.get("/v1/info", headers={"Host": "any.example"})
        return info, await server.post(), await server.http.get("/openapi.json")

    info, answer, described = run(test, token=TOKEN)
    assert info.status_code == answer.status_code == described.status_code == 200
    assert described.json()["components"]["securitySchemes"]


def test_every_answer_carries_the_security_headers(run):
    async def test(server):
        return [
            await server.http.get("/healthz"),
            await server.http.get("/nothing"),
            await server.http.post("/healthz", content=b""),
            await server.post(prompt=""),
            await server.post(),
        ]

    for answer in run(test):
        assert HEADERS.items() <= {k: answer.headers.get(k) for k in HEADERS}.items()
        assert "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_unknown_paths_and_methods_are_errors_in_one_line(run):
    async def test(server):
        return await server.http.get("/v1/nothing"), await server.http.get("/v1/generate")

    missing, wrong = run(test, generates=False)
    assert (missing.status_code, missing.json()) == (404, {"error": "Not Found"})
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_metrics_count_answers_and_hold_nothing_that_a_client_wrote(run):
    async def test(server):
        await server.post()
        await server.post(seed=-1)
        await server.http.get("/secret-path")
        return (await server.http.get("/metrics")).text

    text = run(test)
    assert 'megjax_requests_total{route="/v1/generate",status="200"} 1.0' in text
    assert 'megjax_requests_total{route="/v1/generate",status="422"} 1.0' in text
    assert 'megjax_requests_total{route="other",status="404"} 1.0' in text
    assert "megjax_payload_bits_total 10136.0" in text
    assert 'megjax_part_seconds_count{part="denoise"} 1.0' in text
    assert "megjax_ready 1.0" in text
    assert "secret-path" not in text


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_if_asked(run, caplog, log_prompts):
    async def test(server):
        await server.post(prompt="a yellow star\n")
        await server.post(prompt="a yellow star" + " a" * 100)
        gate = Gate(server.service)
        gate.open.set()
        gate._generate = None  # fails with a stack trace
        return await server.post(prompt="a yellow star")

    with caplog.at_level("DEBUG"):
        answer = run(test, log_prompts=log_prompts)
    assert answer.status_code == 500
    assert answer.json() == {"error": "the server failed; its log says how"}
    assert ("yellow" in caplog.text) == log_prompts
    if log_prompts:
        assert "prompt 'a yellow star\\n'" in caplog.text

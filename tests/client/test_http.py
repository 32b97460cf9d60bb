"""The client against servers that refuse, break off, lie and attack; every failure is one clean line."""

import asyncio
import dataclasses
import json
import math
import re
import sys

import httpx
import pytest

from megjax.client import Channel, PictureRequest, Throughput, connect, fetch
from megjax.errors import MegError
from tests.client.test_channel import Clock

REQUEST = PictureRequest("a red circle", steps=8, ratio=0.4)


async def stream(body, size=500):
    for i in range(0, len(body), size):
        yield body[i : i + size]


def served(answers, request=REQUEST, patience_s=60.0, server="http://edge", token=None, **options):
    """Fetch from a server that gives these answers in turn, an exception for a network that fails.

    Returns the answer, the requests that came in and the clock.
    """
    clock, requests, answers = Clock(), [], iter(answers)

    def handle(request):
        requests.append(request)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        status, headers, body = answer
        return httpx.Response(status, headers=headers, content=stream(body))

    async def run():
        async with connect(server, token, transport=httpx.MockTransport(handle)) as http:
            return await fetch(
                http,
                request,
                **{"most_bytes": 4000, "patience_s": patience_s, "clock": clock, "sleep": clock.sleep}
                | options,
            )

    return asyncio.run(run()), requests, clock


def refusal(*answers, **options):
    with pytest.raises(MegError) as caught:
        served(answers, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isprintable()
    return str(caught.value)


def error(status, text="no", **headers):
    return status, headers, json.dumps({"error": text}).encode()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("all_proxy", "ftp://proxy", "proxy: Unknown scheme"),
        ("all_proxy", "::", "proxy: Invalid port"),
        ("SSL_CERT_FILE", "/no/such/file", "SSL_CERT_FILE /no/such/file: "),
        ("SSL_CERT_FILE", __file__, f"SSL_CERT_FILE {__file__}: "),
    ],
)
def test_a_proxy_or_certificates_that_cannot_be_used_are_one_line(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(MegError, match=re.escape(message)) as caught:
        connect("https://edge")
    assert len(str(caught.value).splitlines()) == 1


def test_a_socks_proxy_without_its_library_is_one_line(monkeypatch):
    monkeypatch.setenv("all_proxy", "socks5://localhost:1080")
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(MegError, match=r"proxy: .*socksio.*; mend ALL_PROXY"):
        connect("http://edge")


def test_a_proxys_port_that_is_none_is_one_line(monkeypatch):
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:99999")

    async def run():
        async with connect("http://edge") as http:
            await fetch(http, REQUEST, most_bytes=4000)

    with pytest.raises(MegError, match=r"cannot reach http://edge: .*port"):
        asyncio.run(run())


def test_asks_for_a_message_and_gets_it(message, answer):
    sent = message()
    got, requests, _ = served([answer(sent)], token="secret")
    assert got.message == sent
    assert got.result["payload_bits"] == 8 * (len(sent) - 32)
    assert got.tries == 1
    (request,) = requests
    assert (request.method, request.url) == ("POST", "http://edge/v1/generate")
    assert request.headers["Authorization"] == "Bearer secret"
    # What is not asked for is not sent: the server knows best.
    assert json.loads(request.content) == {
        "prompt": "a red circle",
        "negative_prompt": "",
        "seed": 0,
        "steps": 8,
        "ratio": 0.4,
    }


def test_the_channel_is_reported(message, answer):
    def report(**options):
        _, (request,), _ = served([answer(message())], **options)
        return json.loads(request.content).get("channel")

    assert report() is None
    assert report(throughput=Throughput(3e6, 1.5)) == {"rate_bps": 2e6, "psnr_db": None}
    assert report(channel=Channel(8e5, 12.0)) == {"rate_bps": 8e5, "psnr_db": 12.0}
    for perfect_db in (250.0, math.inf):
        assert report(channel=Channel(8e5, perfect_db)) == {"rate_bps": 8e5, "psnr_db": None}
    limits = PictureRequest("a red circle", limits=(3.0, 1800.0))
    _, (request,), _ = served([answer(message())], request=limits)
    assert json.loads(request.content)["limits"] == {"latency_s": 3.0, "energy_j": 1800.0}


def test_what_is_measured_is_what_the_channel_gives(message, answer):
    sent = message(ratio=0.0)
    channel = Channel(5e4, 10.0, latency_s=0.25)
    got, _, clock = served([answer(sent)], channel=channel)
    assert got.transfer_s == pytest.approx(0.25 + 8 * (len(sent) - 32) / 5e4)
    assert clock.now_s - 100 == pytest.approx(got.transfer_s + got.wait_s)
    assert got.throughput.rate_bps == pytest.approx(5e4, rel=0.02)


def test_tries_again_as_the_server_says(message, answer):
    sent = message()
    busy = [
        error(429, **{"Retry-After": "3"}),
        error(503, **{"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}),
        error(502),
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("peer closed connection"),
    ]
    waits = []
    got, requests, clock = served(
        [*busy, answer(sent)], on_retry=lambda reason, wait_s: waits.append((reason, wait_s))
    )
    assert got.message == sent
    assert got.tries == len(requests) == 6
    assert len({request.content for request in requests}) == 1
    seconds = [wait_s for _, wait_s in waits]
    assert 3 <= seconds[0] <= 4.5
    assert seconds[1] < 0.1
    for i in (2, 3, 4):
        assert 0.25 * 2**i <= seconds[i] <= 1.5 * 0.25 * 2**i
    assert got.retry_s == pytest.approx(sum(seconds))
    assert clock.now_s - 100 == pytest.approx(got.retry_s)
    assert "429" in waits[0][0]
    assert "peer closed connection" in waits[4][0]


def test_a_message_that_was_damaged_or_cut_is_asked_for_again(message, answer):
    sent = message()
    damaged = sent[:-1] + bytes([sent[-1] ^ 1])
    status, headers, _ = answer(sent)
    got, requests, _ = served([(status, headers, damaged), (status, headers, sent[:-9]), answer(sent)])
    assert got.message == sent
    assert len(requests) == 3


@pytest.mark.parametrize(("deadline_s", "waits_s"), [(None, 120.0), (600.0, 630.0)])
def test_a_silent_server_is_waited_for_as_long_as_the_deadline(message, answer, deadline_s, waits_s):
    asked = dataclasses.replace(REQUEST, deadline_s=deadline_s)
    _, requests, _ = served([answer(message())], request=asked)
    assert requests[0].extensions["timeout"]["read"] == waits_s
    text = refusal(httpx.ReadTimeout(""), request=asked, patience_s=0.0)
    assert f"says nothing for {waits_s:g} s" in text


def test_patience_ends():
    text = refusal(*[httpx.ConnectError("refused")] * 100, patience_s=20.0)
    assert "cannot get a message from http://edge" in text
    assert "refused" in text
    assert "times in" in text
    # It is not begun where it could not be ended.
    assert "tried once" in refusal(error(429, "64 wait already", **{"Retry-After": "3600"}))


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ([error(401, "no token")], "asks for a token"),
        ([error(422, "steps: at most 12")], "refuses the request (422): steps: at most 12"),
        ([error(413)], "refuses the request (413)"),
        ([error(504, "deadline passed")], "504: deadline passed"),
        ([(500, {}, b"<html>oh")], "500: Internal Server Error"),
        ([(404, {}, b'{"error": 7}')], "404: Not Found"),
        ([(302, {"Location": "http://elsewhere/"}, b"")], "302: Found"),
        ([error(422, "a\x1b[31m red\r\nline\u202e")], "a [31m red line"),
        ([error(422, "x" * 9999)], "x…"),
        ([(422, {}, b"[" * 10**6)], "422"),
        ([(200, {"Content-Type": "text/html"}, b"hello")], "not a MegJAX server"),
        (
            [(200, {"Content-Type": "application/vnd.megjax.message"}, b"hello")],
            "without a readable MegJAX-Result",
        ),
    ],
)
def test_refusals_are_one_line(answers, text):
    assert text in refusal(*answers, token="secret")


def test_redirects_are_not_followed_and_take_no_token_along():
    seen = []

    def handle(request):
        seen.append(str(request.url))
        return httpx.Response(307, headers={"Location": "http://elsewhere/"}, content=stream(b""))

    async def run():
        async with connect("http://edge", "secret", transport=httpx.MockTransport(handle)) as http:
            await fetch(http, REQUEST, most_bytes=4000)

    with pytest.raises(MegError, match="307"):
        asyncio.run(run())
    assert seen == ["http://edge/v1/generate"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 5}, "asked for seed 0"),
        ({"ratio": 0.5}, "the message's ratio is 0.4"),
        ({"payload_bits": 8}, "8 bits"),
        ({"tokens": 1e9}, "1e+09 tokens"),
        ({"steps": "8"}, "steps is no finite number"),
        ({"batch": True}, "batch is no finite number"),
        ({"ratio": math.nan}, "ratio is no finite number"),
        ({"timings": {"total_s": math.inf}}, "timings has no finite number"),
        ({"timings": {}}, "timings has no finite number"),
        ({"latency_s": []}, "latency_s has no finite number"),
        ({"energy_j": None}, "energy_j has no finite number"),
    ],
)
def test_an_account_that_is_not_the_messages_is_refused(message, answer, changes, text):
    assert text in refusal(answer(message(), **changes))


def test_no_more_is_read_than_a_picture_takes(message, answer):
    status, headers, _ = answer(message())
    seen = 0

    async def endless():
        nonlocal seen
        while True:
            seen += 1000
            yield bytes(1000)

    async def run():
        transport = httpx.MockTransport(lambda _: httpx.Response(status, headers=headers, content=endless()))
        async with connect("http://edge", transport=transport) as http:
            await fetch(http, REQUEST, most_bytes=4000)

    with pytest.raises(MegError, match="more than 4000 bytes"):
        asyncio.run(run())
    assert seen == 5000


@pytest.mark.parametrize(
    ("server", "token", "text"),
    [
        ("ftp://edge", None, "http://HOST:PORT"),
        ("edge:8000", None, "http://HOST:PORT"),
        ("", None, "http://HOST:PORT"),
        ("http://", None, "http://HOST:PORT"),
        ("http://me:secret@edge", None, "http://HOST:PORT"),
        ("http://edge:port", None, "port"),
        ("http://edge", "", "at least one"),
        ("http://edge", "sec ret", "no blanks"),
        ("http://edge", "secret\r\nX: y", "no blanks"),
        ("http://edge", "sécret", "ASCII"),
    ],
)
def test_impossible_addresses_and_tokens_are_refused(server, token, text):
    with pytest.raises(MegError, match=text) as caught:
        connect(server, token)
    assert token in (None, "") or token not in str(caught.value)


@pytest.mark.parametrize("change", [{"prompt": "\ud800"}, {"ratio": math.nan}, {"limits": (math.inf, 1.0)}])
def test_requests_that_are_no_json_are_not_sent(change):
    text = refusal(request=dataclasses.replace(REQUEST, **change))
    assert "finite" in text

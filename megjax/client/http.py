"""Ask an edge server for a picture: one request, one message, as many tries as patience allows."""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import itertools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

import httpx
import numpy as np

from megjax.client.channel import NOTHING_KNOWN, Channel, Clock, Sleep, Throughput, observed, paced
from megjax.errors import MegError
from megjax.link.wire import HEADER_BYTES, MEDIA_TYPE, RESULT_HEADER, decode

JSON = {"Content-Type": "application/json"}
ERROR_BYTES = 65536
"""More of an error's body is not read."""
PARTS = {
    "timings": ("queue_s", "text_s", "denoise_s", "merge_s", "total_s"),
    "latency_s": ("es", "tx", "ue", "total"),
    "energy_j": ("es", "tx", "ue", "total"),
}
"""What a device reads of the server's account: as measured, and as the model charges it."""
SILENCE_S = 120.0
"""That an answer may take where the request has no deadline."""
GRACE_S = 30.0
"""Beyond a request's deadline, by which the server answers."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
BUSY = (429, 502, 503)
"""Statuses that pass: a full queue, a server that starts or drains, a proxy before one."""


@dataclasses.dataclass(frozen=True)
class PictureRequest:
    """What the server is asked for; what is None it chooses itself.

    Args:
        prompt: what the picture shows.
        negative_prompt: what guidance leads away from.
        seed: of the noise, the partition and the channel.
        height: of the picture, pixels.
        width: likewise.
        steps: denoising steps T; with `ratio`, or neither and a policy chooses both.
        ratio: merging ratio r.
        limits: mean latency (s) and energy (J) for the policy to keep.
        guidance: of classifier-free guidance.
        dtype: how a scalar travels.
        deadline_s: the server gives up after so long.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    ratio: float | None = None
    limits: tuple[float, float] | None = None
    guidance: float | None = None
    dtype: str | None = None
    deadline_s: float | None = None


class Answer(NamedTuple):
    """What came back.

    Args:
        message: in the wire format; not yet decoded into a picture.
        result: the server's account of it: steps, ratio, who chose them, timings, modelled costs.
        throughput: what is known of the link now.
        tries: requests that were sent.
        retry_s: spent on the tries before the last.
        wait_s: from the last request to its answer's head.
        transfer_s: until the message was there.
    """

    message: bytes
    result: dict[str, Any]
    throughput: Throughput
    tries: int
    retry_s: float
    wait_s: float
    transfer_s: float


class _Again(Exception):
    """This try failed, the next may not."""

    def __init__(self, reason: str, after_s: float | None = None):
        super().__init__(reason)
        self.after_s = after_s


def connect(
    server: str, token: str | None = None, *, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """Return a client of a server, a context manager. It follows no redirect, so neither does the token.

    Args:
        server: `http://HOST:PORT` or https.
        token: bearer token, if the server asks for one.
        transport: in place of the network.

    Raises:
        MegError: not such an address, a token that no header can carry, or a proxy or certificates of the
            environment that cannot be used.
    """
    try:
        url = httpx.URL(server)
    except (httpx.InvalidURL, TypeError) as error:
        raise MegError(f"server {server!r}: {error}") from None
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        raise MegError(f"server {server!r}: give http://HOST:PORT or https://HOST, without a user's name")
    if url.port is not None and not 1 <= url.port <= 65535:
        raise MegError(f"server {server!r}: ports from 1 to 65535 are allowed")
    headers = {"Accept": MEDIA_TYPE, "Accept-Encoding": "identity"}
    if token is not None:
        if not token or not all("!" <= c <= "~" for c in token):
            raise MegError("token: visible ASCII characters are allowed, no blanks, at least one")
        headers["Authorization"] = f"Bearer {token}"
    try:
        # A local proxy has nothing to do with a server on this machine, hence `trust_env` off there.
        return httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(SILENCE_S, connect=5.0),
            transport=transport,
            trust_env=url.host not in LOOPBACK,
        )
    except (ImportError, httpx.InvalidURL, ValueError) as error:
        # Without its address, which may hold a password.
        reason = printable(str(error)).rstrip(".")
        raise MegError(f"proxy: {reason}; mend ALL_PROXY, HTTP_PROXY or HTTPS_PROXY, or unset them") from None
    except OSError as error:
        file = os.environ.get("SSL_CERT_FILE")
        raise MegError(f"SSL_CERT_FILE {file}: {printable(str(error))}; mend it, or unset it") from None


async def fetch(
    http: httpx.AsyncClient,
    request: PictureRequest,
    *,
    most_bytes: int,
    channel: Channel | None = None,
    throughput: Throughput = NOTHING_KNOWN,
    patience_s: float = 60.0,
    on_retry: Callable[[str, float], None] = lambda reason, wait_s: None,
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
) -> Answer:
    """Ask for one message. Requests say all that a message depends on, so each may be sent again safely.

    What passes (a refused connection, a full queue, a server that restarts, a message cut short or damaged)
    is tried again: after the server's Retry-After, or 0.25 s doubled up to 5 s; both with jitter.

    Args:
        http: from `connect`.
        request: what to ask for.
        most_bytes: of the message; a longer one is not read.
        channel: an emulated one to receive it through, whose state the server is told; otherwise it is told
            the throughput measured so far, if any, and that a network adds no noise.
        throughput: what is known of the link.
        patience_s: no try begins later than this.
        on_retry: told each failed try's reason and the wait that follows.
        clock: in seconds.
        sleep: waits.

    Raises:
        MegError: patience is at an end, or the server refuses for good; its reason in one line.
    """
    body = _body(request, channel, throughput)
    start = clock()
    for tries in itertools.count(1):
        begun = clock()
        try:
            return await _once(
                http, request, body, most_bytes, channel, throughput, tries, begun - start, clock, sleep
            )
        except _Again as again:
            backoff_s = min(0.25 * 2.0 ** min(tries - 1, 5), 5.0)
            wait_s = again.after_s if again.after_s is not None else backoff_s
            # Clients that failed together must not come back together.
            wait_s = max(wait_s, 0.05) * (1 + 0.5 * random.random())
            if clock() + wait_s - start > patience_s:
                times = "once" if tries == 1 else f"{tries} times"
                raise MegError(f"{again}; tried {times} in {clock() - start:.1f} s") from None
            on_retry(str(again), wait_s)
            await sleep(wait_s)
    raise AssertionError  # Patience ends first.


async def _once(
    http: httpx.AsyncClient,
    request: PictureRequest,
    body: bytes,
    most_bytes: int,
    channel: Channel | None,
    throughput: Throughput,
    tries: int,
    retry_s: float,
    clock: Clock,
    sleep: Sleep,
) -> Answer:
    asked = clock()
    timeout = http.timeout
    if request.deadline_s is not None:
        timeout = httpx.Timeout(max(request.deadline_s, 0.0) + GRACE_S, connect=timeout.connect)
    try:
        async with http.stream(
            "POST", "v1/generate", content=body, headers=JSON, timeout=timeout
        ) as response:
            if response.status_code != 200:
                await _refuse(response)
            answered = clock()
            result = read_result(response.headers)
            pieces = response.aiter_raw()
            if channel is not None:
                pieces = paced(pieces, channel, clock, sleep)
            message, bits, seconds = await _collect(pieces, most_bytes, clock)
            done = clock()
    except httpx.ReadTimeout:
        said = f"{http.base_url} says nothing for {timeout.read:g} s"
        if request.deadline_s is None:
            said += "; to wait longer, give a deadline that the server allows"
        raise _Again(said) from None
    except httpx.TransportError as error:
        reason = printable(str(error)) or type(error).__name__
        raise _Again(f"cannot get a message from {http.base_url}: {reason}") from None
    except httpx.HTTPError as error:
        raise MegError(f"server {http.base_url}: {printable(str(error))}") from None
    except (OverflowError, ExceptionGroup) as error:
        # A proxy's port is looked at by the socket alone.
        raise MegError(f"cannot reach {http.base_url}: {_cause(error)}") from None
    _check(message, result, request)
    known = observed(throughput, bits, seconds)
    return Answer(message, result, known, tries, retry_s, answered - asked, done - answered)


def _cause(error: BaseException) -> str:
    """What an error says, of a group its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return printable(str(error)) or type(error).__name__


def _body(request: PictureRequest, channel: Channel | None, throughput: Throughput) -> bytes:
    """The request as JSON, the device's report of its channel with it."""
    body = {name: value for name, value in dataclasses.asdict(request).items() if value is not None}
    if request.limits is not None:
        body["limits"] = dict(zip(("latency_s", "energy_j"), request.limits, strict=True))
    if channel is not None:
        # Beyond what a server takes there is no noise to speak of.
        psnr_db = channel.psnr_db if channel.psnr_db <= 200 else None
        body["channel"] = {"rate_bps": channel.rate_bps, "psnr_db": psnr_db}
    elif throughput.rate_bps is not None:
        body["channel"] = {"rate_bps": throughput.rate_bps, "psnr_db": None}
    try:
        return json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        raise MegError("request: its numbers must be finite, its text without lone surrogates") from None


async def _collect(pieces: AsyncIterator[bytes], most_bytes: int, clock: Clock) -> tuple[bytes, int, float]:
    """The message; the bits of it after the first piece, and the seconds that they took."""
    received, first, last, after = bytearray(), None, 0.0, 0
    async for piece in pieces:
        received += piece
        if len(received) > most_bytes:
            raise MegError(f"message of more than {most_bytes} bytes: not one for this decoder")
        last = clock()
        if first is None:
            first = last
        else:
            after += len(piece)
    return bytes(received), 8 * after, last - first if first is not None else 0.0


async def _refuse(response: httpx.Response) -> None:
    """Raise what an answer other than 200 means."""
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > ERROR_BYTES:
            break
    try:
        said = json.loads(bytes(content))["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = None
    status = response.status_code
    said = printable(said) if isinstance(said, str) else printable(response.reason_phrase)
    if status in BUSY:
        raise _Again(f"the server is not ready ({status}): {said}", _retry_after_s(response.headers))
    if status == 401:
        raise MegError(f"the server asks for a token (401): {said}; give it with --token or MEGJAX_TOKEN")
    if status in (413, 422):
        raise MegError(f"the server refuses the request ({status}): {said}")
    raise MegError(f"the server answers {status}: {said}")


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: a number or a date (RFC 9110, section 10.2.3); None if it is neither."""
    text = headers.get("Retry-After", "").strip()
    try:
        if text.isascii() and text.isdigit():
            return float(text)
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def read_result(headers: Mapping[str, str]) -> dict[str, Any]:
    """Read the server's account of a message.

    Raises:
        MegError: it is missing, or what a device relies on is not in it.
    """
    kind = headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind != MEDIA_TYPE:
        raise MegError(f"answer of type {printable(kind)!r}: not a MegJAX server, or not one of this version")
    try:
        result = json.loads(headers.get(RESULT_HEADER, ""))
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict):
        raise MegError(f"answer without a readable {RESULT_HEADER}: not a MegJAX server of this version")
    for name in ("steps", "ratio", "seed", "tokens", "payload_bits", "batch"):
        if not _number(result.get(name)):
            raise MegError(f"{RESULT_HEADER}: {name} is no finite number")
    for name, parts in PARTS.items():
        table = result.get(name)
        if not isinstance(table, dict) or not all(_number(table.get(part)) for part in parts):
            raise MegError(f"{RESULT_HEADER}: {name} has no finite number for each of {', '.join(parts)}")
    return result


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _check(message: bytes, result: dict[str, Any], request: PictureRequest) -> None:
    """Refuse a message that is damaged, or not the one that the server tells of."""
    try:
        decoded = decode(message)
    except MegError as error:
        # Cut or damaged on its way; the server has it whole.
        raise _Again(str(error)) from None
    charged = 8 * (len(message) - HEADER_BYTES)
    if result["payload_bits"] != charged or result["tokens"] != len(decoded.features_MxD):
        raise MegError(
            f"{RESULT_HEADER}: {result['payload_bits']:g} bits and {result['tokens']:g} tokens; "
            f"the message has {charged} and {len(decoded.features_MxD)}"
        )
    if result["seed"] != request.seed or np.float32(result["ratio"]) != np.float32(decoded.ratio):
        raise MegError(
            f"{RESULT_HEADER}: seed {result['seed']:g}, ratio {result['ratio']:g}; asked for seed "
            f"{request.seed}, and the message's ratio is {decoded.ratio:g}"
        )


def printable(text: str, most: int = 300) -> str:
    """One line of a stranger's text, with nothing in it that a terminal would obey."""
    clean = "".join(c if c.isprintable() else " " for c in text[: 4 * most])
    clean = " ".join(clean.split())
    return clean if len(clean) <= most else clean[: most - 1] + "…"

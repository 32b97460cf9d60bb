"""Whatever is sent, the answer is an error in one line, never a crash."""

import asyncio
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megjax.serve.app import create_app
from megjax.serve.batching import Refused
from megjax.serve.config import ServeConfig
from megjax.serve.schemas import GenerateRequest
from megjax.serve.service import Service
from tests.serve.conftest import BODY

GOOD = json.dumps(BODY).encode()
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*GenerateRequest.model_fields, "unknown", "__proto__", ""])
BODIES = st.one_of(
    st.binary(max_size=200),
    ANYTHING.map(json.dumps).map(str.encode),
    st.dictionaries(FIELDS, ANYTHING, max_size=3).map(lambda more: json.dumps({**BODY, **more}).encode()),
    # One byte of a good body changed.
    st.builds(
        lambda at, byte: GOOD[:at] + bytes([byte]) + GOOD[at + 1 :],
        st.integers(0, len(GOOD) - 1),
        st.integers(0, 255),
    ),
)


@pytest.fixture(scope="module")
def ask(pipeline):
    """Send a body to a server whose worker refuses whatever gets so far; nothing is compiled."""
    service = Service(pipeline, ServeConfig())

    def refuse(*_):
        raise Refused(503, "valid", 1)

    service.ready, service.batcher.submit = True, refuse
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=True)
    loop = asyncio.new_event_loop()
    http = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def ask(method, path, content=b"", headers=()):
        return loop.run_until_complete(http.request(method, path, content=content, headers=headers))

    yield ask
    loop.run_until_complete(http.aclose())
    loop.close()
    service.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(body=BODIES, path=st.sampled_from(["/v1/generate", "/v1/picture"]))
def test_no_body_breaks_the_server(ask, body, path):
    answer = ask("POST", path, body, {"Content-Type": "application/json"})
    assert answer.status_code in (400, 413, 422, 503)
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert error
    assert error.isprintable()
    assert len(error) < 4000


@settings(max_examples=50, deadline=None, derandomize=True)
@given(value=st.binary(max_size=60).filter(lambda b: not set(b) & {0, 10, 13}))
@pytest.mark.parametrize("name", ["Authorization", "Host", "Content-Type", "Content-Length"])
def test_no_header_breaks_the_server(ask, name, value):
    headers = {b"Content-Type": b"application/json", name.encode(): value}
    answer = ask("POST", "/v1/generate", b"{}", list(headers.items()))
    assert answer.status_code in (400, 413, 415, 422)


def test_a_valid_body_would_get_through(ask):
    answer = ask("POST", "/v1/generate", json.dumps(BODY).encode(), {"Content-Type": "application/json"})
    assert answer.status_code == 503
    assert answer.json() == {"error": "valid"}


def test_no_request_made_to_break_the_description_breaks_the_server(ask):
    """Schemathesis' requests: a field or two wrong, by `/openapi.json`."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs the extra `fuzz`")
    described = schemathesis.openapi.from_dict(ask("GET", "/openapi.json").json())
    statuses = set()

    def sending(path):
        def send(case):
            try:
                content = json.dumps(case.body).encode()
            except (TypeError, ValueError):
                return
            answer = ask("POST", path, content, {"Content-Type": "application/json"})
            assert answer.status_code < 500 or answer.json() == {"error": "valid"}
            statuses.add(answer.status_code)

        return send

    often = settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    for path in ("/v1/generate", "/v1/picture"):
        wrong = described[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
        often(given(case=wrong)(sending(path)))()
    assert 422 in statuses

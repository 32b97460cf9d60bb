"""The routes."""

import asyncio
import base64
import contextlib
import json
import logging
import mimetypes
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any, get_args

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from megjax import __version__
from megjax.link.wire import MEDIA_TYPE, RESULT_HEADER, WireDtype
from megjax.serve.batching import RESTART_S, Refused
from megjax.serve.engine import largest_ratio
from megjax.serve.guard import App, guarded
from megjax.serve.schemas import MAX_GUIDANCE, GenerateRequest, readable
from megjax.serve.service import Done, Service

CHUNK_BYTES = 16384

log = logging.getLogger("megjax.serve")

_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string"}},
    "required": ["error"],
}
_REASONS = {
    400: "A body that cannot be read or that does not belong there, or a host that is not this machine",
    401: "Without the server's token",
    408: "The body took too long",
    413: "The body is too large",
    415: "Not application/json",
    422: "Not JSON, or what cannot be generated, a phrase a field",
    429: "The queue is full; see Retry-After",
    503: "Starting or shutting down; see Retry-After",
    504: "The deadline passed",
}


def create_app(service: Service, on_failure: Callable[[], None] = lambda: None) -> App:
    """Return the ASGI application of a server.

    Args:
        service: what it serves.
        on_failure: called if the worker fails for good.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.run())

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                service.ready = False
                log.error("the worker failed", exc_info=error)
                on_failure()

        task.add_done_callback(ended)
        yield
        task.cancel()
        service.close()

    app = FastAPI(
        title="MegJAX edge server",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    _handle_errors(app, service)
    _add_routes(app, service)
    pages = _add_page(app)
    known = {"/v1/generate", "/v1/picture", "/v1/info", "/healthz", "/readyz", "/metrics", "/openapi.json"}
    return guarded(app, service.config, service.metrics, frozenset(known | pages))


def _handle_errors(app: FastAPI, service: Service) -> None:
    def answer(status: int, reason: str, retry_after_s: int | None = None) -> JSONResponse:
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        if service.batcher.draining:
            headers["Connection"] = "close"
        return JSONResponse({"error": reason}, status, headers)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return answer(error.status, error.reason, error.retry_after_s)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(422, readable(error.errors()))

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> JSONResponse:
        response = answer(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return answer(500, "the server failed; its log says how")


def _add_routes(app: FastAPI, service: Service) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in _REASONS.items()
    }
    message: dict[str, Any] = {
        "description": "One message in the wire format",
        "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        "headers": {RESULT_HEADER: {"schema": {"type": "string"}, "description": "What was done, as JSON"}},
    }

    # Only described here: the guard checks it before the application sees anything.
    token = [Security(HTTPBearer(auto_error=False))] if service.config.token is not None else []

    def closing() -> dict[str, str]:
        return {"Connection": "close"} if service.batcher.draining else {}

    async def answer(body: GenerateRequest, request: Request, picture: bool) -> Done:
        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        return await service.answer(body, gone, picture=picture)

    @app.post("/v1/generate", response_class=Response, responses={200: message, **errors}, dependencies=token)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Generate a picture; its message, and what was done in the header `MegJAX-Result`."""
        done = await answer(body, request, False)
        headers = {
            RESULT_HEADER: json.dumps(done.result, separators=(",", ":")),
            "Content-Length": str(len(done.sent.message)),
            **closing(),
        }
        return StreamingResponse(_chunks(done.sent.message), media_type=MEDIA_TYPE, headers=headers)

    @app.post("/v1/picture", responses=errors, dependencies=token)
    async def picture(body: GenerateRequest, request: Request) -> JSONResponse:
        """Generate a picture and run the device's half here too; PNGs in base64."""
        done = await answer(body, request, True)
        assert done.shown is not None
        content = {
            "result": done.result,
            "image": base64.b64encode(done.shown.image).decode(),
            "reference": base64.b64encode(done.shown.reference).decode(),
            "mse": done.shown.mse,
            "psnr_db": done.shown.psnr_db,
        }
        return JSONResponse(content, headers=closing())

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process lives; asks for no token."""
        return {"status": "alive"}

    @app.get("/readyz", responses={401: errors[401], 503: errors[503]}, dependencies=token)
    async def readyz() -> dict[str, str]:
        """Whether requests are taken."""
        if service.batcher.draining:
            raise Refused(503, "the server is shutting down", RESTART_S)
        if not service.ready:
            raise Refused(503, "the server is starting", 2)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={401: errors[401]}, dependencies=token)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/info", responses={401: errors[401]}, dependencies=token)
    async def info() -> dict[str, Any]:
        """What this server makes, and within which bounds."""
        return _info(service)


def _info(service: Service) -> dict[str, Any]:
    config = service.config
    return {
        "model": service.pipeline.name,
        "version": __version__,
        "sizes": [list(size) for size in service.sizes],
        "steps": [service.fewest_steps, config.max_steps],
        "ratio": [0.0, min(largest_ratio(service.pipeline, size) for size in service.sizes)],
        "guidance": [0.0, MAX_GUIDANCE],
        "dtypes": list(get_args(WireDtype)),
        "batch_sizes": list(service.batcher.seconds),
        "queue": config.queue,
        "deadline_s": config.deadline_s,
        "profile": config.profile,
        "tome_ratio": config.tome_ratio,
        "policies": [
            {
                "conditioned": policy.info.conditioned,
                "limits": [
                    {"latency_s": latency_s, "energy_j": 1000 * energy_kj}
                    for latency_s, energy_kj in policy.info.limits
                ],
                "steps": [policy.info.min_steps, policy.info.max_steps],
            }
            for policy in service.policies
        ],
    }


def _add_page(app: FastAPI) -> set[str]:
    """Serve the page's files, read once; returns their paths."""
    folder, paths = resources.files("megjax.serve") / "page", set()
    if not folder.is_dir():
        return paths
    for file in folder.iterdir():
        if not file.is_file() or file.name.startswith((".", "_")):
            continue
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        path = "/" if file.name == "index.html" else f"/{file.name}"

        def serve(content: bytes = file.read_bytes(), kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.router.add_route(path, lambda _, serve=serve: serve(), methods=["GET"], include_in_schema=False)
        paths.add(path)
    return paths


async def _chunks(message: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(message), CHUNK_BYTES):
        yield message[start : start + CHUNK_BYTES]

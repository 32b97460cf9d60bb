"""A small backbone with a student, and a server of it without a network."""

import asyncio
import contextlib
import dataclasses
import threading
from importlib.util import find_spec
from typing import Any

import pytest

from megjax.pipeline import load_pipeline
from tests.small import save_random

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "httpx")):
    collect_ignore_glob = ["test_*.py"]  # They need the extras `serve` and `device`.

PROMPT = "a red circle left of a blue square"
BODY = {"prompt": PROMPT, "steps": 4, "ratio": 0.4}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="session")
def pipeline(folder):
    loaded = load_pipeline(folder)
    return dataclasses.replace(loaded, params={**loaded.params, "student": loaded.params["unet"]})


class Gate:
    """Holds a service's worker until it is opened, and counts its batches."""

    def __init__(self, service):
        self.open, self.batches, self._generate = threading.Event(), [], service._generate
        service._generate = self

    def __call__(self, wanted, size, abandoned):
        self.batches.append([each.task.seed for each in wanted])
        assert self.open.wait(60)
        return self._generate(wanted, size, abandoned)


@dataclasses.dataclass
class Server:
    service: Any
    app: Any
    http: Any

    async def post(self, path="/v1/generate", **changes):
        body = {name: value for name, value in {**BODY, **changes}.items() if value is not None}
        return await self.http.post(path, json=body)


@pytest.fixture
def run(pipeline):
    """(test, configuration) -> what the test returns, run against a ready server.

    `warm` waits for it to be ready; one that `generates` nothing is at once.
    """
    import httpx

    from megjax.serve.app import create_app
    from megjax.serve.config import ServeConfig
    from megjax.serve.service import Service

    def run(test, *, warm=True, generates=True, **config):
        config = {"batch_sizes": (1,), **config}

        @contextlib.asynccontextmanager
        async def serving():
            service = Service(pipeline, ServeConfig(**config))
            app = create_app(service)
            task = asyncio.create_task(service.run() if generates else asyncio.sleep(0))
            service.ready = not generates
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            try:
                while warm and not service.ready:
                    await asyncio.sleep(0.01)
                    if task.done():
                        task.result()
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                    yield Server(service, app, http)
            finally:
                task.cancel()
                service.close()

        async def main():
            async with serving() as server:
                return await asyncio.wait_for(test(server), 120)

        return asyncio.run(main())

    return run


@pytest.fixture
def gate():
    return Gate


async def until(condition, seconds=30):
    """Wait for something to become true."""
    for _ in range(int(seconds * 200)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come true")

"""Under load: batches, a full queue, deadlines, clients that leave, the end."""

import asyncio
import json

import pytest

from megjax.serve.batching import Batcher, Refused
from megjax.serve.config import ServeConfig
from tests.serve.conftest import BODY, until


def in_batches(queue, kinds, seconds, **batcher):
    """Queue kinds at once; return the batches that they left in."""
    batches = []

    async def work(jobs, size):
        batches.append((size, [job.work for job in jobs]))
        return [job.work for job in jobs]

    async def main():
        made = Batcher(work, list(seconds), queue, 0.0)
        made.seconds.update(seconds)
        jobs = [made.submit(kind, i) for i, kind in enumerate(kinds)]
        task = asyncio.create_task(made.run())
        answers = await asyncio.gather(*(job.answer for job in jobs))
        task.cancel()
        return answers

    assert asyncio.run(main()) == list(range(len(kinds)))
    return batches


def test_batches_are_of_one_kind_and_in_turn():
    batches = in_batches(9, "aabab", {1: 1.0, 4: 1.0})
    assert batches == [(4, [0, 1, 3]), (4, [2, 4])]


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0}, [4, 1]),  # rows are free: an accelerator
        ({1: 1.0, 2: 2.2, 4: 5.0}, [1, 1, 1, 1, 1]),  # rows cost more together
        ({1: 1.0, 2: 1.5, 4: 3.2}, [2, 2, 1]),
    ],
)
def test_the_batch_size_is_the_one_that_serves_most_a_second(seconds, sizes):
    assert [size for size, _ in in_batches(9, "aaaaa", seconds)] == sizes


def test_a_failed_batch_fails_its_jobs_and_no_other():
    async def work(jobs, size):
        if jobs[0].work == 0:
            raise RuntimeError("broken")
        return [job.work for job in jobs]

    async def main():
        batcher = Batcher(work, [1], 4, 0.0)
        jobs = [batcher.submit("a", i) for i in range(2)]
        task = asyncio.create_task(batcher.run())
        answers = await asyncio.gather(*(job.answer for job in jobs), return_exceptions=True)
        task.cancel()
        return answers

    first, second = asyncio.run(main())
    assert isinstance(first, RuntimeError)
    assert second == 1


def test_draining_gives_up_what_waits_too_long():
    async def main():
        release = asyncio.Event()

        async def work(jobs, size):
            await release.wait()
            return [job.work for job in jobs]

        batcher = Batcher(work, [1], 4, 0.0)
        task = asyncio.create_task(batcher.run())
        jobs = [batcher.submit("a", i) for i in range(3)]
        await until(lambda: batcher.running)
        drain = asyncio.create_task(batcher.drain(0.05))
        await until(lambda: not batcher.waiting)
        assert not drain.done()
        with pytest.raises(Refused, match="shutting down"):
            batcher.submit("a", 9)
        release.set()
        await drain
        answers = await asyncio.gather(*(job.answer for job in jobs), return_exceptions=True)
        task.cancel()
        return answers

    first, *rest = asyncio.run(main())
    assert first == 0
    assert [error.status for error in rest] == [503, 503]


async def held(server, gate, count):
    """Requests of which the first runs, held at the gate, and the others wait."""
    gate = gate(server.service)
    asked = [asyncio.create_task(server.post(seed=0))]
    await until(lambda: gate.batches)
    for seed in range(1, count):
        asked.append(asyncio.create_task(server.post(seed=seed)))
        await until(lambda seed=seed: len(server.service.batcher.waiting) == seed)
    return gate, asked


def test_a_full_queue_answers_429_and_when_to_come_again(run, gate):
    async def test(server):
        opened, asked = await held(server, gate, 4)
        refused = await server.post()
        opened.open.set()
        return refused, await asyncio.gather(*asked)

    refused, answers = run(test, queue=3)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert [answer.status_code for answer in answers] == [200] * 4
    assert [json.loads(a.headers["megjax-result"])["seed"] for a in answers] == [0, 1, 2, 3]


def test_what_waits_together_is_answered_as_if_alone(run, gate):
    async def test(server):
        server.service.batcher.seconds.update({1: 1.0, 2: 1.0})
        opened, asked = await held(server, gate, 5)
        opened.open.set()
        answers = await asyncio.gather(*asked)
        # The same size again, other neighbours.
        server.service.batcher.seconds.update({1: 9.0})
        return opened.batches, answers, [await server.post(seed=seed) for seed in range(1, 5)]

    batches, answers, alone = run(test, batch_sizes=(1, 2))
    assert batches[:3] == [[0], [1, 2], [3, 4]]
    assert [json.loads(a.headers["megjax-result"])["batch"] for a in answers] == [1, 2, 2, 2, 2]
    assert [a.content for a in answers[1:]] == [a.content for a in alone]


def test_a_passed_deadline_answers_504_and_frees_the_place(run, gate):
    async def test(server):
        opened, asked = await held(server, gate, 1)
        late = await server.post(seed=9, deadline_s=0.05)
        waiting = len(server.service.batcher.waiting)
        opened.open.set()
        await asyncio.gather(*asked)
        await server.post(seed=3)
        return late, waiting, opened.batches, (await server.http.get("/metrics")).text

    late, waiting, batches, metrics = run(test)
    assert late.status_code == 504
    assert late.json() == {"error": "not done within 0.05 s"}
    assert waiting == 0
    assert [9] not in batches
    assert 'megjax_cancelled_total{reason="deadline"} 1.0' in metrics


def test_the_server_has_a_deadline_of_its_own(run, gate):
    async def test(server):
        opened, asked = await held(server, gate, 2)
        answers = await asyncio.gather(*asked)
        opened.open.set()
        return answers

    assert [a.status_code for a in run(test, deadline_s=0.2)] == [504, 504]


def test_a_client_that_leaves_frees_its_place(run, gate):
    async def test(server):
        opened, asked = await held(server, gate, 1)
        left, sent = asyncio.Event(), []
        body = json.dumps({**BODY, "seed": 9}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": headers}
        scope |= {"query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http"}
        call = asyncio.create_task(server.app(scope, receive, send))
        await until(lambda: server.service.batcher.waiting)
        left.set()
        await call
        waiting = len(server.service.batcher.waiting)
        opened.open.set()
        await asyncio.gather(*asked)
        return waiting, opened.batches, (await server.http.get("/metrics")).text

    waiting, batches, metrics = run(test)
    assert waiting == 0
    assert batches == [[0]]
    assert 'megjax_cancelled_total{reason="client left"} 1.0' in metrics


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(run, gate):
    async def test(server):
        opened, asked = await held(server, gate, 3)
        drain = asyncio.create_task(server.service.batcher.drain(30))
        await asyncio.sleep(0)
        refused, ready = await server.post(), await server.http.get("/readyz")
        alive = await server.http.get("/healthz")
        assert not drain.done()
        opened.open.set()
        await drain
        return refused, ready, alive, await asyncio.gather(*asked)

    refused, ready, alive, answers = run(test)
    assert refused.status_code == ready.status_code == 503
    assert refused.headers["retry-after"] == "5"
    assert refused.headers["connection"] == "close"
    assert alive.status_code == 200
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[-1].headers["connection"] == "close"


def test_nothing_is_taken_before_everything_is_compiled(run):
    async def test(server):
        early = await server.post(), await server.http.get("/readyz"), await server.http.get("/healthz")
        await until(lambda: server.service.ready)
        return *early, await server.http.get("/readyz")

    early, unready, alive, ready = run(test, warm=False)
    assert (early.status_code, unready.status_code, alive.status_code, ready.status_code) == (
        503,
        503,
        200,
        200,
    )
    assert early.headers["retry-after"] == unready.headers["retry-after"] == "2"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": "0.0.0.0"}, "a token is required"),
        ({"host": "example.org"}, "a token is required"),
        ({"host": "::"}, "a token is required"),
        ({"token": ""}, "visible ASCII"),
        ({"token": "two words"}, "visible ASCII"),
        ({"port": 65536}, "port 65536"),
        ({"batch_sizes": ()}, "batch sizes"),
        ({"batch_sizes": (2, 2)}, "batch sizes"),
        ({"queue": 0}, "queue 0"),
        ({"deadline_s": float("inf")}, "deadline_s inf"),
    ],
)
def test_a_server_is_not_set_up_wrongly(changes, words):
    with pytest.raises(ValueError, match=words):
        ServeConfig(**changes)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_on_loopback_no_token_is_needed(host):
    assert ServeConfig(host=host).token is None

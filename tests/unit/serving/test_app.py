"""The application without a server or a model: what happens when the engine fails or is slow."""

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from locvlm.serving.app import About, make_app
from locvlm.serving.forms import Answer, Query
from locvlm.serving.limits import Limits

QUERY = json.dumps({"image": "", "question": "Is there a cat?"}).encode()


class Engine:
    """Does `work` before it says yes to everything."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work

    def prepare(self, query: Query) -> str:
        return query.question or ""

    def answers(self, prepared: Sequence[str]) -> list[Answer]:
        self._work()
        return [Answer(answer="Yes", places=[], prompt=text, width=1, height=1) for text in prepared]


async def reply(app: Any, path: str = "/api/answer", method: str = "POST") -> tuple[int, dict[str, str], str]:
    """Status, headers and body of one request."""
    sent: list[Any] = []
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}

    async def receive() -> Any:
        return {"type": "http.request", "body": QUERY}

    async def send(message: Any) -> None:
        sent.append(message)

    try:
        await app(scope, receive, send)
    except RuntimeError:
        assert sent[0]["status"] == 500  # told to the client first, then to the server's log
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]).decode()


def test_a_fault_of_ours_is_told_without_its_words_and_the_next_query_is_answered() -> None:
    faults = [RuntimeError("in /secret/path"), None]

    def work() -> None:
        fault = faults.pop(0)
        if fault is not None:
            raise fault

    async def scenario() -> None:
        app = make_app(Engine(work), Limits(), About("model"))
        status, headers, body = await reply(app)
        assert (status, json.loads(body)) == (500, {"error": "an internal error; the server's log says more"})
        assert headers["x-content-type-options"] == "nosniff"
        status, _, body = await reply(app)
        assert (status, json.loads(body)["answer"]) == (200, "Yes")
        told = (await reply(app, "/metrics", "GET"))[2]
        assert 'locvlm_requests_total{form="none",status="500"} 1.0' in told
        assert 'locvlm_requests_total{form="question",status="200"} 1.0' in told

    asyncio.run(scenario())


@pytest.mark.parametrize(("limits", "words"), [(Limits(seconds=0.2), "0.2 seconds"), (Limits(open_requests=1), "busy")])
def test_no_time_and_no_room_are_told_with_when_to_come_again(limits: Limits, words: str) -> None:
    free = threading.Event()

    async def scenario() -> None:
        app = make_app(Engine(lambda: free.wait(30)), limits, About("model"))
        both = [asyncio.create_task(reply(app)) for _ in range(2)]
        done, _ = await asyncio.wait(both, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        status, headers, body = next(iter(done)).result()
        assert (status, headers["retry-after"]) == (503, "2")
        assert words in json.loads(body)["error"]
        free.set()
        await asyncio.gather(*both)
        assert (await reply(app))[0] == 200

    asyncio.run(scenario())


def test_a_server_whose_worker_has_ended_is_not_healthy() -> None:
    async def scenario() -> None:
        app = make_app(Engine(lambda: None), Limits(), About("model"))
        assert (await reply(app, "/health", "GET"))[0] == 200
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            assert message["type"].endswith(".complete")

        await app({"type": "lifespan", "state": {}}, receive, send)
        status, _, body = await reply(app, "/health", "GET")
        assert (status, json.loads(body)) == (503, {"status": "stopped"})

    asyncio.run(scenario())

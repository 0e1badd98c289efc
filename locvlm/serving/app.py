"""The web page and the JSON API over one assistant, as an ASGI application that any server can run.

GET /            the page
POST /api/answer a Query as JSON -> an Answer; see docs/serving.md
GET /api         the model's name and the limits
GET /health      200 while queries are answered
GET /metrics     for Prometheus

Errors are JSON: {"error": message}. 400: the query cannot be answered; 413: it is too large; 503 with Retry-After: no
room or no time, send it again. No answer carries a path or a trace.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from locvlm.errors import DataError
from locvlm.serving.batching import Batcher
from locvlm.serving.forms import Answer, Query
from locvlm.serving.limits import Busy, Limits, TooLarge
from locvlm.serving.metrics import Metrics
from locvlm.serving.page import render_page

log = logging.getLogger(__name__)

_RETRY_AFTER = 2  # seconds
_DECODERS = 2  # images decoded at a time: each may hold limits.pixels
_FORMS = ("question", "locate", "box")


class Engine(Protocol):
    """What the application needs of `locvlm.serving.assistant.Assistant`."""

    def prepare(self, query: Query) -> Any:
        """Decode and word a query. Raises DataError; TooLarge beyond the limits."""

    def answers(self, prepared: Sequence[Any]) -> Sequence[Answer]:
        """One answer to each of what `prepare` gave, in order."""


@dataclass(frozen=True, slots=True)
class About:
    """What the page says of the model: its name, its version in the registry ("" for none)."""

    model: str
    version: str = ""


def make_app(engine: Engine, limits: Limits, about: About) -> ASGIApp:
    """The application. Its worker thread ends with the server's lifespan."""
    service = _Service(engine, limits, about)
    routes = [
        Route("/", service.page),
        Route("/api", service.about),
        Route("/api/answer", service.answer, methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
    ]
    handlers = {HTTPException: _http_fault, Exception: _our_fault}
    inner = Starlette(routes=routes, lifespan=service.lifespan, exception_handlers=handlers)  # type: ignore[arg-type]
    return _with_headers(inner, service.policy)


class _Service:
    def __init__(self, engine: Engine, limits: Limits, about: About) -> None:
        self._engine, self._limits, self._about = engine, limits, about
        self._told = Metrics()
        self._batcher = Batcher(engine.answers, limits.batch, seen=self._told.batch)
        self._open = 0
        self._decoders = asyncio.Semaphore(_DECODERS)
        self._page, self.policy = render_page(about.model, about.version)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self._batcher.close)

    async def page(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html")

    async def about(self, request: Request) -> Response:
        return JSONResponse({**asdict(self._about), "limits": asdict(self._limits)})

    async def health(self, request: Request) -> Response:
        alive = self._batcher.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._told.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def answer(self, request: Request) -> Response:
        began = time.monotonic()
        form, status = "none", 500
        try:
            form, found = await self._within_limits(request)
            status = 200
            return JSONResponse(found.model_dump(exclude_none=True))
        except TooLarge as fault:
            status = 413
            return _refusal(status, str(fault))
        except (DataError, ClientDisconnect) as fault:
            status = 400
            return _refusal(status, str(fault))
        except Busy as fault:
            status = 503
            return _refusal(status, str(fault), {"retry-after": str(_RETRY_AFTER)})
        finally:
            seconds = time.monotonic() - began
            self._told.request(form, status, seconds)
            log.info("%s %d, %.0f ms", form, status, 1000 * seconds)  # not what was asked: that is the user's own

    async def _within_limits(self, request: Request) -> tuple[str, Answer]:
        if self._open >= self._limits.open_requests:
            raise Busy(f"the server is busy with {self._open} requests; send it again in {_RETRY_AFTER} seconds")
        self._open += 1
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await self._answer(request)
        except TimeoutError:
            raise Busy(f"no answer within {self._limits.seconds:g} seconds; send it again later") from None
        finally:
            self._open -= 1

    async def _answer(self, request: Request) -> tuple[str, Answer]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise DataError(f"reading the request: its content type is {kind[:80]!r}, application/json was needed")
        body = await _body(request, self._limits.body_bytes)
        async with self._decoders:
            query, prepared = await asyncio.to_thread(self._prepare, body)
        answer = await asyncio.wrap_future(self._batcher.submit(prepared))
        return next(name for name in _FORMS if getattr(query, name) is not None), answer

    def _prepare(self, body: bytes) -> tuple[Query, Any]:
        try:
            query = Query.model_validate_json(body)
        except ValidationError as fault:
            raise DataError(f"reading the request: {_first_fault(fault)}") from None
        return query, self._engine.prepare(query)


async def _body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises TooLarge when it is, or says that it is, larger than `limit` bytes."""
    declared = request.headers.get("content-length", "")
    too_large = TooLarge(f"reading the request: it is larger than {limit / 1e6:.1f} MB; send a smaller image")
    if declared.isdigit() and (len(declared) > 15 or int(declared) > limit):
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _first_fault(fault: ValidationError) -> str:
    first = fault.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))[:80]
    said = first["msg"].removeprefix("Value error, ")[:200]
    return f"{place}: {said}" if place else said


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


async def _http_fault(request: Request, fault: HTTPException) -> Response:
    return JSONResponse({"error": fault.detail}, fault.status_code, fault.headers)


async def _our_fault(request: Request, fault: Exception) -> Response:
    return _refusal(500, "an internal error; the server's log says more")


def _with_headers(app: ASGIApp, policy: str) -> ASGIApp:
    """The application with the security headers on everything that it sends, its own errors included."""
    headers = [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
        (b"cache-control", b"no-store"),
    ]

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        await app(scope, receive, sending)

    return wrapped

"""The parts of a service that any model has: the page, health, metrics, limits of requests, errors in one line.

Errors have the form that clients of OpenAI's interface read: {"error": {"message", "type", "param", "code"}}.
FastAPI and prometheus-client are imported where they are used: only serve.py needs them.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from experiments.parts.engine import Engine, Event, Full, Job
from train.files import shown
from train.run.flags import Count, Positive

PATIENCE = 5.0
"""Seconds for which the rest of a body that is too large is read and dropped, so that its sender reads the answer."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    queue: Count = 64
    """Requests that may wait; more are told to come again (429)."""
    timeout: Positive = 60.0
    """Seconds after which a request ends unfinished (504), its body's arrival included (408)."""
    megabytes: Positive = 10.0
    """Size of a request's body, at most, in units of 1,000,000 bytes."""
    tokens: Count = 1000
    """Tokens of a text, at most."""
    pixels: Count | None = None
    """Pixels of a picture, at most; 16 million if None, or 1 million where a net computes each of them."""


class Refusal(Exception):
    """An answer with a status of 400 or more: what is wrong, in one line, and the parameter that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, shown(message), param

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


class Gone(Exception):
    """The client has closed its connection."""


def refusal_of(error: BaseException) -> Refusal:
    """The answer to what an engine or a check of a request raised."""
    if isinstance(error, Refusal):
        return error
    message = " ".join(str(error).split()) or type(error).__name__
    return Refusal(400 if isinstance(error, ValueError) else 500, message)


class Metrics:
    """The figures of a service in Prometheus's text format."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "functree", "registry": self.registry}
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        ProcessCollector(registry=self.registry)
        Gauge("waiting", "Requests in the queue", **own).set_function(lambda: len(engine.waiting))
        Gauge("active", "Requests that are computed", **own).set_function(lambda: len(engine.active))
        self.requests = Counter("requests", "Answers", ["path", "status"], **own)
        self.tokens = Counter("tokens", "Tokens of prompts and of texts", ["kind"], **own)
        self.first = Histogram("first_token_seconds", "From a request to its first token", buckets=seconds, **own)
        self.seconds = Histogram("request_seconds", "From a request to the end of its answer", buckets=seconds, **own)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class Guard:
    """ASGI middleware: counts and times answers, adds headers, and refuses bodies that are too large or too slow."""

    def __init__(self, app: Callable, limits: Limits, metrics: Metrics, paths: Callable[[], set[str]]):
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begin, status = time.perf_counter(), 499  # of a client that has gone before its answer

        async def answer(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", []), *headers]}
            await send(message)

        try:
            body = await self._body(scope, receive)
            await self.app(scope, _after(body, receive), answer)
        except Refusal as refusal:
            await _send(refusal, answer)
        except Gone:
            pass
        except asyncio.CancelledError:  # by the server, which ends and waits no longer: no error to be logged
            if status == 499:
                await _send(Refusal(503, "the service is ending"), answer)
        finally:
            path = scope["path"] if scope["path"] in self.paths() else "other"  # no label for each address tried
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.observe(time.perf_counter() - begin)

    async def _body(self, scope: dict, receive: Callable) -> bytes:
        """The body of a request, in memory. Raises Refusal, Gone."""
        headers, most = dict(scope["headers"]), int(self.limits.megabytes * 1_000_000)
        refusal = Refusal(413, f"the request is larger than {self.limits.megabytes:g} MB")
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > most:
            if headers.get(b"expect", b"").lower() != b"100-continue":
                await _dropped(receive)
            raise refusal
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        break
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"the request's body took longer than {self.limits.timeout:g} s") from None
        parts.clear()
        await _dropped(receive)
        raise refusal


async def _dropped(receive: Callable) -> None:
    """Read the rest of a body and drop it, for a while: a sender that is cut off sees no answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


def _after(body: bytes, receive: Callable) -> Callable:
    """`receive` of a request whose body has been read."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> dict:
        return first.pop() if first else await receive()

    return read


async def _send(refusal: Refusal, send: Callable) -> None:
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def submitted(engine: Engine, content: Any) -> Job:
    """A job in the engine's queue. Raises Refusal: the queue is full."""
    try:
        return engine.submit(content)
    except Full:
        raise Refusal(429, f"{engine.capacity} requests are waiting already; try again later") from None


async def events(engine: Engine, job: Job, request: Any, seconds: float) -> AsyncIterator[list[Event]]:
    """The events of a job as they come, those that have come together at once, up to the last.

    Whatever ends this generator frees the job: its end, time, a client that goes.

    Raises: Refusal (504) after `seconds`, Gone; what the engine raised for this job.
    """

    def put(error: Exception) -> None:
        engine.cancel(job)  # here, too: a client may go before anybody reads
        job.events.put_nowait(Event(error, True))

    async def tell_when_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        put(Gone())

    late = Refusal(504, f"the answer took longer than {seconds:g} s")
    alarm, watch = job.loop.call_later(seconds, put, late), asyncio.create_task(tell_when_gone())
    try:
        while True:
            some = [await job.events.get()]
            while not some[-1].last and not job.events.empty():
                some.append(job.events.get_nowait())
            end = some[-1].value
            if isinstance(end, Exception):
                if some[:-1]:
                    yield some[:-1]
                raise end
            yield some
            if some[-1].last:
                return
    finally:
        alarm.cancel()
        watch.cancel()
        engine.cancel(job)


def object_of(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises Refusal."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        value = json.loads(body, parse_constant=constant)
    except RecursionError:
        raise Refusal(400, "the body is no JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is a JSON {type(value).__name__}; expected an object")
    return value


def application(engine: Engine, facts: dict[str, Any], limits: Limits, metrics: Metrics) -> Any:
    """The FastAPI application with what any model has; the routes of its kind are added to it.

    facts: "id" and "kind" of the model, and what the page needs of it.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException

    page, created = resources.files("experiments.parts").joinpath("serve.html").read_text("utf-8"), int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title=f"functree: {facts['id']}", lifespan=lifespan, docs_url=None, redoc_url=None)
    paths = {"/", "/health", "/metrics", "/v1/models", "/openapi.json"}
    app.state.engine, app.state.paths = engine, paths
    app.add_middleware(Guard, limits=limits, metrics=metrics, paths=lambda: paths)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> str:
        """The page to try the model."""
        return page

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are served, 503 otherwise."""
        state = {"status": "ok" if engine.alive else "ending", "id": facts["id"], "kind": facts["kind"]}
        state |= {"active": len(engine.active), "waiting": len(engine.waiting)}
        return JSONResponse(state, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        """Counters and times for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, and what its page needs to know."""
        entry = {"object": "model", "created": created, "owned_by": "functree", **facts}
        return {"object": "list", "data": [entry]}

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> JSONResponse:
        headers = {"Retry-After": "1"} if refusal.status == 429 else {}
        return JSONResponse(refusal.body, refusal.status, headers)

    @app.exception_handler(Gone)
    async def leave(request: Request, gone: Gone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def apologise(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(refusal_of(RuntimeError(type(error).__name__)).body, 500)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        known = ", ".join(sorted(paths))
        message = {404: f"'{request.url.path}' is unknown; expected one of {known}"}.get(error.status_code)
        message = message or f"{request.method} of '{request.url.path}': {error.detail}"
        return JSONResponse(Refusal(error.status_code, message).body, error.status_code, error.headers)

    return app

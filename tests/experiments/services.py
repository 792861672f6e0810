"""A service of experiments/serve.py in a thread of this process, and requests to it."""

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

from experiments import serve


class Service:
    """A service at a port of this machine."""

    def __init__(self, port: int, app: Any):
        self.port, self.app = port, app

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, path: str, body: Any = None, headers: dict | None = None, method: str | None = None):
        """(status, headers, body) of the answer; a body that is no bytes is sent as JSON."""
        connection = self.connect()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
        answer = connection.getresponse()
        out = answer.status, answer.headers, answer.read()
        connection.close()
        return out

    def json(self, path: str, body: Any = None, **options: Any) -> Any:
        """The JSON of an answer, which must succeed."""
        status, _, data = self.ask(path, body, **options)
        assert status == 200, data
        return json.loads(data)

    def text(self, **body: Any) -> str:
        return self.json("/v1/completions", body)["choices"][0]["text"]

    def refused(self, path: str, body: Any, **options: Any) -> tuple[int, str]:
        """(status, message) of an answer, which must be an error of one line."""
        status, _, data = self.ask(path, body, **options)
        error = json.loads(data)["error"]
        assert status >= 400 and set(error) == {"message", "type", "param", "code"}
        assert len(error["message"].splitlines()) == 1 and "Traceback" not in error["message"]
        return status, error["message"]


@contextlib.contextmanager
def running(**args: Any) -> Iterator[Service]:
    """The service of these arguments, at a free port, until the block ends."""
    import uvicorn

    app = serve.application(serve.Args(**args))
    with serve.listening("127.0.0.1", 0) as place:
        server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_level="critical"))
        thread = threading.Thread(target=server.run, args=([place],))
        thread.start()
        try:
            yield Service(place.getsockname()[1], app)
        finally:
            server.should_exit = True
            thread.join()


def events(data: bytes) -> list[Any]:
    """The values of server-sent events; the last may be [DONE]."""
    parts = data.decode().split("\n\n")
    assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
    return [part if part == "data: [DONE]" else json.loads(part[len("data: ") :]) for part in parts]

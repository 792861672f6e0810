"""A local server in place of the hosts that data and weights are downloaded from."""

import contextlib
import functools
import http.server
import io
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

PAGE = b"<!DOCTYPE html><html><body>Log in to the network of this hotel.</body></html>"


@contextlib.contextmanager
def serve(
    folder: Path, limit: int | None = None, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The URL, without a slash at its end, under which the files of a folder can be fetched.

    limit: bytes of each file after which the connection is closed.
    status: the answer to everything, with these headers and a page of HTML, as a proxy or a host without the file sends
        it.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send_head(self):
            if status is None:
                return super().send_head()
            self.send_response(status)
            page = {"Content-Length": str(len(PAGE)), "Content-Type": "text/html"}
            for name, value in (page | dict(headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            return io.BytesIO(PAGE)

        def copyfile(self, source, outputfile):
            outputfile.write(source.read(limit))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""Static web servers on loopback, as releases and packages are served: an open one, and one that wants a credential."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

AUTHORIZATION = "Bearer let-me-in"


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, without lines on standard error."""

    def log_message(self, *args: object) -> None:
        """Nothing."""


class Guarded(Quiet):
    """Only who sends ``AUTHORIZATION`` gets a file."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") == AUTHORIZATION:
            super().do_GET()
        else:
            self.send_error(401)


@contextlib.contextmanager
def serving(folder: Path, handler: type[SimpleHTTPRequestHandler] = Quiet) -> Iterator[str]:
    """The URL of ``folder``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

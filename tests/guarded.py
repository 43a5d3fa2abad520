"""A static server that wants a credential: of releases, as an operator puts one in front of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

AUTHORIZATION = "Bearer let-me-in"


class _Guarded(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.headers.get("Authorization") == AUTHORIZATION:
            super().do_GET()
        else:
            self.send_error(401)

    def log_message(self, *args: object) -> None:
        """No lines on standard error."""


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[str]:
    """The URL of ``folder`` on loopback; only who sends ``AUTHORIZATION`` gets a file."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Guarded, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

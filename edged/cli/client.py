"""The local API's client: HTTP over the daemon's unix socket, with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

Answer = dict[str, Any]
TIMEOUT_S = 120.0
STREAM_TIMEOUT_S = 10.0
"""The daemon gives a sign of life each second."""


class ApiError(Exception):
    """The daemon said no; the fields are those of the API's error."""

    def __init__(self, code: str, reason: str | None, detail: str, cure: str) -> None:
        super().__init__(detail)
        self.code = code
        self.reason = reason
        self.detail = detail
        self.cure = cure


class Unreachable(Exception):
    """Nobody answers at the socket, or the answer broke off."""

    def __init__(self, detail: str, cure: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.cure = cure


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("edged", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """One request, one connection. Every method raises :class:`ApiError` and :class:`Unreachable`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, *path: str, **query: object) -> Answer:
        return self._ask("GET", path, query, None)

    def post(self, *path: str, body: Answer | None = None) -> Answer:
        return self._ask("POST", path, {}, body or {})

    def patch(self, *path: str, body: Answer) -> Answer:
        return self._ask("PATCH", path, {}, body)

    def events(self, after: int | None = None, **query: object) -> Iterator[Answer | None]:
        """Events from number ``after`` on; None is a sign of life. Ends where the daemon ends."""
        connection = _Connection(self.path, STREAM_TIMEOUT_S)
        try:
            response = self._send(connection, "GET", _target(("events",), {"after": after, **query}), None)
            if response.status != 200:
                raise _error(response)
            while line := response.readline():
                yield json.loads(line) if line.strip() else None
        except (OSError, http.client.HTTPException) as exc:
            raise self._unreachable(exc) from exc
        finally:
            connection.close()

    def _ask(
        self, method: str, path: tuple[str, ...], query: dict[str, object], body: Answer | None
    ) -> Answer:
        connection = _Connection(self.path, TIMEOUT_S)
        try:
            response = self._send(connection, method, _target(path, query), body)
            if response.status != 200:
                raise _error(response)
            answer = json.loads(response.read())
            assert isinstance(answer, dict)
            return answer
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as exc:
            raise self._unreachable(exc) from exc
        finally:
            connection.close()

    def _send(
        self, connection: _Connection, method: str, target: str, body: Answer | None
    ) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, target, data, {"Content-Type": "application/json"} if data else {})
        return connection.getresponse()

    def _unreachable(self, error: Exception) -> Unreachable:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, PermissionError):
            cure = "become a member of the socket's group, usually edged"
        else:
            cure = "start it (systemctl start edged; journalctl -u edged says why it ended), or name its socket with --socket"
        return Unreachable(f"the daemon does not answer at {self.path}: {why}", cure)


def _target(path: tuple[str, ...], query: dict[str, object]) -> str:
    given = {key: value for key, value in query.items() if value is not None}
    target = "/v1/" + "/".join(quote(part, safe="") for part in path)
    return f"{target}?{urlencode(given)}" if given else target


def _error(response: http.client.HTTPResponse) -> Exception:
    try:
        found = json.loads(response.read())
        return ApiError(found["code"], found["reason"], found["detail"], found["cure"])
    except (ValueError, KeyError, TypeError):
        return ApiError(
            "failed", None, f"the daemon answered {response.status} {response.reason}", "see its log"
        )

"""The local API: HTTP and JSON on a unix socket; and the metrics endpoint, HTTP on a TCP port.

Translates requests to operations of ``control`` and errors to codes; decides nothing. Sockets listen from the start, but
the HTTP library is loaded by the first connection: a node that nobody asks does not pay for it.

Errors are ``{code, reason, detail, cure}``: 400 bad_request, 403 refused, 404 not_found, 409 conflict, 503 unavailable.
"""

from __future__ import annotations

import asyncio
import grp
import importlib
import json
import logging
import os
import pwd
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from edged.control import Control
from edged.deployments import BadRequest, Target
from edged.errors import EdgedError, Permanent, Reason, Refused, Transient
from edged.views import Json, explain

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger(__name__)

MOST_BODY_BYTES = 1024 * 1024
SOCKET_MODE = 0o660
_CLOSE_S = 2.0
_PEERCRED = struct.Struct("3i")

Handler: TypeAlias = "Callable[[web.Request], Awaitable[web.StreamResponse]]"


# -- sockets


def listen_unix(path: Path, group: str) -> tuple[socket.socket, str]:
    """A listening socket at ``path``, mode 0660, group ``group``; blocks. The text says why the group is not set, if so.

    Where systemd opened the socket (``edged.socket``), mode and group are in its unit: see :func:`adopt_unix`.

    The folder is made where it is missing. A socket that nobody answers at is replaced. Raises ``Permanent(STORAGE_FAILED)``
    where the path cannot be used, ``Permanent(CONFIG_INVALID)`` where something else is or answers there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _remove_stale(path)
        sock.bind(str(path))
        # nobody can connect before listen(), so there is no moment in which the mode is wrong
        path.chmod(SOCKET_MODE)
        problem = _give_to_group(path, group)
        sock.listen(64)
    except OSError as exc:
        sock.close()
        raise Permanent(Reason.STORAGE_FAILED, f"{path}: {exc.strerror or exc}; see api.socket") from exc
    except Permanent:
        sock.close()
        raise
    return sock, problem


def adopt_unix(sock: socket.socket, path: Path) -> str:
    """What is wrong with a socket that was opened for us, empty where it listens at ``path``.

    Raises ``Permanent(CONFIG_INVALID)`` where it is no listening unix socket.
    """
    if sock.family != socket.AF_UNIX or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise Permanent(
            Reason.CONFIG_INVALID,
            "what edged.socket hands over is no listening unix socket; see ListenStream=",
        )
    where = str(sock.getsockname())
    if where == str(path):
        return ""
    return f"edged.socket listens at {where}, api.socket says {path}; commands find only the latter: make them equal"


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Permanent(Reason.CONFIG_INVALID, f"{path} is there and is no socket; see api.socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
        else:
            raise Permanent(Reason.CONFIG_INVALID, f"another process answers at {path}; see api.socket")


def _give_to_group(path: Path, group: str) -> str:
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    except KeyError:
        return f"group {group!r} does not exist: only this user and root reach {path}"
    except PermissionError:
        return f"this user may not give {path} to group {group!r}: it must be a member"
    return ""


def listen_tcp(address: str) -> socket.socket:
    """A listening socket at ``HOST:PORT`` or ``[HOST]:PORT``. Raises ``Permanent(CONFIG_INVALID)``."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, int(port)))
        sock.listen(16)
    except (OSError, OverflowError) as exc:
        sock.close()
        text = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise Permanent(
            Reason.CONFIG_INVALID, f"cannot listen on {address}: {text}; see metrics.listen"
        ) from exc
    return sock


class Site:
    """An application on a listening socket. ``make`` is called when the first connection comes."""

    def __init__(self, sock: socket.socket, make: Callable[[], web.Application]) -> None:
        self._sock = sock
        self._make = make
        self._runner: web.AppRunner | None = None

    @property
    def loaded(self) -> bool:
        """Whether somebody has connected yet."""
        return self._runner is not None

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            await _readable(self._sock)
            web = await asyncio.to_thread(importlib.import_module, "aiohttp.web")
            self._runner = web.AppRunner(self._make(), access_log=None)
            await self._runner.setup()
            await web.SockSite(self._runner, self._sock).start()
            await asyncio.Event().wait()
        finally:
            if self._runner is not None:
                await _clean_up(self._runner)
            self._sock.close()


async def _clean_up(runner: web.AppRunner) -> None:
    """Bounded here: where the library takes the bound has changed between the versions that we support."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_S):
            await runner.cleanup()


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


# -- the metrics endpoint


def metrics_app(render: Callable[[], Awaitable[tuple[bytes, str]]]) -> web.Application:
    """``GET /metrics`` and nothing else; ``render`` returns body and content type."""
    from aiohttp import web

    async def scrape(_: web.Request) -> web.Response:
        body, content_type = await render()
        return web.Response(body=body, headers={"Content-Type": content_type})

    app = web.Application()
    app.router.add_get("/metrics", scrape, allow_head=False)
    return app


# -- the API


def api_app(control: Control) -> web.Application:
    """The application of the local API."""
    from aiohttp import web

    api = _Api(control)
    app = web.Application(client_max_size=MOST_BODY_BYTES, middlewares=[web.middleware(_guarded)])
    for method, path, handler in api.routes():
        app.router.add_route(method, f"/v1{path}", handler)
    app.on_shutdown.append(api.shut_down)
    return app


class _Api:
    """One method for each route."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._streams: set[asyncio.Task[None]] = set()

    def routes(self) -> list[tuple[str, str, Handler]]:
        return [
            ("GET", "/status", self.status),
            ("GET", "/devices", self.devices),
            ("GET", "/devices/{device}", self.device),
            ("GET", "/devices/{device}/twin", self.twin),
            ("PATCH", "/devices/{device}/twin", self.set_twin),
            ("POST", "/devices/{device}/probe", self.probe_device),
            ("POST", "/deployments", self.deploy),
            ("POST", "/plans", self.plan),
            ("GET", "/jobs", self.jobs),
            ("GET", "/jobs/{job}", self.job),
            ("POST", "/jobs/{job}/cancel", self.cancel),
            ("POST", "/jobs/{job}/retry", self.retry),
            ("GET", "/mappers", self.mappers),
            ("POST", "/mappers/{mapper}/probe", self.probe),
            ("POST", "/probes", self.probe_all),
            ("GET", "/trust", self.trust),
            ("POST", "/trust", self.init_trust),
            ("POST", "/trust/refresh", self.refresh_trust),
            ("GET", "/audit", self.audit),
            ("GET", "/audit/verify", self.verify_audit),
            ("GET", "/events", self.events),
        ]

    async def shut_down(self, _: web.Application) -> None:
        """End the event streams, which would never end by themselves."""
        for task in self._streams:
            task.cancel()

    async def status(self, _: web.Request) -> web.StreamResponse:
        return _json(await self._control.status())

    async def devices(self, _: web.Request) -> web.StreamResponse:
        return _json(await self._control.devices())

    async def device(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._control.device(request.match_info["device"]))

    async def twin(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._control.twin(request.match_info["device"]))

    async def set_twin(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        desired = body.get("desired")
        if not isinstance(desired, dict):
            raise BadRequest('expected {"desired": {"NAME": VALUE, ...}}')
        device = request.match_info["device"]
        return _json(await self._control.deployments.set_desired(device, desired, await _actor(request)))

    async def probe_device(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._control.probe_device(request.match_info["device"]))

    async def deploy(self, request: web.Request) -> web.StreamResponse:
        release, target = _wish(await _body(request))
        return _json(await self._control.deployments.deploy(release, target, await _actor(request)))

    async def plan(self, request: web.Request) -> web.StreamResponse:
        release, target = _wish(await _body(request))
        return _json(await self._control.deployments.plan(release, target))

    async def jobs(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        return _json(
            await self._control.jobs(
                query.get("device"), query.get("state"), _number(request, "limit", 100) or 100
            )
        )

    async def job(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._control.job(request.match_info["job"]))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._control.cancel_job(request.match_info["job"], await _actor(request)))

    async def retry(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._control.retry_job(request.match_info["job"], await _actor(request)))

    async def mappers(self, _: web.Request) -> web.StreamResponse:
        return _json(await self._control.mappers())

    async def probe(self, request: web.Request) -> web.StreamResponse:
        address = _text(await _body(request), "address")
        return _json(await self._control.probe(request.match_info["mapper"], address))

    async def probe_all(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._control.probe_all(_text(await _body(request), "address")))

    async def trust(self, _: web.Request) -> web.StreamResponse:
        return _json(await self._control.trust())

    async def init_trust(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        replace = body.get("replace") is True
        answer = await self._control.init_trust(_text(body, "root"), await _actor(request), replace=replace)
        return _json(answer)

    async def refresh_trust(self, _: web.Request) -> web.StreamResponse:
        return _json(await self._control.refresh_trust())

    async def audit(self, request: web.Request) -> web.StreamResponse:
        after, limit = _number(request, "after", None), _number(request, "limit", 100) or 100
        return _json(await self._control.audit(after, limit))

    async def verify_audit(self, _: web.Request) -> web.StreamResponse:
        return _json(await self._control.verify_audit())

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Newline-delimited JSON; an empty line is a sign of life."""
        from aiohttp import web

        query = request.query
        start = await self._control.events_from(_number(request, "after", None))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)

        async def pour() -> None:
            async for event in self._control.events(start, query.get("job"), query.get("device")):
                await response.write(_line(event))

        task = asyncio.create_task(pour())
        self._streams.add(task)
        try:
            await asyncio.wait([task])
        finally:
            self._streams.discard(task)
            task.cancel()
            with suppress(asyncio.CancelledError, ConnectionError, EdgedError):
                await task
        return response


def _line(event: Json | None) -> bytes:
    return b"\n" if event is None else json.dumps(event).encode() + b"\n"


def _json(answer: Json) -> web.Response:
    from aiohttp import web

    return web.json_response(answer)


async def _body(request: web.Request) -> Json:
    """The request's JSON object. Raises ``BadRequest``."""
    raw = await request.read()
    try:
        body = json.loads(raw or b"{}", parse_constant=_no_constant)
        # what Python's JSON reads beside JSON: 1e999 is infinite, and a lone surrogate has no encoding
        json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"the body is not JSON: {exc}") from exc
    if not isinstance(body, dict):
        raise BadRequest(f"the body is not a JSON object but {type(body).__name__}")
    return body


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _text(body: Json, key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{key}: found {value!r}; allowed: a text")
    return value


def _wish(body: Json) -> tuple[str, Target]:
    devices, model = body.get("devices", []), body.get("model")
    if not isinstance(devices, list) or not all(isinstance(item, str) for item in devices):
        raise BadRequest(f"devices: found {devices!r}; allowed: a list of device ids")
    if model is not None and not isinstance(model, str):
        raise BadRequest(f"model: found {model!r}; allowed: a text")
    return _text(body, "release"), Target(tuple(str(item) for item in devices), model)


def _number(request: web.Request, key: str, default: int | None) -> int | None:
    text = request.query.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise BadRequest(f"{key}: found {text!r}; allowed: a whole number, 0 or more")
    return int(text)


async def _actor(request: web.Request) -> str:
    """The name of the user at the other end of the socket (SO_PEERCRED, unix(7)), or ``uid N`` where it has none."""
    sock = request.transport.get_extra_info("socket") if request.transport else None
    if sock is None:
        return "operator"
    _, uid, _ = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    try:
        return (await asyncio.to_thread(pwd.getpwuid, uid)).pw_name
    except KeyError:
        return f"uid {uid}"


_NOT_FOUND = frozenset({Reason.DEVICE_UNKNOWN, Reason.JOB_UNKNOWN})
_UNAVAILABLE = frozenset({Reason.STORAGE_FAILED, Reason.DISK_FULL})


def code_of(error: EdgedError) -> tuple[int, str]:
    """HTTP status and code of an error."""
    if isinstance(error, BadRequest):
        return 400, "bad_request"
    if error.reason in _NOT_FOUND:
        return 404, "not_found"
    if error.reason is Reason.STALE_VERSION:
        return 409, "conflict"
    if isinstance(error, Refused):
        return 403, "refused"
    if isinstance(error, Transient) or error.reason in _UNAVAILABLE:
        return 503, "unavailable"
    return 409, "conflict"


async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    from aiohttp import web

    try:
        return await handler(request)
    except EdgedError as exc:
        status, code = code_of(exc)
        return web.json_response({"code": code, **explain(exc)}, status=status)
    except TimeoutError:
        error = Transient(Reason.NO_RESPONSE, "no answer in time")
        return web.json_response({"code": "unavailable", **explain(error)}, status=503)
    except web.HTTPRequestEntityTooLarge:
        return _web_error(400, "bad_request", f"the body is larger than {MOST_BODY_BYTES} bytes")
    except web.HTTPMethodNotAllowed as exc:
        return _web_error(
            400,
            "bad_request",
            f"{exc.method} is not allowed; allowed: {', '.join(sorted(exc.allowed_methods))}",
        )
    except web.HTTPNotFound:
        return _web_error(404, "not_found", f"no operation at {request.path}")


def _web_error(status: int, code: str, detail: str) -> web.Response:
    from aiohttp import web

    return web.json_response(
        {"code": code, "reason": Reason.REQUEST_INVALID.value, "detail": detail, "cure": ""}, status=status
    )

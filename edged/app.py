"""The composition root: builds every part, starts them in order, stops them in order. Nothing but the command imports it.

A start needs no network: the daemon is ready after its database is migrated and its plugins are loaded. Core tasks run in one
TaskGroup and fail fast; devices are supervised units. At the end the engine stops first, and its jobs keep their rows.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edged import __version__, credentials, logs, plugins
from edged.clock import SystemClock
from edged.config import Config, FetchSettings, TrustSettings
from edged.control import Control, Parts
from edged.core import Ground
from edged.core import build as build_core
from edged.deployments import Deployments
from edged.errors import EdgedError, Permanent, Reason
from edged.metrics import Metrics
from edged.notify import Notifier, inherited
from edged.reports import Reports
from edged.server import Site, adopt_unix, api_app, listen_tcp, listen_unix, metrics_app
from edged.store import jobs, outbox
from edged.store.artifacts import Artifacts
from edged.store.database import Store
from edged.store.node_key import NodeKey
from edged_firmware.fetch import BandwidthCap, Fetcher

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

STATE_MODE = 0o750
LOCK_NAME = "edged.pid"
API_SOCKET = "api"
"""``FileDescriptorName=`` of ``edged.socket``."""
HOUSEKEEPING_S = 3600.0
HUNG_S = 2.0
END_S = 10.0
"""So long may the end take. What a plugin holds up then is cut off, which is no worse than a power cut."""
KEPT_EVENTS = 1000
"""Events that stay for who watches without a cursor, also when every consumer has them."""

ExtraPlugins = Iterable[tuple[str, object]]


@dataclass(frozen=True, slots=True)
class Daemon:
    """All parts of one daemon, built and not yet running."""

    parts: Parts
    control: Control
    metrics: Metrics
    reports: Reports
    artifacts: Artifacts


def main(config: Config, extra_plugins: ExtraPlugins = ()) -> None:
    """Run the daemon until SIGTERM or SIGINT. Blocks.

    Raises ``Permanent`` or ``Transient`` where it cannot start: the state folder is in use or cannot be used.
    """
    logs.set_up(config.log)
    last = threading.Timer(END_S, _cut_off)
    last.daemon = True
    try:
        notifier, api = Notifier.from_environment(os.environ), inherited(os.environ).get(API_SOCKET)
        asyncio.run(serve(config, extra_plugins, notifier, api, last.start))
    finally:
        last.cancel()


def _cut_off() -> None:
    log.error("cut off: a plugin did not end", extra={"after_s": END_S})
    os._exit(1)


async def serve(
    config: Config,
    extra_plugins: ExtraPlugins,
    notifier: Notifier,
    api: socket.socket | None,
    stopping: Callable[[], None],
) -> None:
    """:func:`main` on a running loop. ``api``: the API's socket, where it is open already. ``stopping`` is called when
    the end begins.
    """
    async with build(config, extra_plugins) as daemon:
        await _run(daemon, notifier, api, stopping)


@asynccontextmanager
async def build(config: Config, extra_plugins: ExtraPlugins = ()) -> AsyncIterator[Daemon]:
    """Make all parts on the state folder, which is this process's alone until the block ends.

    ``extra_plugins``: (name, module or object) beside the installed ones. Errors as :func:`main`.
    """
    clock, folder = SystemClock(), config.node.state_dir
    with _owned(folder):
        metrics = Metrics(clock, {device.id: device.model for device in config.device})
        key = await asyncio.to_thread(NodeKey.load_or_create, folder)
        authorization, problem = await asyncio.to_thread(_authorization, config.trust)
        async with (
            Store.open(folder / "edged.db", clock, observe=metrics.committed) as store,
            _fetcher(config.fetch, metrics, authorization) as fetcher,
        ):
            artifacts = Artifacts(store, folder / "artifacts", config.storage.artifact_quota_bytes)
            await artifacts.recover()
            found = await asyncio.to_thread(plugins.discover, extra_plugins)
            ground = Ground(
                config=config,
                clock=clock,
                store=store,
                key=key,
                plugins=found,
                artifacts=artifacts,
                fetcher=fetcher,
                observer=metrics,
                authorization=authorization,
            )
            daemon = _assemble(ground, metrics)
            if problem:
                daemon.control.faults["credential"] = problem
                log.warning("credential not used", extra={"detail": problem})
            yield daemon


def _assemble(ground: Ground, metrics: Metrics) -> Daemon:
    core, config, store = build_core(ground), ground.config, ground.store
    parts = Parts(
        config=config,
        store=store,
        clock=ground.clock,
        plugins=ground.plugins,
        devices=core.devices,
        trust=core.trust,
        engine=core.engine,
        broadcast=core.broadcast,
        deployments=Deployments(
            config, store, core.devices, core.trust, core.images, core.engine, core.broadcast
        ),
        key=ground.key,
        started=ground.clock.now(),
    )
    return Daemon(parts, Control(parts), metrics, core.reports, ground.artifacts)


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold the state folder; one daemon at a time. Raises ``Permanent(STORAGE_FAILED)`` naming the other."""
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(STATE_MODE)
        # the file stays at the end, or two daemons could hold two files of one name
        fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except OSError as exc:
        raise Permanent(
            Reason.STORAGE_FAILED, f"{folder}: {exc.strerror}", "see node.state_dir and who owns that folder"
        ) from exc
    try:
        _lock(fd, folder)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, folder: Path) -> None:
    """The lock goes with the descriptor, however the process ends."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        raise Permanent(
            Reason.STORAGE_FAILED,
            f"another edged (pid {pid}) uses {folder}",
            "stop it, or set another node.state_dir",
        ) from exc
    os.truncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())


def _authorization(settings: TrustSettings) -> tuple[str, str]:
    """The header for the repository's server, and why it cannot be had: a node without it is of use offline."""
    if not settings.credential:
        return "", ""
    try:
        return credentials.read(os.environ, settings.credential), ""
    except Permanent as exc:
        return "", exc.detail


@asynccontextmanager
async def _fetcher(settings: FetchSettings, metrics: Metrics, authorization: str) -> AsyncIterator[Fetcher]:
    """The downloader. Its HTTP session, and the library behind it, come with the first download."""
    opened: list[aiohttp.ClientSession] = []

    def session() -> aiohttp.ClientSession:
        import aiohttp

        if not opened:
            headers = {"Authorization": authorization} if authorization else None
            opened.append(aiohttp.ClientSession(headers=headers))
        return opened[0]

    cap = BandwidthCap(settings.bandwidth_bytes_per_s) if settings.bandwidth_bytes_per_s else None
    try:
        yield Fetcher(session, cap, metrics.fetched, stall_s=settings.stall_s)
    finally:
        for one in opened:
            await one.close()


async def _run(
    daemon: Daemon, notifier: Notifier, api: socket.socket | None, stopping: Callable[[], None]
) -> None:
    """Everything at once until a signal; then the end, in order."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    parts, config = daemon.parts, daemon.parts.config
    sites = await _sites(daemon, api)
    writable = parts.store.read_only_reason is None
    async with asyncio.TaskGroup() as core:
        start = core.create_task
        served = [start(site.run(), name="site") for site in sites]
        service: list[asyncio.Task[Any]] = []
        units: list[asyncio.Task[Any]] = []
        engine: list[asyncio.Task[Any]] = []
        if writable:
            service.append(start(daemon.reports.run(), name="reports"))
            service.append(start(parts.trust.run(), name="trust"))
            service.append(start(_housekeeping(daemon), name="housekeeping"))
            units = [start(unit.run(), name=unit.unit.name) for unit in parts.devices.sessions.all()]
            engine = [start(parts.engine.run(), name="engine")]
        if notifier.watchdog_s is not None:
            service.append(
                start(_watchdog(daemon, notifier, notifier.watchdog_s, engine=writable), name="watchdog")
            )
        notifier.ready()
        service.append(start(_tell_status(daemon, notifier), name="status"))
        log.info(
            "ready", extra={"version": __version__, "devices": len(units), "socket": str(config.api.socket)}
        )
        await stop.wait()
        log.info("stopping")
        stopping()
        notifier.stopping()
        for tasks in (engine, units, served, service):
            await _ended(tasks)
    if writable:
        await daemon.reports.flush()
    if api is None:
        with suppress(OSError):
            config.api.socket.unlink()


async def _ended(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if not tasks:
        return
    _, hung = await asyncio.wait(tasks, timeout=HUNG_S)
    if hung:
        log.warning("waiting for the end", extra={"tasks": ", ".join(task.get_name() for task in hung)})
        await asyncio.wait(hung)


async def _sites(daemon: Daemon, api: socket.socket | None) -> list[Site]:
    """The API's socket, which must be there; the metrics' port, which may be missing."""
    config, control = daemon.parts.config, daemon.control
    if api is not None:
        sock, problem = api, adopt_unix(api, config.api.socket)
    else:
        sock, problem = await asyncio.to_thread(listen_unix, config.api.socket, config.api.group)
    if problem:
        control.faults["api"] = problem
        log.warning("the API's socket is not as it should be", extra={"detail": problem})
    sites = [Site(sock, lambda: api_app(control))]
    if config.metrics.listen:
        try:
            port = listen_tcp(config.metrics.listen)
        except Permanent as exc:
            control.faults["metrics"] = exc.detail
            log.warning("no metrics", extra={"reason": exc.reason.value, "detail": exc.detail})
        else:
            sites.append(Site(port, lambda: metrics_app(lambda: _render(daemon))))
    return sites


async def _render(daemon: Daemon) -> tuple[bytes, str]:
    snapshot = await daemon.control.snapshot()
    return await asyncio.to_thread(daemon.metrics.render, snapshot)


def _status_line(daemon: Daemon) -> str:
    parts = daemon.parts
    if parts.store.read_only_reason is not None:
        return f"read-only: {parts.store.read_only_reason}"
    if parts.trust.failure is not None and parts.trust.failure.reason is Reason.TRUST_MISSING:
        return "unprovisioned: no root of trust"
    if not parts.config.device:
        return "unprovisioned: no device is configured"
    left_out = len(parts.devices.left_out)
    return f"{len(parts.config.device) - left_out} devices" + (f", {left_out} left out" if left_out else "")


async def _tell_status(daemon: Daemon, notifier: Notifier) -> None:
    """Keep the line of ``systemctl status`` true: of all that it says only the trust changes in the life of a daemon."""
    while True:
        notifier.status(_status_line(daemon))
        await daemon.parts.trust.changed()


async def _watchdog(daemon: Daemon, notifier: Notifier, period_s: float, *, engine: bool) -> None:
    """Tell systemd that the daemon lives, each time after a round trip through the store's thread and the engine."""
    while True:
        await daemon.parts.store.ping()
        if engine:
            await daemon.parts.engine.ping()
        notifier.watchdog()
        await daemon.parts.clock.sleep(period_s / 3)


async def _housekeeping(daemon: Daemon) -> None:
    """Forget old jobs and events, and images that nobody needs."""
    store, clock, storage = daemon.parts.store, daemon.parts.clock, daemon.parts.config.storage
    while True:
        before = clock.now() - timedelta(days=storage.keep_jobs_days)
        keep = min(KEPT_EVENTS, storage.outbox_rows)
        try:
            await store.write(lambda tx, before=before: jobs.prune(tx, before))  # type: ignore[misc]
            await store.write(lambda tx, keep=keep: outbox.trim(tx, storage.outbox_rows, keep))  # type: ignore[misc]
            await daemon.artifacts.collect()
        except EdgedError as exc:
            log.warning("housekeeping failed", extra={"reason": exc.reason.value, "detail": exc.detail})
        await clock.sleep(HOUSEKEEPING_S)

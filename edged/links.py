"""The pool of shared wires: opened by the first user, closed after the last, exclusive where the wire is."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from edged import credentials
from edged.api import Env, Link, LinkSpec
from edged.clock import Clock, SystemClock
from edged.errors import EdgedError, Permanent, Reason, Transient, meaning

log = logging.getLogger("edged.mapper")


@dataclass(slots=True)
class _Shared:
    """One open wire. ``holder`` is the task that opened it and will close it: a context manager must be left by the
    task that entered it, and the first user may be gone long before the last."""

    opened: asyncio.Future[Link]
    holder: asyncio.Task[None] | None = None
    users: list[str] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    linger_s: float = 0.0
    lingers: asyncio.TimerHandle | None = None


def _not_counted(source: str, event: str) -> None:
    return None


class Memory(Protocol):
    """Where what :meth:`edged.api.Env.remember` is given lies, by user of links and key. Errors as there."""

    async def recall(self, user: str, key: str) -> str | None: ...

    async def remember(self, user: str, key: str, text: str) -> None: ...


class ShortMemory:
    """As long as its pool lives: for tools and trials, which have no database."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], str] = {}

    async def recall(self, user: str, key: str) -> str | None:
        return self._kept.get((user, key))

    async def remember(self, user: str, key: str, text: str) -> None:
        self._kept[user, key] = text


class InUse(Transient):
    """An exclusive wire is used by somebody of this node already. Reason ``LINK_BUSY``."""

    def __init__(self, address: str, user: str) -> None:
        super().__init__(Reason.LINK_BUSY, f"{address} is in use by {user}")
        self.user = user


class LinkPool:
    """All open wires of this daemon, by address.

    ``configs``: what each address's ``[[link]]`` table was parsed to, or why it could not be. ``count`` is told who counted
    which event. ``clock`` has the time of day for mappers; None: the system's. ``memory`` keeps what they remember; None: as
    long as the pool lives.
    """

    def __init__(
        self,
        specs: Mapping[str, LinkSpec],
        configs: Mapping[str, object | Permanent] | None = None,
        count: Callable[[str, str], None] = _not_counted,
        clock: Clock | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._specs = specs
        self._configs = configs or {}
        self.count = count
        self.now = (clock or SystemClock()).now
        self.memory = memory or ShortMemory()
        self._shared: dict[str, _Shared] = {}
        self._closing: dict[str, asyncio.Task[None]] = {}

    def users(self) -> dict[str, tuple[str, ...]]:
        """Who uses which address now."""
        return {address: tuple(shared.users) for address, shared in self._shared.items() if shared.users}

    @asynccontextmanager
    async def use(self, address: str, user: str) -> AsyncIterator[Link]:
        """Use the wire at ``address`` as ``user`` (for messages).

        Raises :class:`InUse`, whatever opening it raises, or ``Permanent(UNSUPPORTED)``.
        """
        shared = self._shared.get(address) or self._open(address)
        shared.users.append(user)
        if shared.lingers is not None:
            shared.lingers.cancel()
        try:
            link = await asyncio.shield(shared.opened)
            if link.exclusive and len(shared.users) > 1:
                raise InUse(address, shared.users[0])
            yield link
        finally:
            shared.users.remove(user)
            if not shared.users:
                await self._leave(address, shared)

    def _open(self, address: str) -> _Shared:
        scheme, _, rest = address.partition(":")
        spec = self._specs.get(scheme)
        if spec is None:
            known = ", ".join(sorted(self._specs)) or "none"
            raise Permanent(Reason.UNSUPPORTED, f"no link for {scheme!r} in {address!r}; links: {known}")
        env = self._link_env(spec, address, rest)
        shared = _Shared(asyncio.get_running_loop().create_future(), linger_s=spec.linger_s)
        shared.holder = asyncio.create_task(
            _hold(spec, rest, env, shared, self._closing.get(address)), name=f"link {address}"
        )
        self._shared[address] = shared
        return shared

    def _link_env(self, spec: LinkSpec, address: str, rest: str) -> DeviceEnv:
        """A wire's own environment: it outlives its first user. Raises ``Permanent(CONFIG_INVALID)``."""
        config = self._configs.get(address)
        if isinstance(config, Permanent):
            raise config
        if address not in self._configs:
            config = link_config(spec, rest, {})
        return DeviceEnv(address, self, _Lines(log, {"link": address}), config)

    async def _leave(self, address: str, shared: _Shared) -> None:
        """Nobody uses the wire: close it, at once or soon."""
        holder = shared.holder
        sound = shared.opened.done() and not shared.opened.cancelled() and shared.opened.exception() is None
        if shared.linger_s and sound and holder is not None and not holder.done():
            loop = asyncio.get_running_loop()
            shared.lingers = loop.call_later(shared.linger_s, self._begin_to_close, address, shared)
            return
        self._begin_to_close(address, shared)
        if holder is not None:
            await asyncio.wait([holder])

    def _begin_to_close(self, address: str, shared: _Shared) -> None:
        if self._shared.get(address) is shared:
            del self._shared[address]
        shared.done.set()
        holder = shared.holder
        if holder is None:
            return
        if not shared.opened.done():
            # nobody waits for it any more, and it may never come
            holder.cancel()
        self._closing[address] = holder
        holder.add_done_callback(lambda task: self._closed(address, task))

    def _closed(self, address: str, holder: asyncio.Task[None]) -> None:
        if self._closing.get(address) is holder:
            del self._closing[address]


async def _hold(
    spec: LinkSpec, rest: str, env: Env, shared: _Shared, before: asyncio.Task[None] | None
) -> None:
    """``before`` holds the same wire and is closing it: only then may it be opened again, whoever waits for that."""
    if before is not None:
        await asyncio.wait([before])
    try:
        async with spec.open(rest, env) as link:
            if not shared.opened.done():
                shared.opened.set_result(link)
            await shared.done.wait()
    except (Exception, SystemExit, asyncio.CancelledError) as exc:  # noqa: BLE001 - the plugin boundary
        # where it was cancelled, nobody listens any more
        _fail(shared, meaning(exc))


def _fail(shared: _Shared, error: EdgedError) -> None:
    if not shared.opened.done():
        shared.opened.set_exception(error)
        shared.opened.exception()  # a user that was cancelled meanwhile does not ask for it


def link_config(spec: LinkSpec, rest: str, table: Mapping[str, object]) -> object:
    """What the plugin makes of the own table of the wire ``SCHEME:REST``. Raises ``Permanent``: ``CONFIG_INVALID``, a fault in
    each line, or ``PLUGIN_FAILED``."""
    try:
        return spec.parse_config(table, rest)
    except ValueError as exc:
        faults = str(exc).splitlines() or [repr(exc)]
        raise Permanent(Reason.CONFIG_INVALID, "\n".join(f"config.{line}" for line in faults)) from exc
    except Exception as exc:
        raise meaning(exc) from exc


class _Lines(logging.LoggerAdapter[logging.Logger]):
    """Log lines that say whose they are, beside what the caller says in ``extra``, which the plain adapter throws away."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, {**kwargs, "extra": {**(kwargs.get("extra") or {}), **(self.extra or {})}}


@dataclass(frozen=True, slots=True)
class DeviceEnv:
    """The ``Env`` of one user of links: a device's mapper, a probe, or the wire itself."""

    user: str
    pool: LinkPool
    log: logging.LoggerAdapter[logging.Logger]
    config: object = None

    def link(self, address: str) -> AbstractAsyncContextManager[Link]:
        return self.pool.use(address, self.user)

    def credential_file(self, name: str) -> Path:
        return credentials.path(os.environ, name)

    def now(self) -> datetime:
        return self.pool.now()

    def count(self, event: str) -> None:
        self.pool.count(self.user, event)

    async def recall(self, key: str) -> str | None:
        return await self.pool.memory.recall(self.user, key)

    async def remember(self, key: str, text: str) -> None:
        await self.pool.memory.remember(self.user, key, text)

    def away(self, detail: str) -> AbstractContextManager[None]:
        return nullcontext()

    async def credential(self, name: str) -> str:
        return await asyncio.to_thread(credentials.read, os.environ, name)


def device_env(user: str, pool: LinkPool) -> DeviceEnv:
    """An environment whose log lines carry the device's id."""
    return DeviceEnv(user, pool, _Lines(log, {"device": user}))

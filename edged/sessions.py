"""Who owns a session: one supervised unit per device opens it, reads its reports, and lends it to one borrower at a time.

Knows no protocol and no job. The session is opened and closed in the unit's own task.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from edged.api import Device, Env, Link, MapperSpec, Reported, Session
from edged.clock import Clock
from edged.errors import EdgedError, Permanent, Reason, Transient, meaning
from edged.supervisor import RestartPolicy, Unit, is_cancelled

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

LET_GO_S = 5.0
"""So long may a plugin's call take to end when it is cancelled. It is left behind then, and the session is closed under it:
that is how a call that does not listen is stopped."""


async def translated(call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a plugin; what it should not raise becomes ``Permanent(PLUGIN_FAILED)``."""
    try:
        return await call(*args, **kwargs)
    except (Exception, SystemExit, asyncio.CancelledError) as exc:
        known = meaning(exc)
        if known is exc or (isinstance(exc, asyncio.CancelledError) and is_cancelled()):
            raise
        raise known from exc


async def plugin_call(
    limit_s: float, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    """:func:`translated`, for ``limit_s`` seconds at most: ``Transient(NO_RESPONSE)`` then.

    In a task of its own, so that nothing that a plugin makes of a cancellation reaches the caller.
    """
    task = asyncio.create_task(translated(call, *args, **kwargs))
    try:
        await asyncio.wait([task], timeout=limit_s)
        if not task.done():
            name = getattr(call, "__name__", "call")
            raise Transient(Reason.NO_RESPONSE, f"{name}() took longer than {limit_s:g} s")
        return task.result()
    finally:
        await let_go(task)


async def let_go(task: asyncio.Task[T]) -> bool:
    """Cancel a plugin's call and wait for its end; False where it does not end, and was left behind.

    An error that the task ended with is its reader's to see, not ours.
    """
    task.add_done_callback(_looked_at)
    task.cancel()
    await asyncio.wait([task], timeout=LET_GO_S)
    if not task.done():
        log.error("a plugin's call does not end when it is cancelled", extra={"call": repr(task.get_coro())})
        return False
    return True


def _looked_at(task: asyncio.Task[T]) -> None:
    """Also where the wait for the task was itself cut short: asyncio complains of errors that nobody looked at."""
    if not task.cancelled():
        task.exception()


def expect(kind: type[T], answer: object) -> T:
    """A plugin's answer, where it is a ``kind``. Raises ``Permanent(PLUGIN_FAILED)``."""
    if not isinstance(answer, kind):
        raise Permanent(Reason.PLUGIN_FAILED, f"expected {kind.__name__}, found {type(answer).__name__}")
    return answer


class _UnitEnv:
    """A device's environment, whose ``away`` its unit hears."""

    config: object = None

    def __init__(self, env: Env, away: Callable[[str], AbstractContextManager[None]]) -> None:
        self._env = env
        self.away = away

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        return self._env.log

    def link(self, address: str) -> AbstractAsyncContextManager[Link]:
        return self._env.link(address)

    async def credential(self, name: str) -> str:
        return await self._env.credential(name)

    def credential_file(self, name: str) -> Path:
        return self._env.credential_file(name)

    def now(self) -> datetime:
        return self._env.now()

    def count(self, event: str) -> None:
        self._env.count(event)

    async def recall(self, key: str) -> str | None:
        return await self._env.recall(key)

    async def remember(self, key: str, text: str) -> None:
        await self._env.remember(key, text)


@dataclass(eq=False, slots=True)
class _Loan:
    """A borrower: ``granted`` brings the session, ``returned`` says whether the wire is in a known state."""

    granted: asyncio.Future[Session]
    returned: asyncio.Future[bool]


@dataclass(eq=False, slots=True)
class Lease:
    """The session, lent. Set ``intact`` to False where the state of the wire is unknown: the unit then connects anew."""

    session: Session
    intact: bool = True


class DeviceUnit:
    """The owner of one device's session.

    ``report`` stores what the device says; ``attached`` is awaited with each fresh session, before reports are read.
    ``call_s`` bounds connecting and closing.
    """

    def __init__(
        self,
        device: Device,
        spec: MapperSpec,
        env: Env,
        report: Callable[[Reported], Awaitable[None]],
        attached: Callable[[Session], Awaitable[None]],
        clock: Clock,
        *,
        watch: bool = True,
        policy: RestartPolicy | None = None,
        call_s: float = 120.0,
    ) -> None:
        self.device = device
        self.spec = spec
        self.unit = Unit(f"device {device.id}", self._body, policy or RestartPolicy(), clock)
        self._env = _UnitEnv(env, self._away)
        self._report = report
        self._attached = attached
        self._watch = watch
        self._call_s = call_s
        self._loans: deque[_Loan] = deque()
        self._wanted = asyncio.Event()
        self._refresh = False
        self._absent: Transient | None = None
        self._connecting: asyncio.Timeout | None = None

    async def run(self) -> None:
        """The unit's task; see :meth:`edged.supervisor.Unit.run`."""
        await self.unit.run()

    def refresh(self) -> None:
        """Something that the device should take has changed: call ``attached`` again. One that is away gets it when it
        is back."""
        if self._absent is None:
            self._refresh = True
            self._wanted.set()

    @contextmanager
    def _away(self, detail: str) -> Iterator[None]:
        """See :meth:`edged.api.Env.away`."""
        self._absent = Transient(Reason.DEVICE_ABSENT, detail)
        self._turn_away(self._absent)
        self.unit.absent(detail)
        if self._connecting is not None:
            self._connecting.reschedule(None)
        try:
            yield
        finally:
            self._absent = None
            if self._connecting is not None:
                self._connecting.reschedule(asyncio.get_running_loop().time() + self._call_s)
        self.unit.running()
        self.refresh()

    @asynccontextmanager
    async def lease(self, timeout_s: float) -> AsyncIterator[Lease]:
        """Have the session to yourself.

        Raises ``Transient(LINK_BUSY)`` after ``timeout_s``, or what connecting raised. A body that ends with an error
        makes the unit open a fresh session afterwards.
        """
        if self._absent is not None:
            raise Transient(self._absent.reason, self._absent.detail)
        loop = asyncio.get_running_loop()
        loan = _Loan(loop.create_future(), loop.create_future())
        self._loans.append(loan)
        self._wanted.set()
        self.unit.wake()
        intact = False
        try:
            lease = Lease(await self._granted(loan, timeout_s))
            yield lease
            intact = lease.intact
        finally:
            if loan in self._loans:
                self._loans.remove(loan)
            loan.granted.cancel()
            if not loan.returned.done():
                loan.returned.set_result(intact)

    async def _granted(self, loan: _Loan, timeout_s: float) -> Session:
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(loan.granted)
        except TimeoutError:
            raise Transient(
                Reason.LINK_BUSY, f"{self.device.id} was not free within {timeout_s:g} s"
            ) from None

    async def _body(self, unit: Unit) -> None:
        if not self._watch:
            await self._wanted.wait()
        try:
            async with self._session() as session:
                unit.running()
                self._refresh = True
                await self._serve(session)
        except (Exception, SystemExit, asyncio.CancelledError) as exc:
            known = meaning(exc)
            if not is_cancelled():
                self._turn_away(known)
            if known is exc or is_cancelled():
                raise
            raise known from exc

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[Session]:
        manager = self.spec.connect(self.device, self._env)
        async with self._limited("connecting") as limit:
            self._connecting = limit
            try:
                session = await manager.__aenter__()
            finally:
                self._connecting = None
        try:
            yield session
        except BaseException as exc:
            await self._close(manager, exc)
            raise
        await self._close(manager, None)

    async def _close(self, manager: AbstractAsyncContextManager[Session], exc: BaseException | None) -> None:
        async with self._limited("closing"):
            # what it returns does not matter: a mapper must not hide an error or a cancellation
            await manager.__aexit__(type(exc) if exc else None, exc, exc.__traceback__ if exc else None)

    @asynccontextmanager
    async def _limited(self, what: str) -> AsyncIterator[asyncio.Timeout]:
        limit = asyncio.timeout(self._call_s)
        try:
            async with limit:
                yield limit
        except TimeoutError as exc:
            if not limit.expired():
                raise
            text = f"{what} {self.device.id} took longer than {self._call_s:g} s"
            raise Transient(Reason.NO_RESPONSE, text) from exc

    def _turn_away(self, error: EdgedError) -> None:
        while self._loans:
            loan = self._loans.popleft()
            if not loan.granted.done():
                loan.granted.set_exception(error)
                loan.granted.exception()
        self._wanted.clear()

    async def _serve(self, session: Session) -> None:
        """Lend and report in turn; returns where a fresh session is due."""
        reports: asyncio.Task[None] | None = None
        try:
            while True:
                if (self._refresh or self._loans) and reports is not None and not session.traits.concurrent:
                    if not await let_go(reports):
                        raise Permanent(Reason.PLUGIN_FAILED, "reports() does not end when it is cancelled")
                    reports = None
                if self._refresh and not self._loans:
                    self._refresh = False
                    await self._attached(session)
                if self._loans:
                    if not await self._lend(session, self._loans.popleft()):
                        return
                elif not self._watch:
                    self._wanted.clear()
                    return
                else:
                    reports = reports or asyncio.create_task(self._read_reports(session))
                    await self._until_wanted(reports)
        finally:
            if reports is not None:
                await let_go(reports)

    async def _lend(self, session: Session, loan: _Loan) -> bool:
        if loan.granted.done():
            return True
        loan.granted.set_result(session)
        return await loan.returned

    async def _until_wanted(self, reports: asyncio.Task[None]) -> None:
        if not self._loans and not self._refresh:
            self._wanted.clear()
        wanted = asyncio.create_task(self._wanted.wait())
        try:
            await asyncio.wait([wanted, reports], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await let_go(wanted)
        if reports.done():
            reports.result()

    async def _read_reports(self, session: Session) -> None:
        reports = session.reports()
        try:
            async for reported in reports:
                await self._report(reported)
                # one that never waits would keep the loop for itself
                await asyncio.sleep(0)
        finally:
            if isinstance(reports, AsyncGenerator):
                await reports.aclose()
        raise Transient(Reason.LINK_LOST, f"{self.device.id} stopped reporting")


class Sessions:
    """All device units, by device id."""

    def __init__(self, units: Mapping[str, DeviceUnit]) -> None:
        self._units = dict(units)

    def __getitem__(self, device: str) -> DeviceUnit:
        try:
            return self._units[device]
        except KeyError:
            known = ", ".join(sorted(self._units)) or "none is configured"
            raise Permanent(Reason.DEVICE_UNKNOWN, f"no device {device!r}; devices: {known}") from None

    def all(self) -> tuple[DeviceUnit, ...]:
        return tuple(self._units.values())

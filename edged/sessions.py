"""Who owns a session: one supervised unit per device opens it, reads its reports, and lends it to one borrower at a time.

Knows no protocol and no job. The session is opened and closed in the unit's own task.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from edged.api import Device, Env, MapperSpec, Reported, Session
from edged.clock import Clock
from edged.errors import EdgedError, Permanent, Reason, Transient
from edged.supervisor import RestartPolicy, Unit

T = TypeVar("T")


async def plugin_call(call: Awaitable[T]) -> T:
    """Await a plugin's call; what it should not raise becomes ``Permanent(PLUGIN_FAILED)``."""
    try:
        return await call
    except EdgedError:
        raise
    except Exception as exc:
        raise Permanent(Reason.PLUGIN_FAILED, repr(exc)) from exc


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
    ) -> None:
        self.device = device
        self.spec = spec
        self.unit = Unit(f"device {device.id}", self._body, policy or RestartPolicy(), clock)
        self._env = env
        self._report = report
        self._attached = attached
        self._watch = watch
        self._loans: deque[_Loan] = deque()
        self._wanted = asyncio.Event()
        self._refresh = False

    async def run(self) -> None:
        """The unit's task; see :meth:`edged.supervisor.Unit.run`."""
        await self.unit.run()

    def refresh(self) -> None:
        """Something that the device should take has changed: call ``attached`` again."""
        self._refresh = True
        self._wanted.set()

    @asynccontextmanager
    async def lease(self, timeout_s: float) -> AsyncIterator[Lease]:
        """Have the session to yourself.

        Raises ``Transient(LINK_BUSY)`` after ``timeout_s``, or what connecting raised. A body that ends with an error
        makes the unit open a fresh session afterwards.
        """
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
            async with self.spec.connect(self.device, self._env) as session:
                unit.running()
                self._refresh = True
                await self._serve(session)
        except EdgedError as exc:
            self._turn_away(exc)
            raise
        except Exception as exc:
            self._turn_away(Permanent(Reason.PLUGIN_FAILED, f"{self.spec.name}: {exc!r}"))
            raise

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
                if self._refresh and not self._loans:
                    self._refresh = False
                    await self._attached(session)
                if self._loans:
                    if reports is not None and not session.traits.concurrent:
                        await _stop(reports)
                        reports = None
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
                await _stop(reports)

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
            await _stop(wanted)
        if reports.done():
            reports.result()

    async def _read_reports(self, session: Session) -> None:
        async for reported in session.reports():
            await self._report(reported)
        raise Transient(Reason.LINK_LOST, f"{self.device.id} stopped reporting")


async def _stop(task: asyncio.Task[T]) -> None:
    """Cancel and wait; an error that the task ended with is its reader's to see, not ours."""
    task.cancel()
    await asyncio.wait([task])


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

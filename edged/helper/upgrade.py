"""An upgrade, phase by phase; and what is told about it.

Each phase is written down before it begins, and each can be begun again: a helper that was cut off goes on with the phase that
it finds. Beside the package itself nothing is believed: what is installed is asked of dpkg, whether it is well of systemd.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from edged.helper import protocol
from edged.helper.apt import Apt, why_not_fetched
from edged.helper.commands import Ended, run
from edged.helper.protocol import CURES, Refusal, Request, Verb, Why
from edged.helper.state import Operation, Phase, State
from edged.helper.units import Systemd
from edged_firmware.errors import EdgedError, Reason

log = logging.getLogger(__name__)

T = TypeVar("T")
MOST_LIVES = 4
RECOVER_S = 1800.0
MOST_EVENTS = 64
POLL_S = 2.0
Listener = asyncio.Queue[bytes]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an upgrade ended. ``reverted``: what ran before it runs again."""

    verb: str
    from_version: str
    to_version: str
    result: str
    reason: str = ""
    detail: str = ""
    reverted: bool = False

    @property
    def cure(self) -> str:
        return CURES[Why(self.reason)] if self.reason else ""


class _Leaving(Exception):
    """The helper is told to end: what is not finished is gone on with by the next one."""


class Upgrades:
    """At most one upgrade at a time on one package.

    ``start_s``: so long may the daemon take to be up; ``health_s``: so long must it then stay up.
    """

    def __init__(
        self,
        state: State,
        apt: Apt,
        systemd: Systemd,
        *,
        recover: str = "/usr/libexec/edged-recover",
        start_s: float = 180.0,
        health_s: float = 60.0,
    ) -> None:
        self._state = state
        self._apt = apt
        self._systemd = systemd
        self._recover = recover
        self._start_s = start_s
        self._health_s = health_s
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._listeners: set[Listener] = set()
        self._steps: dict[Phase, Callable[[Operation], Awaitable[Operation | Outcome]]] = {
            Phase.PREPARING: self._prepare,
            Phase.INSTALLING: self._install,
            Phase.WATCHING: self._watch,
            Phase.REVERTING: self._revert,
        }

    @property
    def busy(self) -> bool:
        """Whether an upgrade is at work."""
        return self._task is not None and not self._task.done()

    # -- from outside

    async def resume(self) -> None:
        """Go on with an upgrade that a cut left; returns at once."""
        operation = await asyncio.to_thread(self._state.operation)
        if operation is not None:
            self._start(self._go_on(replace(operation, lives=operation.lives + 1)))

    async def begin(self, request: Request) -> Listener:
        """Begin an upgrade or a rollback; what is put into the queue are the lines to send, up to one with ``result``.

        Raises :class:`Refusal` (``busy``, ``stopping``).
        """
        if self._stop.is_set():
            raise Refusal(Why.STOPPING, "the helper is about to end")
        if self.busy:
            raise Refusal(Why.BUSY, "another upgrade is at work")
        listener: Listener = asyncio.Queue(MOST_EVENTS)
        self._listeners.add(listener)
        self._start(self._first(request))
        return listener

    def forget(self, listener: Listener) -> None:
        """Nobody listens there any more."""
        self._listeners.discard(listener)

    def may_reboot(self) -> None:
        """Raises :class:`Refusal` (``busy``, ``stopping``) where the node must not be restarted now."""
        if self._stop.is_set():
            raise Refusal(Why.STOPPING, "the helper is about to end")
        if self.busy:
            raise Refusal(Why.BUSY, "an upgrade is at work")

    async def reboot(self) -> None:
        """Restart the node. Raises :class:`Refusal` (``reboot_failed``)."""
        ended = await self._systemd.reboot()
        if not ended.ok:
            raise Refusal(Why.REBOOT_FAILED, ended.gist)

    async def status(self) -> dict[str, Any]:
        """Everything that is known about the package and its upgrades. ``at_work``: an apt or dpkg, perhaps the helper's."""
        installed = await self._apt.installed()
        state = self._state
        operation, outcome = await asyncio.to_thread(lambda: (state.operation(), state.outcome()))
        at_work = await asyncio.to_thread(self._apt.locked)
        return {
            "version": installed.version,
            "dpkg": installed.state,
            "whole": installed.whole,
            "previous": state.previous(),
            "kept": state.kept(),
            "at_work": at_work,
            "interrupted": state.marked() and not self.busy and not at_work,
            "operation": asdict(operation) if operation else None,
            "outcome": outcome,
            "recovered": state.recovered() or None,
        }

    async def stop(self) -> None:
        """End soon: nothing new begins, a phase that changes the package is waited for, any other is left."""
        self._stop.set()
        if self._task is not None:
            await self._task

    # -- the loop around the phases

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.create_task(work, name="upgrade")
        self._task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        """A bug ends the helper, with its traceback, and systemd starts the next; whoever listens must not wait for ever."""
        if not task.cancelled() and task.exception() is not None:
            self._tell(protocol.failed(Why.STORAGE_FAILED, f"a fault in the helper: {task.exception()!r}"))

    async def _first(self, request: Request) -> None:
        now, before = (await self._apt.installed()).version, await asyncio.to_thread(self._state.previous)
        to = request.version if request.verb is Verb.UPGRADE else before
        await self._run(Operation(request.verb.value, now, to, previous=before))

    async def _run(self, operation: Operation) -> None:
        now = operation
        with suppress(_Leaving):
            while True:
                after = await self._step(now)
                if isinstance(after, Outcome):
                    await self._finish(after)
                    return
                now = after

    async def _step(self, operation: Operation) -> Operation | Outcome:
        """One phase; what goes wrong in it decides the next."""
        try:
            await self._enter(operation)
            return await self._steps[operation.phase](operation)
        except Refusal as exc:
            return _ended(operation, "refused", exc.why, exc.detail)
        except (EdgedError, OSError) as exc:
            return await self._after_trouble(operation, exc)

    async def _after_trouble(self, operation: Operation, exc: EdgedError | OSError) -> Operation | Outcome:
        """A file could not be written, or a program not be run: go back where something may have been changed."""
        full = isinstance(exc, EdgedError) and exc.reason is Reason.DISK_FULL
        why = Why.DISK_FULL if full else Why.STORAGE_FAILED
        log.error("%s: %s", operation.phase, exc)
        if operation.phase is Phase.PREPARING or await self._is_untouched(operation):
            return _ended(operation, "refused", why, str(exc))
        if operation.phase is Phase.REVERTING:
            return _ended(operation, "failed", Why.REVERT_FAILED, str(exc))
        return replace(operation, phase=Phase.REVERTING, reason=why.value, detail=str(exc))

    async def _is_untouched(self, operation: Operation) -> bool:
        """Whether dpkg was not called yet."""
        if operation.phase is not Phase.INSTALLING or self._state.marked():
            return False
        installed = await self._apt.installed()
        return installed.whole and installed.version == operation.from_version

    async def _enter(self, operation: Operation) -> None:
        if self._stop.is_set():
            raise _Leaving
        log.info("%s from %s to %s: %s", *_names(operation), operation.phase.value)
        await asyncio.to_thread(self._state.begin, operation)
        self._tell(
            protocol.event(
                "phase",
                phase=operation.phase.value,
                from_version=operation.from_version,
                to_version=operation.to_version,
            )
        )

    async def _finish(self, outcome: Outcome) -> None:
        log.log(
            logging.INFO if outcome.result == "ok" else logging.ERROR,
            "%s from %s to %s: %s %s %s", *_names(outcome), outcome.result, outcome.reason, outcome.detail,
        )  # fmt: skip
        fields = {**asdict(outcome), "detail": protocol.shortened(outcome.detail), "cure": outcome.cure}
        state = self._state
        try:
            await asyncio.to_thread(state.end, fields)
            installed = await self._apt.installed()
            await asyncio.to_thread(state.prune, installed.version, state.previous())
        except (EdgedError, OSError):
            log.exception("the end of the upgrade cannot be written down")
        self._tell(protocol.last(fields))

    def _tell(self, line: bytes) -> None:
        for listener in self._listeners:
            with suppress(asyncio.QueueFull):
                listener.put_nowait(line)

    async def _unless_stopping(self, work: Coroutine[Any, Any, T]) -> T:
        """``work``, which changes nothing, until the helper is told to end. Raises :class:`_Leaving`."""
        task, stop = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Leaving
            return task.result()
        finally:
            for one in (task, stop):
                one.cancel()
            await asyncio.wait([task, stop])

    # -- after a cut

    async def _go_on(self, operation: Operation) -> None:
        log.warning("going on with what was interrupted: %s", operation)
        if operation.lives > MOST_LIVES:
            await self._finish(
                _ended(operation, "failed", Why.ATTEMPTS_EXHAUSTED, f"interrupted {MOST_LIVES} times")
            )
        elif operation.phase is Phase.PREPARING:
            await self._finish(_ended(operation, "failed", Why.INTERRUPTED, "nothing was changed"))
        elif operation.phase is Phase.INSTALLING:
            await self._run_after(operation)
        else:
            await self._run(operation)

    async def _run_after(self, operation: Operation) -> None:
        """The package may be anything: make it whole first, and then see which of the two it is."""
        await asyncio.to_thread(self._state.begin, operation)
        if self._state.marked():
            await run([self._recover], timeout_s=RECOVER_S)
        after = await self._after_dpkg(operation, Why.INTERRUPTED, "the power or the helper went away")
        if isinstance(after, Outcome):
            await self._finish(after)
        else:
            await self._run(after)

    # -- the phases

    async def _prepare(self, operation: Operation) -> Operation | Outcome:
        # dpkg is waited for, also where the helper is told to end
        await self._apt.configure()
        return await self._unless_stopping(self._prepared(operation))

    async def _prepared(self, operation: Operation) -> Operation | Outcome:
        installed = await self._apt.installed()
        if not installed.whole:
            raise Refusal(
                Why.NOT_INSTALLED, f"dpkg says {installed.state or 'nothing'!r} of the package edged"
            )
        active = (await self._systemd.state()).active
        judged = active in ("active", "activating", "reloading")
        operation = replace(operation, from_version=installed.version, judged=judged)
        if operation.verb == Verb.UPGRADE:
            return await self._prepared_to_upgrade(operation)
        return await self._prepared_to_go_back(operation)

    async def _prepared_to_upgrade(self, operation: Operation) -> Operation | Outcome:
        old, new = operation.from_version, operation.to_version
        if old == new:
            return _ended(operation, "ok", None, f"{new} runs already")
        if not await self._apt.is_newer(new, old):
            raise Refusal(Why.OLDER, f"{new} is older than {old}, which runs")
        update = await self._apt.update()
        sha256 = await self._apt.sha256(new)
        if not sha256 and not update.ok:
            raise Refusal(
                why_not_fetched(update),
                f"{new} is not known, and the repositories cannot be read: {update.gist}",
            )
        if not sha256:
            raise Refusal(Why.NOT_FOUND, f"no repository of this node has edged {new}")
        await self._have_fallback(old)
        simulated = await self._apt.simulate(new)
        if not simulated.ok:
            raise Refusal(Why.REQUIRES_UNMET, simulated.gist)
        data = await self._apt.fetch(new, sha256)
        await asyncio.to_thread(self._state.keep, new, data)
        return replace(operation, phase=Phase.INSTALLING)

    async def _prepared_to_go_back(self, operation: Operation) -> Operation | Outcome:
        now, before = operation.from_version, operation.to_version
        if not before or not await self._is_kept(before):
            raise Refusal(Why.NO_FALLBACK, f"the package that ran before {now} is not kept as it was signed")
        if not await self._apt.is_newer(now, before):
            raise Refusal(Why.NO_FALLBACK, f"what ran before {now} is {before}, which is not older")
        await self._have_fallback(now)
        return replace(operation, phase=Phase.INSTALLING)

    async def _is_kept(self, version: str) -> bool:
        """Whether the package of ``version`` is kept, and is what the signed index names where that has the version."""
        deb = self._state.deb(version)
        if not deb.is_file() or await self._apt.version_of(deb) != version:
            return False
        sha256 = await self._apt.sha256(version)
        return not sha256 or await asyncio.to_thread(_sha256, deb) == sha256

    async def _have_fallback(self, version: str) -> None:
        """Keep the package of ``version``, which runs, if it is not kept. Raises :class:`Refusal` (``no_fallback``)."""
        if await self._is_kept(version):
            return
        sha256 = await self._apt.sha256(version)
        try:
            if not sha256:
                raise Refusal(Why.NOT_FOUND, "no repository of this node has it any more")
            await asyncio.to_thread(self._state.keep, version, await self._apt.fetch(version, sha256))
        except Refusal as exc:
            raise Refusal(
                Why.NO_FALLBACK, f"the package of {version}, which runs, cannot be had: {exc.detail}"
            ) from exc

    async def _install(self, operation: Operation) -> Operation | Outcome:
        old, new = operation.from_version, operation.to_version
        if operation.verb == Verb.UPGRADE:
            await asyncio.to_thread(self._state.mark, old, new)
            ended = await self._apt.install(new)
        else:
            ended = await self._put_back(old, new)
        return await self._after_dpkg(operation, Why.INSTALL_FAILED, ended.gist)

    async def _after_dpkg(self, operation: Operation, why: Why, detail: str) -> Operation | Outcome:
        """Which of the two is there, whatever apt said."""
        installed = await self._apt.installed()
        if not installed.whole:
            return replace(operation, phase=Phase.REVERTING, reason=why.value, detail=detail)
        if installed.version == operation.to_version:
            await asyncio.to_thread(self._state.set_previous, operation.from_version)
            await asyncio.to_thread(self._state.unmark)
            return replace(operation, phase=Phase.WATCHING)
        await asyncio.to_thread(self._state.unmark)
        return _ended(operation, "failed", why, f"{installed.version} runs as before: {detail}")

    async def _watch(self, operation: Operation) -> Operation | Outcome:
        seen = await self._not_healthy(operation)
        installed = await self._apt.installed()
        if installed.whole and installed.version != operation.to_version:
            detail = f"somebody else has installed {installed.version} meanwhile, which stays"
            return _ended(operation, "failed", Why.INTERRUPTED, detail)
        if not seen:
            return _ended(operation, "ok", None, f"{operation.to_version} runs")
        return replace(operation, phase=Phase.REVERTING, reason=Why.HEALTH_FAILED.value, detail=seen)

    async def _not_healthy(self, operation: Operation) -> str:
        """What is wrong with the daemon; empty where nothing is, or where it did not run before either."""
        if not operation.judged:
            return ""
        seen = await self._unless_stopping(self._systemd.why_not_healthy(self._start_s, self._health_s))
        if seen and await self._systemd.stopping():
            raise _Leaving
        return seen

    async def _revert(self, operation: Operation) -> Operation | Outcome:
        old, bad = operation.from_version, operation.to_version
        ended = await self._put_back_in_the_end(bad, old)
        installed = await self._apt.installed()
        if installed.whole and installed.version not in (bad, old):
            await asyncio.to_thread(self._state.unmark)
            return _ended(operation, "failed", Why.INTERRUPTED, f"{operation.detail}; {ended.gist}")
        if not installed.whole or installed.version != old:
            return _ended(
                operation, "failed", Why.REVERT_FAILED, f"{operation.detail}; then {old}: {ended.gist}"
            )
        await asyncio.to_thread(self._state.unmark)
        await asyncio.to_thread(self._state.set_previous, operation.previous)
        seen = await self._not_healthy(operation)
        if seen:
            return _ended(
                operation, "failed", Why.REVERT_FAILED, f"{operation.detail}; {old} is back, but {seen}"
            )
        return replace(
            _ended(operation, "failed", Why(operation.reason), f"{operation.detail}; {old} is back"),
            reverted=True,
        )

    async def _put_back_in_the_end(self, bad: str, old: str) -> Ended:
        """As :meth:`_put_back`; that somebody else is at work, for however long, is no reason to leave what is not well."""
        while True:
            await self._unless_stopping(self._unlocked())
            installed = await self._apt.installed()
            if installed.whole and installed.version not in (bad, old):
                return Ended(1, f"somebody else has installed {installed.version} meanwhile, which stays")
            ended = await self._put_back(bad, old)
            if ended.ok or not await asyncio.to_thread(self._apt.locked):
                return ended

    async def _unlocked(self) -> None:
        """Return when nobody is at work with apt or dpkg; the kernel frees their locks when they end, however they do."""
        told = False
        while await asyncio.to_thread(self._apt.locked):
            if not told:
                log.warning("somebody else's apt or dpkg is at work; it is waited for")
            told = True
            await asyncio.sleep(POLL_S)

    async def _put_back(self, now: str, version: str) -> Ended:
        """Install the kept package of ``version`` instead of ``now``; without apt where apt will not, but for a lock."""
        deb = self._state.deb(version)
        await asyncio.to_thread(self._state.mark, now, version)
        ended = await self._apt.put_back(deb)
        if ended.ok or await asyncio.to_thread(self._apt.locked):
            return ended
        # what apt calls when it has ended has taken the mark away where the package looked whole
        await asyncio.to_thread(self._state.mark, now, version)
        return await self._apt.put_back_without_apt(deb)


def _ended(operation: Operation, result: str, why: Why | None, detail: str) -> Outcome:
    return Outcome(*_names(operation), result, why.value if why else "", detail)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _names(one: Operation | Outcome) -> tuple[str, str, str]:
    return one.verb, one.from_version, one.to_version

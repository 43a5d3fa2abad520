"""Which releases may be installed, as this node knows it now.

Runs the verification in a child process, keeps what it proved (seen versions, time floor) in the store, and answers from
the last report as long as that is fresh.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from edged.clock import Clock
from edged.config import TrustSettings
from edged.engine.observer import Observer
from edged.errors import EdgedError, Permanent, Reason, Refused, Transient
from edged.store import audit, floors
from edged.store.database import Store, Tx
from edged_firmware.durable import write_durably
from edged_firmware.facts import VerifiedRelease
from edged_firmware.trust import TrustReport, TrustRequest, verify_in_child

log = logging.getLogger(__name__)

Verify = Callable[[TrustRequest], Awaitable[TrustReport]]


class Trust:
    """The node's view of its release repository. ``folder`` holds the root of trust and the metadata cache.

    ``authorization``: what the repository's server is sent as the Authorization header; empty: nothing.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        settings: TrustSettings,
        folder: Path,
        build_time: datetime,
        observer: Observer,
        verify: Verify = verify_in_child,
        authorization: str = "",
    ) -> None:
        self._store = store
        self._clock = clock
        self._settings = settings
        self._folder = folder
        self._build_time = build_time
        self._observer = observer
        self._verify = verify
        self._authorization = authorization
        self._report: TrustReport | None = None
        self._refreshed = 0.0
        self._began = 0.0
        self._failure: EdgedError | None = None
        self._turn = asyncio.Event()
        self._refreshing = asyncio.Lock()

    @property
    def report(self) -> TrustReport | None:
        """The last report, None before the first."""
        return self._report

    @property
    def failure(self) -> EdgedError | None:
        """Why the last refresh failed, None where it did not."""
        return self._failure

    @property
    def build_time(self) -> datetime:
        """Before it no clock can be right."""
        return self._build_time

    @property
    def root_path(self) -> Path:
        """Where the root of trust that the owner set lies."""
        return self._folder / "root.json"

    async def changed(self) -> None:
        """Return after the next refresh, however it ends: :attr:`report` or :attr:`failure` is another one then."""
        await self._turn.wait()

    async def run(self) -> None:
        """Refresh for ever; a failure is kept, logged once and tried again at the next time."""
        while True:
            # kept in ``failure`` and in the audit trail; whoever needs a release hears of it
            with suppress(EdgedError):
                await self.refresh()
            await self._clock.sleep(self._settings.refresh_s)

    async def init(self, root: bytes, actor: str, *, replace_root: bool = False) -> None:
        """Trust ``root`` (the repository's root metadata, JSON) from now on.

        Raises ``Refused`` where the repository does not verify against it, and ``Permanent(CONFIG_INVALID)`` where an
        operator has set another root already, unless ``replace_root``; then nothing changes.
        """
        async with self._refreshing:
            if not replace_root and await asyncio.to_thread(self._has_other_root, root):
                raise Permanent(
                    Reason.CONFIG_INVALID,
                    f"{self.root_path} holds another root of trust already; to change whom this node trusts, say --replace",
                )
            # another publisher counts his versions anew: what was seen of the last one binds only who has its keys,
            # which the store checks
            report = await self._verify(replace(await self._request(root), seen={}))
            await self._accept(report, actor, "trust.init")
            await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
            await asyncio.to_thread(write_durably, self.root_path, root)

    async def refresh(self) -> TrustReport:
        """Verify the repository's metadata now. Who asks while another refresh runs shares the next one.

        Raises ``Refused`` (not trusted; one audit row per change of cause) or ``Transient`` (no metadata at all).
        """
        asked = self._clock.monotonic()
        async with self._refreshing:
            if self._began > asked and self._failure is not None:
                raise type(self._failure)(self._failure.reason, self._failure.detail)
            if self._began > asked and self._report is not None:
                return self._report
            self._began = self._clock.monotonic()
            try:
                report = await self._verify(await self._request(await asyncio.to_thread(self._root)))
            except EdgedError as exc:
                await self._refuse(exc)
                raise
            await self._accept(report, "engine", "trust.refresh")
            return report

    async def resolve(self, release: str) -> VerifiedRelease:
        """The release ``NAME@VERSION``, by metadata that is not older than the refresh interval.

        Raises ``Refused(RELEASE_UNKNOWN)`` where the repository has none of that name, the reason of a release whose
        facts are unusable, and what :meth:`refresh` raises.
        """
        age = self._clock.monotonic() - self._refreshed
        if self._report is None or age >= self._settings.refresh_s or _find(self._report, release) is None:
            await self.refresh()
        return await self.known(release)

    async def known(self, release: str) -> VerifiedRelease:
        """As :meth:`resolve`, content with the last report however old it is: for what runs already."""
        report = self._report or await self.refresh()
        found = _find(report, release)
        if found is not None:
            return found
        for target in report.rejected:
            if target.path == _image_path(release):
                raise Refused(target.reason, target.detail)
        raise Refused(
            Reason.RELEASE_UNKNOWN, f"the repository {self._settings.repository or '(none)'} has no {release}"
        )

    async def published(self) -> Sequence[VerifiedRelease]:
        """All releases of the last report, however old it is; none where there is none and none can be had now."""
        if self._report is None:
            with suppress(Refused, Transient):
                await self.refresh()
        return self._report.releases if self._report else ()

    def _has_other_root(self, root: bytes) -> bool:
        return self.root_path.is_file() and self.root_path.read_bytes() != root

    def _root(self) -> bytes:
        for path in (self.root_path, self._settings.root):
            try:
                if path is not None and path.is_file():
                    return path.read_bytes()
            except OSError as exc:
                raise Refused(Reason.TRUST_MISSING, f"{path} cannot be read: {exc.strerror}") from exc
        raise Refused(
            Reason.TRUST_MISSING, f"no root of trust: neither {self.root_path} nor trust.root is there"
        )

    async def _request(self, root: bytes) -> TrustRequest:
        seen, floor = await self._store.read(lambda tx: (floors.get_seen(tx), floors.get_time(tx)))
        return TrustRequest(
            root=root,
            source=self._settings.repository or None,
            metadata_dir=self._folder / "metadata",
            now=self._clock.now(),
            build_time=self._build_time,
            time_floor=floor,
            seen=seen,
            offline_grace_s=self._settings.offline_grace.total_seconds(),
            authorization=self._authorization,
        )

    async def _accept(self, report: TrustReport, actor: str, event: str) -> None:
        old = self._report
        changed = old is None or (old.seen, old.online, old.stale_seconds > 0) != (
            report.seen,
            report.online,
            report.stale_seconds > 0,
        )

        def change(tx: Tx) -> None:
            floors.raise_seen(tx, report.seen)
            floors.raise_time(tx, report.time_floor)
            if changed or self._failure is not None or event == "trust.init":
                versions = {role: item.version for role, item in report.seen.items()}
                data = {"versions": dict(versions), "online": report.online, "stale_s": report.stale_seconds}
                audit.append(tx, actor, event, data)  # type: ignore[arg-type]

        await self._store.write(change)
        self._report, self._refreshed, self._failure = report, self._clock.monotonic(), None
        self._wake()
        self._observer.trust_refreshed(report.stale_seconds, report.online)
        log.info(
            "trust refreshed",
            extra={
                "online": report.online,
                "releases": len(report.releases),
                "stale_s": report.stale_seconds,
            },
        )

    async def _refuse(self, error: EdgedError) -> None:
        old, self._failure = self._failure, error
        self._wake()
        if old is not None and (old.reason, old.detail) == (error.reason, error.detail):
            return
        log.warning("trust not refreshed", extra={"reason": error.reason.value, "detail": error.detail})
        if isinstance(error, Refused):
            data = {"reason": error.reason.value, "detail": error.detail}
            await self._store.write(lambda tx: audit.append(tx, "engine", "trust.refused", dict(data)))

    def _wake(self) -> None:
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()


def _find(report: TrustReport, release: str) -> VerifiedRelease | None:
    return next((item for item in report.releases if str(item.ref) == release), None)


def _image_path(release: str) -> str:
    name, _, version = release.partition("@")
    return f"{name}/{version}/image"

"""systemd, as far as the helper needs it: is the daemon up and has it stayed up, and restart the node."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from edged.helper.commands import Ended, run

QUICK_S = 30.0
POLL_S = 1.0
MOST_RESTARTS = 4
"""A daemon that ended so often while it was waited for is not waited for any longer."""
MOST_SILENT_S = 900.0
"""A bound only: systemd ends a daemon that is silent for ``WatchdogSec=``."""
NO_WATCHDOG = ("", "0", "infinity")


@dataclass(frozen=True, slots=True)
class UnitState:
    """A unit as systemd sees it; ``invocation`` is another one after each start, ``restarts``: those by systemd.

    ``told``: when it told its watchdog last, as systemd writes it; empty where it has none.
    """

    active: str
    sub: str
    invocation: str
    restarts: int
    told: str = ""

    @property
    def up(self) -> bool:
        """It has said that it is ready, and runs."""
        return self.active == "active" and self.sub == "running"


class Systemd:
    """``systemctl`` of one system."""

    def __init__(self, systemctl: str = "/usr/bin/systemctl", unit: str = "edged.service") -> None:
        self._systemctl = systemctl
        self.unit = unit

    async def state(self) -> UnitState:
        """The daemon's unit now."""
        properties = (
            "ActiveState",
            "SubState",
            "InvocationID",
            "NRestarts",
            "WatchdogUSec",
            "WatchdogTimestampMonotonic",
        )
        argv = [self._systemctl, "show", self.unit, *(f"--property={name}" for name in properties)]
        ended = await run(argv, timeout_s=QUICK_S, quiet=True)
        found = dict(line.partition("=")[::2] for line in ended.text.splitlines() if "=" in line)
        active, sub, invocation, restarts, watchdog, told = (found.get(name, "") for name in properties)
        return UnitState(
            active,
            sub,
            invocation,
            int(restarts) if restarts.isdecimal() else 0,
            "" if watchdog in NO_WATCHDOG else told,
        )

    async def stopping(self) -> bool:
        """Whether the whole node is going down."""
        ended = await run([self._systemctl, "is-system-running"], timeout_s=QUICK_S, quiet=True)
        return "stopping" in ended.text

    async def reboot(self) -> Ended:
        """Restart the node; returns before it happens."""
        return await run([self._systemctl, "--no-block", "reboot"], timeout_s=QUICK_S)

    async def why_not_healthy(self, start_s: float, health_s: float) -> str:
        """Empty where the daemon is up within ``start_s`` and then for ``health_s`` without a restart; else what was seen.

        One that hangs is up too, until systemd ends it for its silence: after ``health_s`` it must tell its watchdog once more.
        """
        first = await self._up_within(start_s)
        if first is None:
            now = await self.state()
            return f"{self.unit} did not come up: it is {now.active} ({now.sub}), started anew {now.restarts} times"
        last = first
        for _ in range(max(1, round(health_s / POLL_S))):
            await asyncio.sleep(POLL_S)
            last = await self.state()
            if not last.up or last.invocation != first.invocation:
                return f"{self.unit} did not stay up for {health_s:.0f} s: it is {last.active} ({last.sub})"
        return await self._why_silent(last)

    async def _why_silent(self, last: UnitState) -> str:
        """Empty where the daemon tells its watchdog after ``last`` was seen, or has none; else what was seen."""
        for _ in range(round(MOST_SILENT_S / POLL_S)):
            now = await self.state()
            if not now.up or now.invocation != last.invocation:
                return f"{self.unit} was up and did not tell its watchdog: it is {now.active} ({now.sub})"
            if not last.told or now.told != last.told:
                return ""
            await asyncio.sleep(POLL_S)
        return f"{self.unit} is up and has not told its watchdog for {MOST_SILENT_S:.0f} s"

    async def _up_within(self, start_s: float) -> UnitState | None:
        before = (await self.state()).restarts
        for _ in range(max(1, round(start_s / POLL_S))):
            now = await self.state()
            if now.up:
                return now
            if now.restarts >= before + MOST_RESTARTS:
                return None
            await asyncio.sleep(POLL_S)
        return None

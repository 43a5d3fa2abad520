"""What the helper must know after a power cut: the upgrade that it is in, how the last one ended, the packages to go back to.

A folder that only root reads (``/var/lib/edged-helper``). ``edged-keep-deb`` and ``edged-recover``, which work without Python,
share it:

    debs/edged_VERSION.deb   packages that were kept whole
    in-progress              dpkg is at work on ours; ``from=`` and ``to=`` lines
    previous                 the version that ran before this one
    recovered                what edged-recover found and did at a boot
    operation.json           an upgrade that has not ended
    outcome.json             how the last one ended
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from edged.helper.protocol import is_version
from edged_firmware.durable import fsync_folder, write_durably

log = logging.getLogger(__name__)

MODE = 0o600
FOLDER = Path("/var/lib/edged-helper")


class Phase(StrEnum):
    """How far an upgrade is. Written down before the phase begins."""

    PREPARING = "preparing"
    """Nothing is changed: indexes, checks, the two packages."""
    INSTALLING = "installing"
    WATCHING = "watching"
    """The new version is installed; is the daemon well?"""
    REVERTING = "reverting"


@dataclass(frozen=True, slots=True)
class Operation:
    """An upgrade. ``judged``: the daemon ran before it, so that it says something whether it runs after it."""

    verb: str
    from_version: str
    to_version: str
    phase: Phase = Phase.PREPARING
    previous: str = ""
    """What ran before ``from_version``."""
    judged: bool = True
    lives: int = 0
    """How often a helper has gone on with it."""
    reason: str = ""
    """Why it goes back, where it does."""
    detail: str = ""


class State:
    """The folder. Every write is lasting when it returns; errors as ``edged_firmware.durable``. Blocks."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._debs = folder / "debs"
        for one in (folder, self._debs):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)

    def deb(self, version: str) -> Path:
        """Where the package of ``version`` is kept, if it is."""
        return self._debs / f"edged_{version}.deb"

    def kept(self) -> list[str]:
        """Versions of which the package is kept."""
        names = sorted(path.name for path in self._debs.glob("edged_*.deb"))
        return [name.removeprefix("edged_").removesuffix(".deb") for name in names]

    def keep(self, version: str, data: bytes) -> Path:
        """Keep the package of ``version``."""
        write_durably(self.deb(version), data, MODE)
        return self.deb(version)

    def mark(self, from_version: str, to_version: str) -> None:
        """Say that dpkg will be at work: from here on a boot recovers."""
        write_durably(self._folder / "in-progress", f"from={from_version}\nto={to_version}\n".encode(), MODE)

    def unmark(self) -> None:
        """Say that it is not."""
        self._remove("in-progress")

    def marked(self) -> bool:
        """Whether dpkg was at work and may not have ended."""
        return (self._folder / "in-progress").exists()

    def previous(self) -> str:
        """The version that ran before this one; empty where none is known."""
        text = self._text("previous").strip()
        return text if is_version(text) else ""

    def set_previous(self, version: str) -> None:
        """Remember it, for ``rollback``."""
        write_durably(self._folder / "previous", f"{version}\n".encode(), MODE)

    def recovered(self) -> dict[str, str]:
        """What edged-recover wrote down last; empty where it had nothing to do yet."""
        lines = self._text("recovered").splitlines()
        return dict(line.partition("=")[::2] for line in lines if "=" in line)

    def operation(self) -> Operation | None:
        """The upgrade that has not ended. One that cannot be read is none: its file is set aside for a person."""
        text = self._text("operation.json")
        if not text:
            return None
        try:
            found = json.loads(text)
            return Operation(**{**found, "phase": Phase(found["phase"])})
        except (TypeError, ValueError, KeyError):
            log.warning("operation.json cannot be understood; it is set aside as operation.bad")
            (self._folder / "operation.json").rename(self._folder / "operation.bad")
            return None

    def begin(self, operation: Operation) -> None:
        """Write down how far ``operation`` is."""
        data = json.dumps(asdict(operation)).encode()
        write_durably(self._folder / "operation.json", data, MODE)

    def end(self, outcome: Mapping[str, Any]) -> None:
        """Write down how it ended. A cut between the two steps ends it once more, in the same way."""
        write_durably(self._folder / "outcome.json", json.dumps(outcome).encode(), MODE)
        self._remove("operation.json")

    def outcome(self) -> dict[str, Any] | None:
        """How the last upgrade ended, and when (``ended``, RFC 3339); None before the first."""
        try:
            found = json.loads(self._text("outcome.json") or "null")
        except ValueError:
            log.warning("outcome.json cannot be read")
            return None
        if not isinstance(found, dict):
            return None
        ended = datetime.fromtimestamp((self._folder / "outcome.json").stat().st_mtime, UTC)
        return {**found, "ended": ended.isoformat(timespec="seconds").replace("+00:00", "Z")}

    def prune(self, *wanted: str) -> None:
        """Forget the packages of all other versions."""
        for version in set(self.kept()) - set(wanted):
            self.deb(version).unlink()

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            (self._folder / name).unlink()
        fsync_folder(self._folder)

    def _text(self, name: str) -> str:
        try:
            fd = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return ""
        with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
            return file.read(64 * 1024)

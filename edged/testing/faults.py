"""Cutting the power at every lasting effect: before it, after it, and in the middle (torn).

A :class:`Faults` is one life of the node and its devices: it counts effects, cuts at the one it was told to, and is dead from
then on: whatever is tried afterwards fails too, as on a machine without power. Each life starts from fresh objects and the
same disk and devices. :class:`PowerCut` is not an ``Exception``, so that no error handling can survive it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from edged.store.artifacts import Artifacts
from edged.store.database import Store, Tx

T = TypeVar("T")


class PowerCut(BaseException):
    """The power is gone."""


class When(StrEnum):
    """Where in an effect the power goes. An effect that cannot be torn (a commit is atomic) is cut before instead."""

    BEFORE = "before"
    TORN = "torn"
    AFTER = "after"


@dataclass(slots=True)
class Faults:
    """Cut at effect number ``at`` (1 is the first), of those named ``of``, empty: of all; 0: never, only count. ``fired`` names
    the effect that was cut.

    Which effect of its name one is does not depend on how a device's effects and the node's fall among each other.
    """

    at: int = 0
    when: When = When.BEFORE
    of: str = ""
    count: int = 0
    fired: str = ""
    names: list[str] = field(default_factory=list)

    @property
    def dead(self) -> bool:
        return bool(self.fired)

    def effect(self, name: str, apply: Callable[[], None], torn: Callable[[], None] | None = None) -> None:
        """A lasting effect that happens at once; ``torn`` leaves it half done."""
        cut = self._enter(name)
        if not cut:
            apply()
            return
        if self.when is When.AFTER:
            apply()
        elif self.when is When.TORN and torn is not None:
            torn()
        raise PowerCut(name)

    async def effect_async(self, name: str, apply: Callable[[], Awaitable[T]]) -> T:
        """A lasting effect that takes time and is atomic."""
        cut = self._enter(name)
        if cut and self.when is not When.AFTER:
            raise PowerCut(name)
        result = await apply()
        if cut or self.dead:
            raise PowerCut(name)
        return result

    def _enter(self, name: str) -> bool:
        if self.dead:
            raise PowerCut(f"{name}, after {self.fired}")
        self.names.append(name)
        if self.of not in ("", name):
            return False
        self.count += 1
        if self.count == self.at:
            self.fired = name
            return True
        return False


class FaultyStore(Store):
    """A store whose every commit is an effect."""

    def __init__(self, inner: Store, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    @property
    def path(self) -> Path:
        return self._inner.path

    @property
    def read_only_reason(self) -> str | None:
        return self._inner.read_only_reason

    async def write(self, fn: Callable[[Tx], T]) -> T:
        return await self._faults.effect_async("store.commit", lambda: self._inner.write(fn))

    async def read(self, fn: Callable[[Tx], T]) -> T:
        return await self._inner.read(fn)

    async def ping(self) -> None:
        await self._inner.ping()


class FaultyArtifacts(Artifacts):
    """Artifacts whose every new file is an effect, besides the commit of its row."""

    def __init__(self, store: Store, folder: Path, quota_bytes: int, faults: Faults) -> None:
        super().__init__(store, folder, quota_bytes)
        self._faults = faults

    async def adopt(self, tmp: Path, kind: str, source: str, expected_sha256: str | None = None) -> str:
        return await self._faults.effect_async(
            "artifact.adopt", lambda: super(FaultyArtifacts, self).adopt(tmp, kind, source, expected_sha256)
        )

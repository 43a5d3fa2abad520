"""What the engine tells about itself as it works; ``metrics`` listens."""

from __future__ import annotations

from typing import Protocol

from edged.domain.job import State
from edged.errors import Reason


class Observer(Protocol):
    """Each method is called on the event loop and must not block."""

    def job_ended(self, state: State, reason: Reason | None) -> None: ...

    def fetched(self, source: str, size_bytes: int) -> None:
        """Bytes that arrived from ``https``, ``http`` or ``file``."""
        ...

    def sent(self, device: str, size_bytes: int) -> None:
        """Image bytes that a device acknowledged."""
        ...

    def utilisation(self, device: str, ratio: float) -> None:
        """Achieved bytes per second by the link's physical ceiling, of a transfer that ended."""
        ...

    def chunk_verified(self, seconds: float) -> None: ...

    def chunk_written(self, seconds: float) -> None: ...

    def trust_refreshed(self, stale_s: float, online: bool) -> None: ...

    def mapper_event(self, source: str, event: str) -> None:
        """What a mapper counts: ``source`` is the id of a device, or the address of a link."""
        ...


class Silent:
    """Nobody listens."""

    def job_ended(self, state: State, reason: Reason | None) -> None:
        pass

    def fetched(self, source: str, size_bytes: int) -> None:
        pass

    def sent(self, device: str, size_bytes: int) -> None:
        pass

    def utilisation(self, device: str, ratio: float) -> None:
        pass

    def chunk_verified(self, seconds: float) -> None:
        pass

    def chunk_written(self, seconds: float) -> None:
        pass

    def trust_refreshed(self, stale_s: float, online: bool) -> None:
        pass

    def mapper_event(self, source: str, event: str) -> None:
        pass

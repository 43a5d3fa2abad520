"""What outlives the sessions of a device that speaks SMP, until the daemon ends: above all the lines that it said."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import Final

_KEPT_LINES: Final = 64
_EVIDENCE_LINES: Final = 5
_EVIDENCE_CHARS: Final = 200
_BANNER: Final = re.compile(r"\*\*\* Booting ")
"""What Zephyr prints first: lines before it are those of the image before."""


class Lines:
    """The lines that the image that runs has said since its start, the newest of them.

    A session may be lost between the start, when most is said, and the question whether it is well.
    """

    def __init__(self) -> None:
        self.newest: deque[str] = deque(maxlen=_KEPT_LINES)
        self.is_from_start = False
        self._first: list[str] = []
        self._image: str | None = None
        self._is_starting = False
        self._heard_banner = False

    @property
    def evidence(self) -> str:
        """The first few, where a crash says its cause."""
        return "\n".join(line[:_EVIDENCE_CHARS] for line in self._first)

    def take(self, line: str) -> None:
        """One more came."""
        if _BANNER.search(line):
            self._forget()
            self._heard_banner = self.is_from_start = True
        self.newest.append(line)
        if line and len(self._first) < _EVIDENCE_LINES:
            self._first.append(line)

    def begin_session(self) -> None:
        """Nobody listened since the last session: a banner that was heard before need not be that of what runs now."""
        self._heard_banner = False

    def begin_reset(self) -> None:
        """The device is told to reset: what comes until it answers may still be said by the image before."""
        self._forget()
        self._is_starting, self._heard_banner = True, False

    def belong_to(self, image: str) -> None:
        """It answers: the image with the hash ``image`` runs. Without a banner nobody knows which one said what came before."""
        if (self._is_starting or self._image not in (None, image)) and not self._heard_banner:
            self._forget()
        self.is_from_start |= self._is_starting
        self._image, self._is_starting = image, False

    def _forget(self) -> None:
        self.newest.clear()
        self._first.clear()
        self.is_from_start = False


@dataclass(slots=True)
class Kept:
    """Of one device. ``is_pulsed``: it was reset for its silence, and has not answered since."""

    is_pulsed: bool = False
    lines: Lines = field(default_factory=Lines)

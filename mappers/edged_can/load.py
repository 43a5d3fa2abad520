"""How much of a bus is used, from the frames that are seen, and how long to wait so that it stays below a share.

Time is given; nothing here waits. Safe to use from several threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

_WINDOW_S: Final = 0.5
_BURST_S: Final = 0.002
"""Wire time that may be used at once: some frames at 500 kbit/s."""
_MOST_DEBT_S: Final = 0.5
_NOTHING_S: Final = 1e-6
LONGEST_WAIT_S: Final = 0.05
"""However busy the others are, a frame waits no longer than that: the receiver gives up after a second (ISO 15765-2, N_Cr)."""


class BusLoad:
    """Seen use of one bus. Every frame is told to :meth:`saw` once, with the seconds that it took on the wire."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._began = now()
        self._others = [0.0, 0.0]
        self._debts: dict[float, tuple[float, float]] = {}
        self._own_at = self._began

    def saw(self, wire_s: float, *, own: bool) -> None:
        """A frame went by; ``own``: this process sent it."""
        with self._lock:
            now = self._turn()
            if own:
                self._own_at = now
            else:
                self._others[0] += wire_s
            for share, (debt_s, since) in self._debts.items():
                self._debts[share] = (min(_left(debt_s, since, now, share) + wire_s, _MOST_DEBT_S), now)

    def used_by_others(self) -> float:
        """Part of the time in which the bus was lately seen busy with frames that this process did not send, 0 to 1."""
        with self._lock:
            now = self._turn()
            weight = 1 - (now - self._began) / _WINDOW_S
            return min(1.0, (self._others[0] + self._others[1] * weight) / _WINDOW_S)

    def wait_s(self, share: float) -> float:
        """How long to wait before the next frame, so that the whole load stays below ``share``.

        However much the others use: after ``LONGEST_WAIT_S`` without a frame of ours one may go.
        """
        with self._lock:
            now = self._now()
            debt_s, since = self._debts.setdefault(share, (0.0, now))
            excess = _left(debt_s, since, now, share) - _BURST_S
            due_s = self._own_at + LONGEST_WAIT_S - now
        wait_s = min(excess / share, due_s)
        return wait_s if wait_s > _NOTHING_S else 0.0

    def _turn(self) -> float:
        """Begin a new window where the present one is over."""
        now = self._now()
        passed = now - self._began
        if passed >= _WINDOW_S:
            kept = passed < 2 * _WINDOW_S
            self._others = [0.0, self._others[0] if kept else 0.0]
            self._began = self._began + _WINDOW_S if kept else now
        return now


def _left(debt_s: float, since: float, now: float, share: float) -> float:
    """Wire time in debt that ``share`` of the time since has not paid yet."""
    return max(0.0, debt_s - (now - since) * share)


def gap_s(wire_s: float, share: float, used_by_others: float) -> float:
    """The pause after each frame of ``wire_s`` that leaves the bus at ``share`` with what others use of it."""
    left = max(share - used_by_others, wire_s / (wire_s + LONGEST_WAIT_S))
    return min(wire_s / left - wire_s, LONGEST_WAIT_S)

"""What systemd is told and what it hands over: ``sd_notify(3)`` and ``sd_listen_fds(3)``, without a library.

Silent where nobody listens (``NOTIFY_SOCKET`` is not set), and empty where nothing is handed over: a daemon that was
started by hand works the same.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, MutableMapping
from typing import Final

log = logging.getLogger(__name__)

_FIRST_FD: Final = 3
"""``SD_LISTEN_FDS_START``."""


def inherited(environment: MutableMapping[str, str]) -> dict[str, socket.socket]:
    """The sockets that systemd opened for this process, by their ``FileDescriptorName=``; taken once.

    The variables are removed, and no child inherits the descriptors. A descriptor that is no socket is left alone.
    """
    mine = environment.pop("LISTEN_PID", "") == str(os.getpid())
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if not mine or not count.isdecimal():
        return {}
    names += [""] * (int(count) - len(names))
    found: dict[str, socket.socket] = {}
    for fd, name in enumerate(names[: int(count)], _FIRST_FD):
        try:
            os.set_inheritable(fd, False)
            found[name] = socket.socket(fileno=fd)
        except OSError as exc:
            log.warning("no socket was handed over", extra={"fd": fd, "fd_name": name, "error": exc.strerror})
            continue
        found[name].setblocking(False)
    return found


class Notifier:
    """Sends states to ``address`` (a path, or an abstract name that begins with ``@``); None: nobody listens.

    ``watchdog_s`` is how often systemd wants to hear :meth:`watchdog` at the latest, None where it does not watch.
    """

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        self._address = address
        self.watchdog_s = watchdog_s if address else None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Notifier:
        """As systemd says it: ``NOTIFY_SOCKET``, ``WATCHDOG_USEC``, ``WATCHDOG_PID`` (sd_watchdog_enabled(3))."""
        mine = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environment.get("WATCHDOG_USEC", "")
        watchdog_s = int(usec) / 1_000_000 if mine and usec.isdecimal() and int(usec) else None
        return cls(environment.get("NOTIFY_SOCKET") or None, watchdog_s)

    def ready(self) -> None:
        """Started."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The end begins."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """All is well."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send("STATUS=" + " ".join(text.split()))

    def _send(self, state: str) -> None:
        if self._address is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sock:
                sock.sendto(state.encode(), address)
        except OSError as exc:
            log.warning("systemd not told", extra={"state": state, "error": exc.strerror})

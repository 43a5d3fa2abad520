"""Builds the helper on the socket that systemd hands over, and runs it until it is idle or told to end."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from edged.helper.apt import Apt
from edged.helper.server import Server
from edged.helper.state import FOLDER, State
from edged.helper.units import Systemd
from edged.helper.upgrade import Upgrades

log = logging.getLogger(__name__)

FIRST_FD = 3


class _Journal(logging.Formatter):
    """Lines as the journal reads them from standard error: the priority in front (sd-daemon(3)), no line break inside."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        return f"<{priority}>" + super().format(record).replace("\n", " | ")


def main() -> None:
    """Run as systemd starts it. Exit code 2 where it was started in another way."""
    options = _options(sys.argv[1:])
    handler = logging.StreamHandler()
    handler.setFormatter(_Journal("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        log.error("expected one socket from systemd; start edged-helper.socket")
        raise SystemExit(2)
    with socket.socket(fileno=FIRST_FD) as listening:
        listening.set_inheritable(False)
        asyncio.run(serve(listening, options))


async def serve(listening: socket.socket, options: argparse.Namespace) -> None:
    """The helper on ``listening``, until it is idle, or until SIGTERM: then the package is left in one of its whole states."""
    state = await asyncio.to_thread(State, options.state)
    upgrades = Upgrades(
        state, Apt(), Systemd(unit=options.unit), start_s=options.start_s, health_s=options.health_s
    )
    await upgrades.resume()
    serving = asyncio.create_task(Server(listening, upgrades, user=options.user, idle_s=options.idle_s).run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    await asyncio.wait([serving])
    await upgrades.stop()
    if not serving.cancelled():
        serving.result()


def _options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="edged-helper", description="Upgrades edged and restarts the node.")
    parser.add_argument("--state", type=Path, default=FOLDER, help="its folder")
    parser.add_argument("--user", default="_edged", help="who may ask, beside root")
    parser.add_argument("--unit", default="edged.service", help="the daemon's unit")
    parser.add_argument("--start-s", type=float, default=180.0, help="so long may the daemon take to be up")
    parser.add_argument("--health-s", type=float, default=60.0, help="so long must a new version stay up")
    parser.add_argument("--idle-s", type=float, default=30.0, help="end after so long without a request")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()

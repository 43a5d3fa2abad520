"""Asking the helper, from the daemon or from a command. Holds nothing: each question is a connection of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from edged.helper.protocol import SOCKET, Verb

Answer = dict[str, Any]
MOST_LINE_BYTES = 256 * 1024


class HelperGone(Exception):
    """Nobody answers at the socket, or the answer broke off: an upgrade goes on without us, ask for the status again."""


class HelperClient:
    """Every method raises :class:`HelperGone`. A refusal is an answer: ``{"result": "refused", "reason": …}``."""

    def __init__(self, path: Path | str = SOCKET, *, timeout_s: float = 30.0) -> None:
        self._path = str(path)
        self._timeout_s = timeout_s

    async def status(self) -> Answer:
        """The package and its upgrades; where that is refused, the refusal."""
        found: Answer = {}
        async for answer in self.ask({"verb": Verb.STATUS.value}):
            found = answer if answer.get("event") == "status" or not found else found
        return found

    async def reboot(self) -> Answer:
        """Restart the node; returns before it happens, or while it does."""
        found: Answer = {}
        try:
            async for answer in self.ask({"verb": Verb.REBOOT.value}):
                found = answer
        except HelperGone:
            if found.get("event") != "rebooting":
                raise
            return {"result": "ok"}
        return found

    def upgrade(self, version: str) -> AsyncIterator[Answer]:
        """Upgrade to ``version``: an answer for each phase, and the last has ``result``. May take many minutes."""
        return self.ask({"verb": Verb.UPGRADE.value, "version": version}, timeout_s=None)

    def rollback(self) -> AsyncIterator[Answer]:
        """Go back to the version that ran before; as :meth:`upgrade`."""
        return self.ask({"verb": Verb.ROLLBACK.value}, timeout_s=None)

    async def ask(self, request: Answer, *, timeout_s: float | None = 0.0) -> AsyncIterator[Answer]:
        """The answers to ``request``, up to the one with ``result``. ``timeout_s`` for each: 0 as constructed, None no end."""
        limit_s = self._timeout_s if timeout_s == 0.0 else timeout_s
        try:
            async with asyncio.timeout(self._timeout_s):
                reader, writer = await asyncio.open_unix_connection(self._path, limit=MOST_LINE_BYTES)
        except (OSError, TimeoutError) as exc:
            raise HelperGone(
                f"{self._path}: {exc.strerror if isinstance(exc, OSError) and exc.strerror else exc}"
            ) from exc
        try:
            writer.write(json.dumps(request).encode() + b"\n")
            while True:
                answer = await _answer(reader, limit_s)
                yield answer
                if "result" in answer:
                    return
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader, limit_s: float | None) -> Answer:
    try:
        async with asyncio.timeout(limit_s):
            line = await reader.readuntil(b"\n")
    except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError) as exc:
        raise HelperGone("the answer broke off") from exc
    try:
        found = json.loads(line)
    except ValueError as exc:
        raise HelperGone("what came back is no answer") from exc
    if not isinstance(found, dict):
        raise HelperGone("what came back is no answer")
    return found

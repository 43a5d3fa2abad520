"""One board behind a serial port: its boot loader while it is flashed, its application's lines the rest of
the time.

The two share one wire, and a reset chooses the boot loader; so whoever needs one of them says so first
(``_boot_loader``, ``_application``). A boot loader leaves by itself when nobody talks to it: nothing here
relies on one that was left alone. What a page of flash holds is always asked of the device.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Protocol

from edged.api import (
    Device,
    Health,
    HealthCheck,
    Identity,
    Image,
    JsonValue,
    Phase,
    Progress,
    Reported,
    Segment,
    SessionTraits,
    Slot,
    Slots,
)
from edged.errors import Permanent, Reason, Transient
from edged_uart.config import UartConfig
from edged_uart.link import SerialLink
from edged_uart.pages import Page, plan
from edged_uart.parts import PARTS

_BITS_PER_BYTE: Final = 10
_WRITE_ROUNDS: Final = 2
_SURELY_ANOTHER_IMAGE: Final = 4
_LINE_BYTES: Final = 1024
_EVIDENCE_LINES: Final = 5
_EVIDENCE_CHARS: Final = 200
_KEPT_LINES: Final = 64
_ASK_AGAIN_S: Final = 1.0

_PROPERTY: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]{0,63})=(.*)")
_WHOLE: Final = re.compile(r"[+-]?\d{1,18}")
_NUMBER: Final = re.compile(r"[+-]?\d+\.\d*(e[+-]?\d+)?", re.IGNORECASE)
_WORDS: Final[dict[str, JsonValue]] = {"true": True, "false": False, "null": None}


class BootLoader(Protocol):
    """What a flash protocol offers. Addresses and lengths in bytes.

    ``page_by_page``: it erases the page that it writes, so that pages can be written in any order.
    ``reach_bytes``: its addresses end there. ``window_s``: for how long it surely waits for the next command.
    """

    @property
    def name(self) -> str: ...
    @property
    def page_by_page(self) -> bool: ...
    @property
    def reach_bytes(self) -> int: ...
    @property
    def window_s(self) -> float: ...
    async def sync(self) -> None: ...
    async def signature(self) -> bytes: ...
    async def read(self, address: int, length: int) -> bytes: ...
    async def write(self, address: int, data: bytes) -> None: ...
    async def leave(self) -> None: ...


class UartSession:
    """A session with one board; see :class:`edged.api.Session` and the ``Supports...`` Protocols for the
    contract.

    One slot, which can be read back; so ``slots()`` never says what runs: the engine proves it by reading.
    """

    def __init__(self, device: Device, config: UartConfig, link: SerialLink, loader: BootLoader) -> None:
        self._device = device
        self._config = config
        self._link = link
        self._loader = loader
        self._loop = asyncio.get_running_loop()
        self._in_boot_loader = False
        self._talked_at = 0.0
        self._wrote = False
        self._booted_at = self._loop.time()
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._first_lines: list[str] = []
        self.traits = SessionTraits(
            ceiling_bytes_per_s=config.baud / _BITS_PER_BYTE, slot_count=1, identify_disturbs=True
        )

    async def identify(self) -> Identity:
        """The part's signature as ``avr:`` and six hex digits. Resets the board.

        Raises Transient(NO_RESPONSE), Transient(LINK_LOST).
        """
        async with self._boot_loader() as loader:
            signature = await loader.signature()
        part = PARTS.get(signature)
        detail = {"protocol": loader.name, "part": part.name if part else "unknown"}
        return Identity(hardware_id=f"avr:{signature.hex()}", detail=detail)

    async def slots(self) -> Slots:
        """The one slot; what runs in it only its bytes can tell."""
        return Slots((Slot(name="flash", active=True),))

    async def stage(self, image: Image, progress: Progress) -> None:
        """Write the pages that differ from ``image`` and read back what was written.

        Raises Permanent(HARDWARE_MISMATCH), Permanent(UNSUPPORTED) or Permanent(IMAGE_TOO_LARGE) before the
        first write; Permanent(VERIFY_FAILED); Transient where the line or the board does not answer.
        """
        # a boot loader that counts its erases from its start must not have written since
        fresh = self._wrote and not self._loader.page_by_page
        async with self._boot_loader(fresh=fresh) as loader:
            size = await self._page_bytes(loader, image.segments)
            pages = plan(image.segments, size, from_start=not loader.page_by_page)
            wrong = await self._differing(loader, image, pages, progress)
            for _ in range(_WRITE_ROUNDS if loader.page_by_page else 1):
                if not wrong:
                    break
                await self._write(loader, image, wrong, progress)
                wrong = await self._misread(loader, image, wrong, progress)
        if wrong:
            raise Permanent(
                Reason.VERIFY_FAILED,
                f"{self._device.id}: {len(wrong)} pages do not hold what was written, "
                f"the first at {wrong[0].address:#x}",
            )

    async def activate(self) -> None:
        """Leave the boot loader: the application starts."""
        async with self._boot_loader():
            pass
        await self._leave()

    async def read_flash(self, address: int, length: int, progress: Progress) -> bytes:
        """``length`` bytes from ``address``. Raises Permanent(UNSUPPORTED) beyond the protocol's reach."""
        async with self._boot_loader() as loader:
            self._check_reach(loader, address + length)
            size = self._config.page_bytes or 128
            found = bytearray()
            while len(found) < length:
                # words: a boot loader may count down by two and never meet the end of an odd number
                wanted = min(size, length - len(found))
                found += await loader.read(address + len(found), wanted + wanted % 2)
                progress(Phase.READ_OUT, min(len(found), length), length)
        return bytes(found[:length])

    async def check_health(self, check: HealthCheck) -> Health:
        """Look for ``check.pattern`` in the lines since the application's start; ``property``: ask for it.

        Raises Transient(LINK_LOST), Permanent(UNSUPPORTED) for a kind of check that is not known.
        """
        if check.kind not in ("line", "property"):
            raise Permanent(Reason.UNSUPPORTED, f"health check {check.kind!r}; known: line, property")
        await self._application()
        pattern, deadline = re.compile(check.pattern), self._loop.time() + check.timeout_s
        if check.kind == "line":
            for line in self._lines:
                if pattern.search(line):
                    return Health(True, line)
            return await self._await_match(pattern, deadline)
        return await self._ask_for(pattern, check.query, deadline)

    async def reports(self) -> AsyncIterator[Reported]:
        """The lines ``name=value`` of the application. Raises Transient(LINK_LOST)."""
        await self._application()
        while True:
            line = await self._next_line(None)
            reported = parse_report(line or "")
            if reported is not None:
                yield reported

    async def rest(self) -> None:
        """Leave the board with its application running, before the port is closed."""
        await self._application()

    @asynccontextmanager
    async def _boot_loader(self, *, fresh: bool = False) -> AsyncIterator[BootLoader]:
        """The boot loader, in step; after a body that failed the next one begins with a reset."""
        if fresh or not self._boot_loader_waits():
            await self._enter()
        self._in_boot_loader = False
        yield self._loader
        self._in_boot_loader, self._talked_at = True, self._loop.time()

    def _boot_loader_waits(self) -> bool:
        return self._in_boot_loader and self._loop.time() - self._talked_at < self._loader.window_s

    async def _enter(self) -> None:
        await self._link.set_baud(self._config.baud)
        if self._config.reset == "none":
            self._link.drop_input()
        else:
            await self._link.pulse_reset()
        self._booted()
        await self._loader.sync()
        self._wrote = False

    async def _leave(self) -> None:
        self._in_boot_loader = False
        await self._loader.leave()
        self._booted()
        await self._link.set_baud(self._config.app_baud or self._config.baud)

    async def _application(self) -> None:
        if self._boot_loader_waits():
            try:
                await self._leave()
            except Transient as error:
                # it may have left by itself, earlier than most do
                if error.reason is not Reason.NO_RESPONSE:
                    raise
        self._in_boot_loader = False
        await self._link.set_baud(self._config.app_baud or self._config.baud)

    def _booted(self) -> None:
        self._booted_at = self._loop.time()
        self._lines.clear()
        self._first_lines.clear()

    async def _page_bytes(self, loader: BootLoader, segments: tuple[Segment, ...]) -> int:
        """The part's page size; nothing is written before this has passed."""
        allowed = self._device.hardware_ids
        signature = await loader.signature()
        if allowed and f"avr:{signature.hex()}" not in allowed:
            # the protocol has no checksum of its own, and the refusal is for good
            signature = await loader.signature()
        found = f"avr:{signature.hex()}"
        if allowed and found not in allowed:
            raise Permanent(
                Reason.HARDWARE_MISMATCH,
                f"{found} answered at {self._device.address}; {self._device.id} is {', '.join(allowed)}",
            )
        end = max(segment.address + segment.length for segment in segments)
        self._check_reach(loader, end)
        part = PARTS.get(signature)
        if part is None and not (self._config.page_bytes and self._device.flash_size_bytes):
            raise Permanent(
                Reason.UNSUPPORTED, f"{found} is not known here; set page_bytes and the model's flash_size"
            )
        bound = self._device.flash_size_bytes or (part.flash_bytes - part.boot_bytes if part else 0)
        if end > self._device.flash_base + bound:
            raise Permanent(
                Reason.IMAGE_TOO_LARGE,
                f"the image ends at {end:#x}; {self._device.id} has {bound} bytes beside its boot loader",
            )
        return self._config.page_bytes or (part.page_bytes if part else 0)

    def _check_reach(self, loader: BootLoader, end: int) -> None:
        if end > loader.reach_bytes:
            raise Permanent(
                Reason.UNSUPPORTED, f"{loader.name} reaches {loader.reach_bytes} bytes, not {end:#x}"
            )

    async def _differing(
        self, loader: BootLoader, image: Image, pages: list[Page], progress: Progress
    ) -> list[Page]:
        """The pages to write. Reading takes as long as writing, so a run of wrong ones ends the search; but none behind the
        last wrong one is written, since that may be the boot loader itself where ``flash_size`` reaches into it."""
        differing: list[Page] = []
        run = 0
        for number, page in enumerate(pages, 1):
            same = await self._holds(loader, image, page)
            progress(Phase.COMPARE, number * page.size, len(pages) * page.size)
            if same:
                run = 0
                continue
            differing.append(page)
            run += 1
            if run == _SURELY_ANOTHER_IMAGE or not loader.page_by_page:
                last = await self._last_differing(loader, image, pages, number, progress)
                return (differing if loader.page_by_page else pages[:number]) + pages[number:last]
        return differing

    async def _last_differing(
        self, loader: BootLoader, image: Image, pages: list[Page], number: int, progress: Progress
    ) -> int:
        """How many of ``pages`` there are up to the last one that differs; the first ``number`` are."""
        for count in range(len(pages), number, -1):
            if not await self._holds(loader, image, pages[count - 1]):
                return count
            progress(
                Phase.COMPARE, (number + len(pages) - count + 1) * pages[0].size, len(pages) * pages[0].size
            )
        return number

    async def _holds(self, loader: BootLoader, image: Image, page: Page) -> bool:
        """Read again where it seems not to: a bit that the line flipped must not cost a boot loader."""
        wanted = await page.content(image)
        for _ in range(2):
            if page.agrees(await loader.read(page.address, page.size), wanted):
                return True
        return False

    async def _write(self, loader: BootLoader, image: Image, pages: list[Page], progress: Progress) -> None:
        self._wrote = True
        for number, page in enumerate(pages, 1):
            await loader.write(page.address, await page.content(image))
            progress(Phase.WRITE, number * page.size, len(pages) * page.size)

    async def _misread(
        self, loader: BootLoader, image: Image, pages: list[Page], progress: Progress
    ) -> list[Page]:
        """Those of ``pages`` that do not hold what was written."""
        wrong = []
        for number, page in enumerate(pages, 1):
            held = await loader.read(page.address, page.size)
            if not page.agrees(held, await page.content(image)):
                wrong.append(page)
            progress(Phase.VERIFY, number * page.size, len(pages) * page.size)
        return wrong

    async def _next_line(self, timeout_s: float | None) -> str | None:
        raw = await self._link.receive(_line_length, timeout_s)
        if raw is None:
            return None
        line = raw.decode("ascii", "replace").strip("\r\n")
        self._lines.append(line)
        if len(self._first_lines) < _EVIDENCE_LINES:
            self._first_lines.append(line)
        return line

    async def _await_match(self, pattern: re.Pattern[str], deadline: float) -> Health:
        while (left := deadline - self._loop.time()) > 0:
            line = await self._next_line(left)
            if line is not None and pattern.search(line):
                return Health(True, line)
        return Health(False, self._evidence())

    def _evidence(self) -> str:
        """The first lines since the start, and the last: what crashes says why at its beginning."""
        seen = self._first_lines
        if self._lines and len(seen) == _EVIDENCE_LINES:
            seen = [*seen[:-1], self._lines[-1]]
        return "\n".join(line[:_EVIDENCE_CHARS] for line in seen)

    async def _ask_for(self, pattern: re.Pattern[str], query: str, deadline: float) -> Health:
        # a question that reaches the boot loader in place of the application can hold it there
        if not self._lines:
            await self._next_line(max(0.0, self._booted_at + self._config.boot_s - self._loop.time()))
        while True:
            await self._link.send(query.encode() + b"\n")
            health = await self._await_match(pattern, min(deadline, self._loop.time() + _ASK_AGAIN_S))
            if health.healthy or self._loop.time() >= deadline:
                return health


def parse_report(line: str) -> Reported | None:
    """A line ``name=value`` as a property, None for any other line. What is not a JSON scalar is text."""
    match = _PROPERTY.fullmatch(line)
    return Reported(match[1], _value(match[2].strip())) if match else None


def _value(text: str) -> JsonValue:
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    return _WORDS.get(text, text)


def _line_length(got: bytearray) -> int:
    end = got.find(b"\n", 0, _LINE_BYTES)
    return end + 1 if end >= 0 else min(len(got) + 1, _LINE_BYTES)

"""One device with MCUboot and an SMP server in its application: two slots, trial boot, revert.

What the slots hold and what will be booted is always asked of the device. The image that runs is never written to, and
nothing is made permanent before :meth:`SmpSession.confirm`: a device that is left alone at any moment boots an image
that was confirmed, or goes back to it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

from edged.api import (
    Desired,
    Device,
    Env,
    Health,
    HealthCheck,
    Identity,
    Image,
    JsonValue,
    Phase,
    Progress,
    Reported,
    SessionTraits,
    Slot,
    Slots,
    as_text,
)
from edged.errors import Permanent, Reason, Refused, Transient
from edged_firmware.formats import mcuboot
from edged_uart import smp
from edged_uart.link import SerialLink
from edged_uart.session import parse_report
from edged_uart.smp import ErrorAnswer
from edged_uart.smp_client import Busy, SmpClient
from edged_uart.smp_config import ALL, PROTOCOL, SETTLING_BOOTS, SmpConfig, longest_call_s
from edged_uart.smp_framing import Cobs, Console, Framing, Raw
from edged_uart.smp_kept import Kept
from edged_uart.smp_upload import Content, Pace, upload

_BITS_PER_BYTE: Final = 10
_READ_BYTES: Final = 16384
_KEPT_REPORTS: Final = 64
_LOOK_AGAIN_S: Final = 0.5

_GOES_BACK: Final = frozenset({1, 3, 5, 9})
"""Modes of MCUboot (os group, command 8, ``enum mcuboot_mode``) in which an image is tried before it stays: swap with scratch,
swap by moving, direct XIP with revert, swap by offset."""
_DIRECT_XIP: Final = 5
_TRIAL: Final = "trial"
"""What is remembered of a trial until it ends: the hash of the image that is tried, a blank, and that of the one before."""
_RESETS: Final = 3
_LOOKS: Final = 4
_NOWHERE: Final = 2**31 - 1
"""An offset in no image."""

SETTING: Final = "setting."
STATISTIC: Final = "stat."


@dataclass(frozen=True, slots=True)
class ImageState:
    """One entry of the image state. ``hash`` in hex; empty where the server does not tell it. ``image``: 0 is the one that is
    updated."""

    image: int
    slot: int
    version: str
    hash: str
    active: bool
    confirmed: bool
    pending: bool
    permanent: bool
    bootable: bool

    @property
    def name(self) -> str:
        """Its hash, and which image of the device it is where that is not the first."""
        return f"image {self.hash[:16]}" + (f" (image {self.image} of the device)" if self.image else "")


@dataclass(frozen=True, slots=True)
class State:
    """What the two slots hold, by the device's own account; an empty slot has no entry.

    ``of_application``: it is told as an application does, and not a boot loader in serial recovery (``splitStatus``).
    ``others``: the slots of the device's other images.
    """

    entries: tuple[ImageState, ...]
    of_application: bool = True
    others: tuple[ImageState, ...] = ()

    @property
    def active(self) -> ImageState | None:
        return next((entry for entry in self.entries if entry.active), None)

    @property
    def spare(self) -> ImageState | None:
        return next((entry for entry in self.entries if not entry.active), None)

    @property
    def settled(self) -> bool:
        """A confirmed image runs, and no other is to be booted."""
        is_next = self.spare is not None and (self.spare.pending or self.spare.permanent)
        return self.active is not None and self.active.confirmed and not is_next

    @property
    def permanent(self) -> ImageState | None:
        """What the next reset boots for good, though it does not run: also another image's."""
        return next((one for one in (*self.entries, *self.others) if one.permanent and not one.active), None)

    @property
    def pending(self) -> bool:
        return self.spare is not None and self.spare.pending

    def runs(self, hash_hex: str) -> bool:
        """False for an empty hash: of one that is not told nobody knows whether it is the same."""
        return hash_hex != "" and self.active is not None and self.active.hash == hash_hex

    def runs_unconfirmed(self, hash_hex: str) -> bool:
        return self.active is not None and self.runs(hash_hex) and not self.active.confirmed

    def is_way_to(self, hash_hex: str) -> bool:
        """Does that image run, or is the next reset the way to it, on trial or back?"""
        assert self.active is not None
        if self.active.hash == hash_hex:
            return not self.pending
        is_next = self.pending or not self.active.confirmed
        return is_next and self.spare is not None and self.spare.hash == hash_hex and not self.spare.permanent

    def holds(self, hash_hex: str) -> bool:
        return any(entry.hash == hash_hex for entry in self.entries)


@dataclass(frozen=True, slots=True)
class _Inspected:
    """An image that was read through once."""

    image: mcuboot.McubootImage
    file_sha256: bytes

    @property
    def hash(self) -> str:
        return self.image.hash.hex()


class SmpSession:
    """A session with one device; see :class:`edged.api.Session` and the ``Supports...`` Protocols for the contract."""

    def __init__(
        self, device: Device, config: SmpConfig, link: SerialLink, env: Env, kept: Kept | None = None
    ) -> None:
        """``kept``: of this device, by the sessions before."""
        self._device = device
        self._kept = kept or Kept()
        self._lines = self._kept.lines
        self._lines.begin_session()
        self._env = env
        self._config = config
        self._link = link
        self._told: deque[Reported] = deque(maxlen=_KEPT_REPORTS)
        self._client = SmpClient(link, make_framing(config), config.answer_s, self._hear)
        self._staged: str | None = None
        self._ran: str | None = None
        self._is_application = False
        self._complained: set[str] = set()
        self._wishes: dict[str, tuple[JsonValue, JsonValue]] = {}
        self.traits = SessionTraits(
            ceiling_bytes_per_s=config.baud / _BITS_PER_BYTE,
            slot_count=2,
            # it erases before it takes the first byte, and may have to leave an image before that, in two resets
            quiet_s=config.erase_s + longest_call_s(config),
        )

    # -- who is there

    async def identify(self) -> Identity:
        """``smp:`` and the board's name as the device tells it (``smp:unknown`` where it does not).

        Where its reset is wired, a device that says nothing for as long as a boot may take is reset, and asked once more; not
        again before it has answered.

        Raises Transient(NO_RESPONSE), Transient(LINK_LOST), Permanent(UNSUPPORTED) where the port has no lines
        for that.
        """
        await self._link.set_baud(self._config.baud)
        await self._rest_after_open()
        if not await self._is_met():
            self._kept.is_pulsed = True
            self._lines.begin_reset()
            await self._link.pulse_reset()
            await self._client.silence(self._config.quiet_s)
            await self._meet_within(self._config.boot_s)
        self._kept.is_pulsed = False
        parameters = self._client.parameters
        detail = {
            "protocol": PROTOCOL,
            "framing": self._config.framing,
            "baud": str(self._config.baud),
            "header_version": str(self._client.version),
            "buffers": f"{parameters.buffer_count} of {parameters.buffer_bytes} bytes"
            if parameters.told
            else "unknown",
        }
        board = await self._offered(smp.APPLICATION_INFO, {"format": "i"}, "output")
        kernel = await self._told_of(smp.APPLICATION_INFO, {"format": "sv"}, "output")
        if isinstance(kernel, str):
            detail["kernel"] = kernel
        if (mode := await self._boot_mode()) is not None:
            detail["boot_mode"] = str(mode)
        try:
            state = await self._state()
        except (ErrorAnswer, Busy) as error:
            detail["slots"] = error.name
        else:
            detail |= {f"slot {entry.slot}": _described(entry) for entry in state.entries}
        known = board if isinstance(board, str) and board.isprintable() else ""
        return Identity(f"smp:{known or 'unknown'}", detail=detail)

    async def slots(self) -> Slots:
        """The two slots, by the hash of what they hold. Raises Permanent(UNSUPPORTED) where it is not the application
        that answers, or it has no slots."""
        state = await self._known_state()
        active, spare = state.active, state.spare
        assert active is not None
        self._ran = active.hash
        self._lines.belong_to(active.hash)
        other = Slot(str(1 - active.slot), active=False, runs="", confirmed=False, bootable=False)
        if spare is not None:
            # a slot whose image will be booted for good is one, too, that the next reset boots
            other = Slot(
                str(spare.slot), False, spare.hash, spare.confirmed, spare.pending, bootable=spare.bootable
            )
        return Slots((Slot(str(active.slot), True, active.hash or None, active.confirmed), other))

    # -- firmware

    async def stage(self, image: Image, progress: Progress) -> None:
        """Upload ``image`` to the free slot, from the device's offset on.

        Raises, before a byte is sent: Refused(IMAGE_INVALID), Refused(HASH_MISMATCH), Refused(IMAGE_TOO_LARGE),
        Permanent(UNSUPPORTED). Afterwards: Permanent(VERIFY_FAILED) where the device does not list the image,
        Permanent(DEVICE_ERROR) where it refuses, Transient where it or the line does not answer, Transient(DEVICE_ERROR) where
        somebody else writes to the slot.
        """
        inspected = await self._inspect(image, progress)
        await self._check_device(image.size_bytes)
        state = await self._known_state()
        if not state.settled and not state.is_way_to(inspected.hash):
            state = await self._settle()
        self._check_trial(state)
        if not state.holds(inspected.hash):
            await self._upload(image, inspected, progress)
            state = await self._known_state()
        if not state.holds(inspected.hash):
            # one that is going on is seen by the first, one that has ended by the second
            is_uploading, state = await self._is_uploading(image.size_bytes), await self._known_state()
            if is_uploading or (state.spare is not None and state.spare.hash):
                raise self._another(state.spare, inspected.hash)
            raise Permanent(
                Reason.VERIFY_FAILED,
                f"{self._device.id} took all of image {inspected.hash[:16]} and lists it in no slot: "
                f"{_doubt(inspected.image)}",
            )
        self._staged = inspected.hash
        progress(Phase.WRITE, image.size_bytes, image.size_bytes)

    async def activate(self) -> None:
        """Mark what this session staged for test, reset, wait for the device.

        Raises Permanent(VERIFY_FAILED) where it is in no slot afterwards (the boot loader has thrown it away),
        Permanent(DEVICE_ERROR) where a reset would boot something for good, Transient(NO_RESPONSE) where nobody answers
        afterwards, Transient(DEVICE_ERROR) where another image is in its slot by now.
        """
        state = await self._known_state()
        assert state.active is not None
        if state.active.hash == self._staged:
            if state.pending:
                await self._settle()
            return
        if self._staged is None or state.spare is None or state.spare.hash != self._staged:
            raise self._another(state.spare, self._staged)
        self._check_trial(state)
        if state.active.confirmed:
            await self._env.remember(_TRIAL, f"{self._staged} {state.active.hash}")
            state = await self._mark(state.spare)
        state = await self._reboot(state)
        # in direct XIP an image that was tried and not confirmed is erased, too: that it does not run is all that is known
        if not state.holds(self._staged) and await self._boot_mode() != _DIRECT_XIP:
            raise self._thrown_away()

    def _another(self, spare: ImageState | None, staged: str | None) -> Transient:
        held = f"image {spare.hash[:16]}" if spare is not None and spare.hash else "nothing"
        wanted = f"image {staged[:16]}" if staged else "one that this session staged"
        return Transient(
            Reason.DEVICE_ERROR,
            f"{self._device.id} has {held} in the slot in which {wanted} should be: somebody else writes to it",
        )

    def _thrown_away(self) -> Permanent:
        return Permanent(
            Reason.VERIFY_FAILED,
            f"{self._device.id} has the image that was to be tried in no slot: its boot loader has removed it, because it is "
            "damaged, signed with a key that the device does not know, or older than the device allows",
        )

    async def confirm(self) -> None:
        """Make the running image permanent.

        Raises Transient(DEVICE_ERROR) where it is not the one that :meth:`slots` last told of, since the device has reset,
        or where the next reset boots another.
        """
        state = await self._known_state()
        assert state.active is not None
        if self._ran is not None and state.active.hash != self._ran:
            raise Transient(
                Reason.DEVICE_ERROR,
                f"{self._device.id} runs {state.active.hash[:16]}, and {self._ran[:16]} was to be confirmed: it has reset",
            )
        if state.active.confirmed and state.pending:
            raise Transient(Reason.DEVICE_ERROR, f"{self._device.id}: somebody has marked another image")
        if not state.active.confirmed:
            await self._confirm(state.active)
        await self._end_trial()

    async def _confirm(self, active: ImageState) -> None:
        # not by its hash: a device that resets now has that image in its other slot, and would be told to boot it for good
        await self._client.ask(smp.SET_IMAGE_STATE, {"confirm": True})
        after = await self._known_state()
        assert after.active is not None
        if after.active.hash != active.hash or not after.active.confirmed:
            raise Transient(
                Reason.DEVICE_ERROR, f"{self._device.id} did not confirm {active.hash[:16]}, which it ran"
            )

    async def revert(self) -> None:
        """Reset until the confirmed image runs and no other is to be booted. Where that is the one that was tried, which has
        confirmed itself, the one before is booted and confirmed, if its slot still holds it.

        Raises Transient, and Permanent(DEVICE_ERROR) where the other one is to be booted for good.
        """
        tried, _, before = (await self._env.recall(_TRIAL) or "").partition(" ")
        state = await self._known_state()
        if not state.runs_unconfirmed(before):
            state = await self._settle()
        if state.runs(tried) and state.spare is not None and state.spare.hash == before:
            self._check_trial(state)
            state = await self._reboot(await self._mark(state.spare))
        if state.runs_unconfirmed(before):
            assert state.active is not None
            await self._confirm(state.active)
        if not state.runs(tried):
            await self._end_trial()

    async def _end_trial(self) -> None:
        if await self._env.recall(_TRIAL):
            await self._env.remember(_TRIAL, "")

    # -- health and properties

    async def check_health(self, check: HealthCheck) -> Health:
        """``line``: a line of the application since its start, as far as that was heard, or from now on; ``property``: the
        value of a property by the name under which it is reported, or ``os.info`` and ``os.echo``.

        Raises Transient(LINK_LOST), Permanent(UNSUPPORTED).
        """
        pattern = re.compile(check.pattern)
        if check.kind not in ("line", "property"):
            raise Permanent(Reason.UNSUPPORTED, f"health check {check.kind!r}; known: line, property")
        if check.kind == "line" and self._config.framing != "console":
            raise Permanent(
                Reason.UNSUPPORTED,
                f"framing {self._config.framing!r} has no lines; choose a check of kind property",
            )
        seen = ""
        try:
            async with asyncio.timeout(check.timeout_s):
                while True:
                    if check.kind == "line":
                        seen = next((line for line in self._lines.newest if pattern.search(line)), "")
                    else:
                        seen = await self._seen(check.query)
                    if seen and pattern.search(seen):
                        return Health(True, seen)
                    await self._client.listen(_LOOK_AGAIN_S)
        except TimeoutError:
            return Health(False, seen or self._heard(check.kind))

    def _heard(self, kind: str) -> str:
        if kind != "line" or self._lines.is_from_start:
            return self._lines.evidence
        text = "its start was not heard, and a line that is said only then is lost"
        return f"{self._lines.evidence or 'nothing'} ({text})"

    async def reports(self) -> AsyncIterator[Reported]:
        """Image, statistics and settings each ``poll_s``, and the lines ``name=value`` of the application as they come.

        Raises Transient where the device does not answer any more.
        """
        await self._link.set_baud(self._config.baud)
        await self._rest_after_open()
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            if self._config.poll_s and loop.time() >= due:
                due = loop.time() + self._config.poll_s
                for reported in await self._poll():
                    yield reported
            while self._told:
                yield self._told.popleft()
            await self._client.listen(max(0.0, due - loop.time()) if self._config.poll_s else 3600.0)

    async def apply(self, desired: Desired) -> Reported:
        """Write a setting, let the application take it, and keep it; nothing where it has the value.

        It is told as the value that was desired, however its type rounds it. Raises Permanent(UNSUPPORTED) for what is no
        configured setting, Permanent(REQUEST_INVALID) for a value that is not of its type, Permanent(DEVICE_ERROR).
        """
        name = desired.name.removeprefix(SETTING)
        setting = self._config.settings.get(name)
        if setting is None or not desired.name.startswith(SETTING):
            known = ", ".join(SETTING + name for name in self._config.settings) or "none is configured"
            raise Permanent(Reason.UNSUPPORTED, f"{desired.name} cannot be set; what can: {known}")
        try:
            data = setting.data(desired.value)
        except ValueError as error:
            raise Permanent(Reason.REQUEST_INVALID, f"{desired.name}: {error}") from error
        if await self._offered(smp.SETTING, {"name": name}, "val") != data:
            await self._client.ask(smp.SET_SETTING, {"name": name, "val": data})
            for after in (smp.COMMIT_SETTINGS, smp.SAVE_SETTINGS):
                await self._if_offered(after)
        held = (await self._client.ask(smp.SETTING, {"name": name})).get("val")
        if held != data:
            raise Permanent(Reason.DEVICE_ERROR, f"{desired.name}: the device did not keep {desired.value!r}")
        self._wishes[desired.name] = desired.value, setting.value(data)
        return Reported(desired.name, desired.value, setting.unit)

    # -- the image state

    async def _state(self) -> State:
        body = await self._sure(smp.IMAGE_STATE)
        if not isinstance(body.get("images"), list):
            raise Transient(Reason.PROTOCOL_ERROR, f"{self._link.path}: the image state has no images")
        told = sorted(_maps(body["images"]), key=lambda entry: _number(entry, "slot"))
        return State(
            tuple(_entry(entry) for entry in told if _number(entry, "image") == 0),
            "splitStatus" in body,
            tuple(_entry(entry) for entry in told if _number(entry, "image") != 0),
        )

    async def _known_state(self) -> State:
        """The state, of an application that runs from one of two slots. One that seems to be none is asked once more: what
        follows is a reset, or the end of the job."""
        for _ in range(2):
            try:
                state = await self._state()
            except ErrorAnswer as error:
                if not error.not_offered:
                    raise
                text = f"{self._device.id} does not tell the state of its images: {error.detail}"
                raise Permanent(Reason.UNSUPPORTED, text) from error
            if state.active is not None and (state.of_application or await self._tells_of_itself()):
                self._is_application = True
                return state
        await self._leave_recovery()

    async def _tells_of_itself(self) -> bool:
        """Does it offer what an application may and a boot loader in serial recovery does not?"""
        asked: tuple[tuple[smp.Command, dict[str, object], str], ...] = (
            (smp.APPLICATION_INFO, {"format": "s"}, "output"),
            (smp.BOOTLOADER_INFO, {}, "bootloader"),
            (smp.STATISTICS_GROUPS, {}, "stat_list"),
        )
        for command, body, key in asked:
            if await self._offered(command, body, key) is not None:
                return True
        return False

    async def _leave_recovery(self) -> NoReturn:
        """A boot loader in serial recovery answers, which would overwrite the only image."""
        what = f"{self._device.id}: a boot loader in serial recovery answers, which would overwrite the only image"
        if self._is_application:
            # it got there by what was sent to it while it was booting; a reset brings the application back
            await self._client.is_told(smp.RESET)
            raise Transient(Reason.DEVICE_ERROR, f"{what}; it was reset")
        raise Permanent(
            Reason.UNSUPPORTED,
            f"{what}. If it is the application: it has to tell of itself (CONFIG_MCUMGR_GRP_OS_INFO)",
        )

    async def _boot_mode(self) -> int | None:
        mode = await self._offered(smp.BOOTLOADER_INFO, {"query": "mode"}, "mode")
        return mode if isinstance(mode, int) else None

    async def _check_device(self, size_bytes: int) -> None:
        """Is there a slot that is large enough, and a way back?"""
        mode = await self._boot_mode()
        if mode is not None and mode not in _GOES_BACK:
            raise Permanent(
                Reason.UNSUPPORTED,
                f"the boot loader of {self._device.id} cannot go back (mode {mode}); "
                "it has to be built for swapping, or for direct XIP with revert",
            )
        if mode is None and self._config.boot_loader == "tells":
            raise Permanent(
                Reason.UNSUPPORTED,
                f"{self._device.id} does not tell whether its boot loader goes back from what is not confirmed; "
                "build it with CONFIG_MCUMGR_GRP_OS_BOOTLOADER_INFO, or say boot_loader = 'reverts' where it does",
            )
        images = await self._offered(smp.SLOT_INFO, {}, "images")
        for entry in _maps(images):
            if _number(entry, "image") != 0:
                continue
            slots = _maps(entry.get("slots"))
            if len(slots) < 2:
                raise Permanent(Reason.UNSUPPORTED, f"{self._device.id} has {len(slots)} slots, not two")
            sizes = [_number(slot, "size") for slot in slots if _number(slot, "size")]
            bounds = [*sizes, _number(entry, "max_image_size") or size_bytes]
            if min(bounds) < size_bytes:
                raise Refused(
                    Reason.IMAGE_TOO_LARGE,
                    f"the image has {size_bytes} bytes; a slot of {self._device.id} has room for {min(bounds)}",
                )

    async def _inspect(self, image: Image, progress: Progress) -> _Inspected:
        """Read all of the image, and check it. Raises Refused."""
        if len(image.segments) != 1:
            raise Refused(
                Reason.IMAGE_INVALID, f"an MCUboot image is one segment; this one has {len(image.segments)}"
            )
        size = image.size_bytes
        header = mcuboot.parse_header(await image.read(0, 0, min(size, mcuboot.HEADER_BYTES)), size)
        tlvs_at = header.signed_bytes - header.protected_bytes
        parsed = mcuboot.parse_tlvs(header, await image.read(0, tlvs_at, size - tlvs_at))
        digest, whole = parsed.new_digest(), hashlib.sha256()
        for at in range(0, size, _READ_BYTES):
            data = await image.read(0, at, min(_READ_BYTES, size - at))
            whole.update(data)
            digest.update(data[: max(0, header.signed_bytes - at)])
            progress(Phase.COMPARE, at + len(data), size)
        parsed.check(digest)
        return _Inspected(parsed, whole.digest())

    async def _upload(self, image: Image, inspected: _Inspected, progress: Progress) -> None:
        config, size = self._config, image.size_bytes

        async def read(offset: int, length: int) -> bytes:
            return await image.read(0, offset, length)

        async def is_listed() -> bool:
            return (await self._known_state()).holds(inspected.hash)

        pace = Pace(
            config.erase_s,
            config.answer_s,
            _BITS_PER_BYTE / config.baud,
            config.window or self._client.parameters.window,
        )
        content = Content(read, is_listed, size, inspected.file_sha256)
        try:
            match = await upload(
                self._client, content, pace, lambda offset: progress(Phase.WRITE, offset, size)
            )
        except ErrorAnswer as error:
            if error.is_too_large:
                raise Refused(
                    Reason.IMAGE_TOO_LARGE, f"the image has {size} bytes; {error.detail}"
                ) from error
            raise
        if match is False:
            # it would be listed as if it were whole
            text = f"{self._device.id} has other bytes in its slot than were sent to it"
            if await self._is_erased(await self._known_state()):
                raise Transient(Reason.PROTOCOL_ERROR, text)
            raise Permanent(Reason.VERIFY_FAILED, text)

    async def _is_uploading(self, size_bytes: int) -> bool:
        """Is it in the middle of an upload that is not the one of ``size_bytes``, which was ended? What is sent from an offset
        where it is not is dropped, and answered by the one where it is."""
        offset = await self._offered(smp.UPLOAD, {"off": _NOWHERE, "data": b""}, "off")
        return isinstance(offset, int) and offset not in (0, size_bytes)

    async def _mark(self, spare: ImageState) -> State:
        """Mark the image in the spare slot for test; it is so afterwards, or an error says why not."""
        if not spare.pending:
            try:
                await self._client.ask(
                    smp.SET_IMAGE_STATE, {"hash": bytes.fromhex(spare.hash), "confirm": False}
                )
            except ErrorAnswer:
                # the answer to an earlier try may have been lost, or the image is gone
                state = await self._known_state()
                if not state.pending and state.holds(spare.hash):
                    raise
        state = await self._known_state()
        if not state.holds(spare.hash):
            raise self._another(state.spare, spare.hash)
        if state.spare is None or state.spare.permanent or not state.pending:
            raise Permanent(
                Reason.DEVICE_ERROR,
                f"{self._device.id} was told to try image {spare.hash[:16]}, and would "
                f"{'keep it without a trial' if state.spare and state.spare.permanent else 'not boot it'}",
            )
        return state

    async def _settle(self) -> State:
        """A state in which a confirmed image runs and no other is to be booted.

        What is pending is erased where the device allows that; else it is booted on trial, and left.
        """
        for _ in range(SETTLING_BOOTS):
            state = await self._known_state()
            if state.settled:
                return state
            if state.pending and await self._is_erased(state):
                continue
            self._check_trial(state)
            await self._reboot(state)
        state = await self._known_state()
        if not state.settled:
            raise Transient(
                Reason.DEVICE_ERROR,
                f"{self._device.id} does not leave the image that it tries, after {SETTLING_BOOTS} resets",
            )
        self._check_trial(state)
        return state

    def _check_trial(self, state: State) -> None:
        """Raises Permanent(DEVICE_ERROR) where a reset would make something permanent that does not run."""
        if state.permanent is not None:
            raise Permanent(
                Reason.DEVICE_ERROR,
                f"{self._device.id} is going to boot {state.permanent.name} for good at its next reset, without a trial: "
                "somebody has confirmed it, and the device does not let it be erased",
            )

    async def _is_erased(self, state: State) -> bool:
        """Erase the slot that does not run. False where the device does not allow it."""
        assert state.active is not None
        try:
            slot = 1 - state.active.slot
            await self._client.ask(smp.ERASE, {"slot": slot}, tries=1, answer_s=self._config.erase_s)
        except ErrorAnswer:
            return False
        return True

    # -- reset

    async def _rest_after_open(self) -> None:
        """Where the port's lines reset the device, opening the port may have done so."""
        if self._config.reset == "dtr" and not self._client.version:
            await self._client.silence(self._config.quiet_s)

    async def _is_met(self) -> bool:
        """False where nobody answers and a reset may help. One that boots, perhaps on trial, must not be reset meanwhile."""
        is_wired = self._config.reset == "dtr" and not self._kept.is_pulsed
        try:
            await self._meet_within(self._config.boot_s if is_wired else 0.0)
        except Transient as error:
            if error.reason is not Reason.NO_RESPONSE or not is_wired:
                raise
            return False
        return True

    async def _meet_within(self, timeout_s: float) -> None:
        """Ask at least once. Raises Transient(NO_RESPONSE) where nobody answers within ``timeout_s``."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while True:
            try:
                return await self._client.meet()
            except Transient as error:
                if error.reason is not Reason.NO_RESPONSE or loop.time() >= end:
                    raise

    async def _reboot(self, before: State) -> State:
        """Reset, and wait until the device answers with another state than ``before``.

        Raises Transient(NO_RESPONSE) where nobody answers, Transient(DEVICE_ERROR) where it does not reset.
        """
        for _ in range(_RESETS):
            is_heard = await self._client.is_told(smp.RESET)
            state = await self._awaited(before, is_heard)
            if state is None and self._config.reset == "dtr":
                await self._link.pulse_reset()
                state = await self._awaited(before, True)
            if state is None:
                said = f"; it said: {self._lines.evidence}" if self._lines.evidence else ""
                raise Transient(
                    Reason.NO_RESPONSE,
                    f"{self._device.id} did not answer within {self._config.boot_s:g} s after its reset{said}",
                )
            if state != before:
                return state
        raise Transient(
            Reason.DEVICE_ERROR, f"{self._device.id} was told to reset {_RESETS} times, and did not"
        )

    async def _awaited(self, before: State, is_heard: bool) -> State | None:
        """The first state that is another than ``before``; else the last that was told within ``boot_s``, None where none
        was. ``is_heard``: else what still answers has not heard that it should reset."""
        loop = asyncio.get_running_loop()
        self._lines.begin_reset()
        await self._client.silence(self._config.quiet_s)
        end, state = loop.time() + self._config.boot_s, None
        while loop.time() < end:
            self._client.forget()
            try:
                state = await self._state()
            except Transient as error:
                if error.reason is not Reason.NO_RESPONSE:
                    raise
                continue
            if state != before:
                self._lines.belong_to(state.active.hash if state.active else "")
                return state
            if not is_heard:
                return state
            # what still answers has not reset yet
            await self._client.silence(_LOOK_AGAIN_S)
        return state

    # -- properties

    async def _poll(self) -> list[Reported]:
        image, statistics = await self._image_reports(), await self._statistics()
        settings = [self._as_desired(one) for one in await self._settings(self._config.settings)]
        return [*image, *statistics, *settings]

    async def _image_reports(self) -> list[Reported]:
        try:
            active = (await self._state()).active
        except (ErrorAnswer, Busy):
            return []
        if active is None:
            return []
        return [
            Reported("image.version", active.version),
            Reported("image.hash", active.hash),
            Reported("image.confirmed", active.confirmed),
        ]

    async def _statistics(self) -> list[Reported]:
        names: object = list(self._config.statistics)
        if names == [ALL]:
            names = await self._told_of(smp.STATISTICS_GROUPS, {}, "stat_list")
        return [
            reported
            for name in (names if isinstance(names, list) else ())
            if isinstance(name, str)
            for reported in await self._statistics_of(name)
        ]

    async def _statistics_of(self, group: str) -> list[Reported]:
        fields = await self._told_of(smp.STATISTICS, {"name": group}, "fields")
        named = fields.items() if isinstance(fields, dict) else ()
        return [
            Reported(f"{STATISTIC}{group}.{key}", value) for key, value in named if isinstance(value, int)
        ]

    async def _settings(self, names: Iterable[str]) -> list[Reported]:
        found = []
        for name in names:
            setting = self._config.settings.get(name)
            data = await self._told_of(smp.SETTING, {"name": name}, "val") if setting else None
            if setting is not None and isinstance(data, bytes):
                try:
                    found.append(Reported(SETTING + name, setting.value(data), setting.unit))
                except ValueError as error:
                    self._complain(name, error)
        return found

    def _as_desired(self, reported: Reported) -> Reported:
        """With the value that was desired, where the device has what its type can hold of it."""
        desired, told = self._wishes.get(reported.name, (None, None))
        return replace(reported, value=desired) if told is not None and told == reported.value else reported

    def _complain(self, setting: str, error: ValueError) -> None:
        """Once for each setting: it is asked for again and again."""
        if setting not in self._complained:
            self._complained.add(setting)
            self._env.log.warning("a setting is not of its type", extra={"detail": f"{setting}: {error}"})

    async def _seen(self, query: str) -> str:
        """The value of a property as text; empty where the device does not answer or has none of that name."""
        try:
            if query == "os.info":
                return str(await self._told_of(smp.APPLICATION_INFO, {"format": "a"}, "output") or "")
            if query == "os.echo":
                return str(await self._told_of(smp.ECHO, {"d": query}, "r") or "")
            found = [one for one in await self._asked(query) if one.name == query]
        except Transient as error:
            if error.reason is not Reason.NO_RESPONSE:
                raise
            self._client.forget()
            return ""
        return as_text(found[0].value) if found else ""

    async def _asked(self, query: str) -> list[Reported]:
        """The properties among which ``query`` is, and few others: what is wrong with one must not matter for another."""
        if query.startswith(SETTING):
            return await self._settings([query.removeprefix(SETTING)])
        if query.startswith(STATISTIC):
            return await self._statistics_of(query.removeprefix(STATISTIC).rpartition(".")[0])
        return await self._image_reports()

    async def _told_of(self, command: smp.Command, body: Mapping[str, object], key: str) -> Any:
        """What the answer has under ``key``; None where the server does not offer this, or has no room for it: one property
        that cannot be had is left out, and the others are told."""
        try:
            return (await self._client.ask(command, body)).get(key)
        except (ErrorAnswer, Busy):
            return None

    async def _offered(self, command: smp.Command, body: Mapping[str, object], key: str) -> Any:
        """What the answer has under ``key``; None where the server does not offer this. Raises Busy."""
        try:
            return (await self._sure(command, body)).get(key)
        except ErrorAnswer:
            return None

    async def _sure(
        self, command: smp.Command, body: Mapping[str, object] | None = None
    ) -> Mapping[str, Any]:
        """The body of the answer. In raw framing, which has no checksum, what is answered twice in a row: a bit that is turned
        on the wire must not end a job. Raises as :meth:`SmpClient.ask`, and Transient(PROTOCOL_ERROR)."""
        told = await self._answer(command, body)
        if self._config.framing == "raw":
            for _ in range(_LOOKS):
                before, told = told, await self._answer(command, body)
                if str(before) == str(told):
                    break
            else:
                raise Transient(
                    Reason.PROTOCOL_ERROR,
                    f"{self._link.path}: {command} is answered in another way each time; raw framing has no checksum",
                )
        if isinstance(told, ErrorAnswer):
            raise told
        return told

    async def _answer(
        self, command: smp.Command, body: Mapping[str, object] | None
    ) -> Mapping[str, Any] | ErrorAnswer:
        try:
            return await self._client.ask(command, body)
        except ErrorAnswer as error:
            return error

    async def _if_offered(self, command: smp.Command) -> None:
        try:
            await self._client.ask(command)
        except ErrorAnswer as error:
            if not error.not_offered:
                raise

    # -- lines of the application

    def _hear(self, line: str) -> None:
        self._lines.take(line)
        reported = parse_report(line)
        if reported is not None:
            self._told.append(reported)


def make_framing(config: SmpConfig) -> Framing:
    """The framing that ``config`` names."""
    match config.framing:
        case "raw":
            return Raw()
        case "cobs":
            return Cobs()
        case _:
            return Console(config.line_bytes)


def _entry(entry: Mapping[str, Any]) -> ImageState:
    digest = entry.get("hash")
    return ImageState(
        image=_number(entry, "image"),
        slot=_number(entry, "slot"),
        version=str(entry.get("version", "")),
        hash=digest.hex() if isinstance(digest, bytes) else "",
        active=entry.get("active") is True,
        confirmed=entry.get("confirmed") is True,
        pending=entry.get("pending") is True,
        permanent=entry.get("permanent") is True,
        bootable=entry.get("bootable") is True,
    )


def _maps(value: object) -> list[Mapping[str, Any]]:
    """The maps in a list; what else a device may put there is nothing."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _number(entry: Mapping[str, Any], key: str) -> int:
    value = entry.get(key, 0)
    return value if isinstance(value, int) else 0


def _described(entry: ImageState) -> str:
    marks = [name for name in ("active", "confirmed", "pending") if getattr(entry, name)]
    return " ".join([entry.version, entry.hash[:16], *marks])


def _doubt(image: mcuboot.McubootImage) -> str:
    if image.signature is None:
        return "it is not signed, and the device wants a signature, or it is made for another board"
    key = f" ({image.key_hash.hex()[:16]})" if image.key_hash else ""
    return f"it is signed ({image.signature}) with a key{key} that the device does not know, or made for another board"

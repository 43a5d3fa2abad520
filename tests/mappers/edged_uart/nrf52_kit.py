"""A device whose boot loader is a real MCUboot that checks signatures (RSA-2048), on a simulated nRF52832.

The boot loader and two images, signed with the key that it knows, were built by others for an nRF52 development kit; they lie
in the source distribution of ``smpclient``. Each boot of the device runs that boot loader over the whole flash
(``mcuboot_nrf52.py``), to the first instruction of an application. In the application's place is our own SMP server: it
marks slots as Zephyr's does, with the trailer that MCUboot's design document lays down ("Image Trailer").
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from peer_kit import peer_python
from smp_server import SmpServer
from zephyr_kit import flash_of, imgtool, run_quietly, signed, unpacked

from edged_firmware.formats import mcuboot

FLASH_BYTES: Final = 0x80000
SLOT_BYTES: Final = 0x37000
SLOTS: Final = (0xC000, 0x43000)
_BOARD: Final = "examples/duts/nrf52dk_nrf52832/ble"
_MAGIC: Final = bytes.fromhex("77c295f360d2ef7f3552500f2cb67980")
_MAGIC_AT: Final = SLOT_BYTES - len(_MAGIC)
_IMAGE_OK_AT: Final = _MAGIC_AT - 8
_COPY_DONE_AT: Final = _MAGIC_AT - 16
_SWAP_INFO_AT: Final = _MAGIC_AT - 24
_SET: Final = 1
_TEST, _PERMANENT = 2, 3


@cache
def factory_flash() -> bytes:
    """Boot loader, and the first image in slot 0."""
    return flash_of(unpacked(f"{_BOARD}/a_smp_dut.merged.hex"), FLASH_BYTES)


@cache
def first_image() -> bytes:
    """The one in the factory's flash; its signature is not that of the same image in a file of its own."""
    return factory_flash()[SLOTS[0] :][: unpacked(f"{_BOARD}/a_smp_dut.bin").stat().st_size]


@cache
def second_image() -> bytes:
    return unpacked(f"{_BOARD}/b_smp_dut.bin").read_bytes()


def signed_with_another_key(folder: Path) -> bytes:
    """The second image, with a signature of a key that was just made."""
    key = folder / "another-key.pem"
    run_quietly(imgtool(), "keygen", "--key", key, "--type", "rsa-2048")
    return resigned("--key", str(key))


def resigned(*arguments: str) -> bytes:
    """The second image with what imgtool's ``arguments`` say (nothing: no signature) in place of its signature."""
    image = second_image()
    header = mcuboot.parse(image).header
    body = image[int.from_bytes(image[8:10], "little") : header.signed_bytes]
    return signed("0.0.0", "--slot-size", hex(SLOT_BYTES), *arguments, body=body)


@dataclass(frozen=True, slots=True)
class Boot:
    """How one boot ended: ``application``, ``cut`` (the power), ``no image``, ``reset`` or ``fault``. ``at``: where the
    processor was. ``changes``: words written to the flash, and pages of it erased. ``said``: the boot loader's log."""

    end: str
    at: int
    changes: int
    said: str
    detail: str = ""


def boot(flash: bytes, *, cut_at: int = 0, torn: bool = False) -> tuple[bytes, Boot]:
    """What the flash holds after a boot. ``cut_at``: the power goes at that change of it; ``torn``: with half of it done."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "flash.bin"
        file.write_bytes(flash)
        settings = {"flash": str(file), "application_at": SLOTS[0], "cut_at": cut_at, "torn": torn}
        ran = subprocess.run(
            [peer_python("unicorn"), Path(__file__).with_name("mcuboot_nrf52.py")],
            input=json.dumps(settings), stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        ended = Boot(**json.loads(ran.stdout))
        assert ended.end != "fault", ended
        return file.read_bytes(), ended


def with_pending(flash: bytes, image: bytes) -> bytes:
    """``flash`` with ``image`` in slot 1, to be tried at the next boot."""
    slot = bytearray(image.ljust(SLOT_BYTES, b"\xff"))
    _mark(slot, _TEST)
    return flash[: SLOTS[1]] + slot + flash[SLOTS[1] + SLOT_BYTES :]


def runs(flash: bytes) -> bytes:
    """The one of the two images that is in slot 0, whole; empty where neither is."""
    known = (first_image(), second_image())
    return next((image for image in known if flash[SLOTS[0] :][: len(image)] == image), b"")


def _mark(slot: bytearray, swap: int) -> None:
    slot[_MAGIC_AT:] = _MAGIC
    slot[_SWAP_INFO_AT] = swap
    if swap == _PERMANENT:
        slot[_IMAGE_OK_AT] = _SET


class McubootServer(SmpServer):
    """The device. ``boots``: how each boot ended. ``cuts``: during the boot of that number, 1 being the first, the power goes
    at these changes of the flash, one after the other, and comes back at once; every other time half of the change is done."""

    def __init__(
        self, folder: Path, *, cuts: Mapping[int, Sequence[int]] | None = None, **options: Any
    ) -> None:
        super().__init__(folder, b"", slot_bytes=SLOT_BYTES, mode=3, buffer_bytes=2048, **options)
        self.boots: list[Boot] = []
        self._cuts = cuts or {}
        self._keep(factory_flash())

    @property
    def flash(self) -> bytes:
        flash = bytearray(factory_flash())
        for at, slot in zip(SLOTS, self.slots, strict=True):
            flash[at : at + SLOT_BYTES] = slot
        return bytes(flash)

    def _keep(self, flash: bytes) -> None:
        for at, slot in zip(SLOTS, self.slots, strict=True):
            slot[:] = flash[at : at + SLOT_BYTES]
        self._look()

    def _look(self) -> None:
        """What the trailers say, as MCUboot reads them."""
        running, other = self.slots
        self.pending = other[_MAGIC_AT:] == _MAGIC
        self.permanent = self.pending and other[_IMAGE_OK_AT] == _SET
        tried = running[_MAGIC_AT:] == _MAGIC and running[_COPY_DONE_AT] == _SET
        self.confirmed = not tried or running[_IMAGE_OK_AT] == _SET

    def _boot(self) -> None:
        super()._boot()
        self._hangs = self._hangs or self.boots[-1].end != "application"

    def _swap(self) -> None:
        self.counts.boots += 1
        before = bytes(self.slots[0])
        for number, cut_at in enumerate((*self._cuts.get(self.counts.boots, ()), 0)):
            flash, ended = boot(self.flash, cut_at=cut_at, torn=number % 2 == 1)
            self.boots.append(ended)
            self._keep(flash)
        self.counts.trial_boots += not self.confirmed and self.slots[0] != before

    def _confirm(self) -> None:
        if self.slots[0][_MAGIC_AT:] == _MAGIC:
            self.slots[0][_IMAGE_OK_AT] = _SET
        self._look()

    def _set_pending(self, permanent: bool) -> None:
        _mark(self.slots[1], _PERMANENT if permanent else _TEST)
        self._look()

"""AVR parts by their signature: what must be known to write their flash. From the data sheets; no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Part:
    """One part. Sizes in bytes; ``boot_bytes`` is the largest boot section that its fuses allow."""

    name: str
    flash_bytes: int
    page_bytes: int
    boot_bytes: int


PARTS: Final[dict[bytes, Part]] = {
    bytes.fromhex("1e9307"): Part("ATmega8", 8192, 64, 2048),
    bytes.fromhex("1e930a"): Part("ATmega88", 8192, 64, 2048),
    bytes.fromhex("1e930f"): Part("ATmega88P", 8192, 64, 2048),
    bytes.fromhex("1e9406"): Part("ATmega168", 16384, 128, 2048),
    bytes.fromhex("1e940b"): Part("ATmega168P", 16384, 128, 2048),
    bytes.fromhex("1e9514"): Part("ATmega328", 32768, 128, 4096),
    bytes.fromhex("1e950f"): Part("ATmega328P", 32768, 128, 4096),
    bytes.fromhex("1e960a"): Part("ATmega644P", 65536, 256, 8192),
    bytes.fromhex("1e9703"): Part("ATmega1280", 131072, 256, 8192),
    bytes.fromhex("1e9705"): Part("ATmega1284P", 131072, 256, 8192),
    bytes.fromhex("1e9801"): Part("ATmega2560", 262144, 256, 8192),
}

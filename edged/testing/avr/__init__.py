"""A simulated ATmega with a boot loader that others wrote, on a pseudo terminal, in real time.

The peer for tests of the serial mappers: Debian's libsimavr runs Debian's optiboot, ATmegaBOOT or stk500boot;
the application is ours. It needs the packages that :func:`missing_packages` names and builds its host program
into a cache folder at first use. ``host.c`` says what is modelled and what is not.

Not for benchmarks of many ports: a board takes a fifth of a core while bytes move, a tenth while its flash
is empty, and less than a hundredth while its application sleeps.
"""

from __future__ import annotations

from edged.testing.avr.boards import ATMEGABOOT_328P, OPTIBOOT_328P, STK500BOOT_2560, Board
from edged.testing.avr.build import (
    SimulatorError,
    boot_code,
    build_app,
    build_host,
    cache_folder,
    missing_packages,
)
from edged.testing.avr.simulated import AvrStats, SimulatedAvr

__all__ = [
    "ATMEGABOOT_328P",
    "OPTIBOOT_328P",
    "STK500BOOT_2560",
    "AvrStats",
    "Board",
    "SimulatedAvr",
    "SimulatorError",
    "boot_code",
    "build_app",
    "build_host",
    "cache_folder",
    "missing_packages",
]

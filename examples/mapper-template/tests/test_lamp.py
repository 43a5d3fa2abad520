"""Every check of the conformance kit, on a simulated lamp; and the plugin as the daemon finds it."""

import asyncio

import edged_lamp
import pytest
from simulated_lamp import simulated_lamp

import edged_uart
from edged.api import Device
from edged.plugins import discover
from edged.testing.conformance import Check, Subject
from edged.testing.fake import FakeDevice, fake_app


async def check_lamp(check: Check) -> None:
    hardware = FakeDevice("lamp-1", hardware_id="lamp:1", page_bytes=edged_lamp.PAGE_BYTES)
    hardware.install(fake_app("0.2.0"))
    plugins = discover([("wires", edged_uart), ("lamp under test", edged_lamp)])
    async with simulated_lamp(hardware) as lamp:
        subject = Subject(
            spec=plugins.mapper("lamp"),
            links=plugins.links,
            device=Device("lamp-1", "lamp", "lamp", lamp.address, flash_size_bytes=hardware.size_bytes),
            first=[(0, fake_app("1.0.0", 1024))],
            second=[(0, fake_app("2.0.0", 1024))],
            sent=lambda: bytes(hardware.tap),
            holds=lambda address, length: bytes(hardware.slots[0][address : address + length]),
            written=lambda: hardware.counts.received,
            unit_bytes=edged_lamp.PAGE_BYTES,
            unplug=lamp.unplug,
            plug=lamp.plug,
            mute=lamp.mute,
            unmute=lamp.unmute,
        )
        await check(subject)


def test_conformance(edged_conformance: Check) -> None:
    asyncio.run(check_lamp(edged_conformance))


def test_a_key_that_is_not_known_is_an_error() -> None:
    (spec,) = edged_lamp.edged_mappers()
    with pytest.raises(ValueError, match="colour: found an unknown key"):
        spec.parse_config({"colour": "red"})

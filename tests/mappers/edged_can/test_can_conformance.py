"""The kit for mappers: two controllers on one bus."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from can_kit import Unpluggable, bus_name, device, on_bus, secret, subject
from uds_server import Controller, Wiring

from edged.testing.conformance import Check

OTHER = Wiring(receives=0x7E1, sends=0x7E9)


def test_conformance(edged_conformance: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret(monkeypatch, tmp_path)
    bus, wire = bus_name(), Unpluggable()
    with (
        on_bus(bus, Controller(), wire=wire) as server,
        on_bus(bus, Controller(serial=b"SN0002"), OTHER),
    ):
        polled = [{"name": "pressure", "did": 0x0101, "type": "u16", "poll_s": 0.05}]
        to = device(f"can:virtual@{bus}", properties=polled, answer_s=1)
        other = device(f"can:virtual@{bus}", "other", OTHER, answer_s=1)
        asyncio.run(edged_conformance(subject(server, to, other, wire)))

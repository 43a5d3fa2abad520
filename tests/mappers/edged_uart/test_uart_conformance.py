"""The kit for mappers, on real boot loaders."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from uart_kit import app, needs_avr, subject

from edged.testing.avr import ATMEGABOOT_328P, OPTIBOOT_328P, STK500BOOT_2560, Board, SimulatedAvr
from edged.testing.conformance import Check, goes_on_from_the_device

pytestmark = needs_avr


@pytest.mark.parametrize("board", [OPTIBOOT_328P, ATMEGABOOT_328P, STK500BOOT_2560], ids=lambda b: b.name)
def test_conformance(board: Board, edged_conformance: Check, tmp_path: Path) -> None:
    if board is STK500BOOT_2560 and edged_conformance is goes_on_from_the_device:
        pytest.skip("stk500boot cannot go on in the middle; test_uart_session bounds what that costs")
    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0"), tap=True) as avr:
        asyncio.run(check(edged_conformance, avr))


async def check(conformance: Check, avr: SimulatedAvr) -> None:
    await conformance(subject(avr))

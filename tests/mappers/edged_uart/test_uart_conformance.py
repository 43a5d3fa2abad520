"""The kit for mappers, on real boot loaders."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from uart_kit import app, needs_avr, subject

from edged.testing.avr import ATMEGABOOT_328P, OPTIBOOT_328P, STK500BOOT_2560, Board, SimulatedAvr
from edged.testing.conformance import Check

pytestmark = needs_avr


@pytest.mark.parametrize("board", [OPTIBOOT_328P, ATMEGABOOT_328P, STK500BOOT_2560], ids=lambda b: b.name)
def test_conformance(board: Board, edged_conformance: Check, tmp_path: Path) -> None:
    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0"), tap=True) as avr:
        asyncio.run(check(edged_conformance, avr))


async def check(conformance: Check, avr: SimulatedAvr) -> None:
    # stk500boot erases from page 0 in each of its lives: it cannot go on in the middle
    await conformance(replace(subject(avr), resumes=avr.board is not STK500BOOT_2560))

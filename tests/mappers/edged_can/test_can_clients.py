"""The server of these tests is flashed by clients that others wrote, so that it is no mirror of the mapper: udsoncan with
can-isotp's own stack. And the mapper speaks to can-isotp's side of ISO-TP, in every addressing that there is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import isotp
import pytest
import udsoncan
from can_kit import bus_name, connected, device, on_bus, quiet, secret, verified, virtual
from uds_server import SECRET, Controller, Wiring, make_app
from udsoncan.client import Client
from udsoncan.connections import PythonIsoTpConnection
from udsoncan.exceptions import NegativeResponseException

from edged.links import LinkPool, device_env
from edged_can.transport import Peer, Shape

APP = make_app("1.2.0", (1200, 600))
WIRINGS = {
    "11 bits": Wiring(),
    "29 bits": Wiring(receives=0x18DA10F1, sends=0x18DAF110, extended=True),
    "extended addressing": Wiring(receives=0x6F1, sends=0x612, own=0x12, tester=0xF1),
    "extended addressing, 29 bits": Wiring(
        receives=0x18DA10F1, sends=0x18DAF110, extended=True, own=0x12, tester=0xF1
    ),
    "flow control": Wiring(block_size=5, st_min=0xF3),
    "without padding": Wiring(padding=None),
    "FD": Wiring(fd=True, frame_bytes=64),
}
UNHURRIED = {"rx_flowcontrol_timeout": 20_000, "rx_consecutive_frame_timeout": 20_000}
"""N_Bs and N_Cr of others, which a machine with other work does not keep either."""


def address(wiring: Wiring) -> isotp.Address:
    """As the tester sees it."""
    modes = isotp.AddressingMode
    if wiring.own is None:
        mode = modes.Normal_29bits if wiring.extended else modes.Normal_11bits
        return isotp.Address(mode, txid=wiring.receives, rxid=wiring.sends)
    mode = modes.Extended_29bits if wiring.extended else modes.Extended_11bits
    return isotp.Address(
        mode,
        txid=wiring.receives,
        rxid=wiring.sends,
        target_address=wiring.own,
        source_address=wiring.tester,
    )


@contextmanager
def udsoncan_client(bus: Any, wiring: Wiring) -> Iterator[Client]:
    params: dict[str, Any] = {"tx_padding": 0xCC, "blocking_send": False, **UNHURRIED}
    if wiring.fd:
        params |= {"can_fd": True, "tx_data_length": 64}
    stack = isotp.CanStack(bus=bus, address=address(wiring), params=params)
    config = dict(udsoncan.configs.default_client_config)
    config |= {
        "security_algo": lambda level, seed, params=None: bytes(
            a ^ b for a, b in zip(seed, SECRET, strict=True)
        ),
        "data_identifiers": {0xF191: udsoncan.AsciiCodec(5), 0xF189: udsoncan.AsciiCodec(5)},
        # the 50 ms that the server promises are not kept by a machine with other work
        "use_server_timing": False,
        "p2_timeout": 20,
        "server_address_format": 32,
        "server_memorysize_format": 32,
    }
    with Client(PythonIsoTpConnection(stack), request_timeout=20, config=config) as client:
        yield client


def flash_by_udsoncan(client: Client, segments: list[tuple[int, bytes]]) -> None:
    """The programming sequence, as somebody writes it with udsoncan."""
    client.change_session(3)
    client.control_dtc_setting(2)
    client.communication_control(3, 1)
    client.change_session(2)
    client.unlock_security_access(1)
    for at, data in segments:
        extent = b"\x44" + at.to_bytes(4, "big") + len(data).to_bytes(4, "big")
        client.start_routine(0xFF00, extent)
        download = client.request_download(udsoncan.MemoryLocation(at, len(data), 32, 32))
        size = download.service_data.max_length - 2
        for number, offset in enumerate(range(0, len(data), size), 1):
            client.transfer_data(number & 0xFF, data[offset : offset + size])
        client.request_transfer_exit()
    checked = client.start_routine(0xFF01)
    assert checked.service_data.routine_status_record == b"\x00"
    client.ecu_reset(1)


@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=list(WIRINGS))
def test_udsoncan_flashes_the_server(wiring: Wiring) -> None:
    name, controller = bus_name(), Controller()
    bus = virtual(name)
    with on_bus(name, controller, wiring), udsoncan_client(bus, wiring) as client:
        assert client.read_data_by_identifier(0xF191).service_data.values[0xF191] == "ECU-7"
        with pytest.raises(NegativeResponseException) as caught:
            client.read_data_by_identifier(0xF189)
        assert caught.value.response.code == 0x31
        flash_by_udsoncan(client, APP)
    bus.shutdown()
    assert controller.runs == b"1.2.0"
    assert all(controller.held(at, len(data)) == data for at, data in APP)


@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=list(WIRINGS))
def test_the_mapper_flashes_the_server(
    wiring: Wiring, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret(monkeypatch, tmp_path)
    name, controller = bus_name(), Controller()
    rates = "@500000/2000000" if wiring.fd else ""
    to = device(f"can:virtual@{name}{rates}", wiring=wiring, fd=wiring.fd, padding=wiring.padding or False)

    async def body() -> None:
        async with connected(to) as session:
            assert (await session.identify()).hardware_id == "uds:ECU-7"
            await session.stage(await verified(APP), quiet)
            await session.activate()
            assert (await session.slots()).active.runs == "1.2.0"  # type: ignore[union-attr]

    with on_bus(name, controller, wiring):
        asyncio.run(body())
    assert controller.runs == b"1.2.0"


def test_block_counters_go_round(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 blocks and more in a segment: after 0xFF comes 0x00 (ISO 14229-1, 14.5.2.2)."""
    secret(monkeypatch, tmp_path)
    name, controller, app = bus_name(), Controller(longest_block=18), make_app("1.2.0", (5000,))

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}")) as session:
            await session.stage(await verified(app), quiet)

    with on_bus(name, controller):
        asyncio.run(body())
    assert controller.counts.blocks == 313 and controller.counts.downloads == 1
    assert all(controller.held(at, len(data)) == data for at, data in app)


@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=list(WIRINGS))
def test_messages_of_any_length_go_to_and_fro(wiring: Wiring) -> None:
    """can-isotp's own transport layer, with its own threads, echoes what it gets."""
    name = bus_name()
    bus = virtual(name)
    mirrored = Wiring(
        receives=wiring.sends,
        sends=wiring.receives,
        extended=wiring.extended,
        own=wiring.tester,
        tester=wiring.own,
    )
    params: dict[str, Any] = {
        "blocksize": wiring.block_size,
        "stmin": wiring.st_min,
        "tx_padding": wiring.padding,
        **UNHURRIED,
    }
    if wiring.fd:
        params |= {"can_fd": True, "tx_data_length": 64}
    echo = isotp.CanStack(bus=bus, address=address(mirrored), params=params)
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            message = echo.recv(block=True, timeout=0.05)
            if message is not None:
                echo.send(bytes(message))

    async def body() -> None:
        peer = Peer(wiring.receives, wiring.sends, wiring.extended, wiring.own, wiring.tester)
        shape = Shape(wiring.fd, wiring.frame_bytes, wiring.block_size, wiring.st_min, padding=wiring.padding)
        pool = LinkPool({spec.scheme: spec for spec in __import__("edged_can").edged_links()})
        rates = "@500000/2000000" if wiring.fd else ""
        async with (
            device_env("x", pool).link(f"can:virtual@{name}{rates}") as link,
            link.transport(peer, shape) as transport,  # type: ignore[attr-defined]
        ):
            for size in (1, 6, 7, 8, 9, 61, 62, 63, 64, 300, 4095):
                message = bytes(number & 0xFF for number in range(size))
                await transport.send(message)
                assert await transport.receive(20) == message, size

    echo.start()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        asyncio.run(body())
    finally:
        stop.set()
        thread.join()
        echo.stop()
        bus.shutdown()

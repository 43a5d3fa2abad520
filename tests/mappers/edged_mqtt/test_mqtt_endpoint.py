"""The endpoint against clients that are wrong, slow, rude or many: they are refused with a reason, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from engine_kit import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mqtt_kit import PullingDevice
from mqtt_node import Authority

from edged.errors import EdgedError, Permanent, Reason, Transient
from edged.links import LinkPool, device_env
from edged.testing.ports import free_port
from edged_mqtt import endpoint as subject
from edged_mqtt import packets
from edged_mqtt.config import BrokerConfig, ListenAddress, ListenConfig
from edged_mqtt.endpoint import Endpoint, open_endpoint
from edged_mqtt.tls import client_context, server_context
from edged_mqtt.wire import Credential, Proof, Seat


class Env:
    """What an endpoint is given: secrets in a folder, and counts that a test can read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counted: Counter[str] = Counter()
        self.log = device_env("test", LinkPool({})).log

    def credential_file(self, name: str) -> Path:
        return self.folder / name

    def count(self, event: str) -> None:
        self.counted[event] += 1


class Guest:
    """Remembers what it is told; ``takes``: how many messages more."""

    def __init__(self, takes: int = 10**9) -> None:
        self.seen: list[str] = []
        self.messages: list[tuple[str, bytes]] = []
        self.meanings: list[object] = []
        self.takes = takes
        self.news = asyncio.Event()

    def seated(self, seat: Seat) -> None:
        assert not self.seen

    def arrived(self) -> None:
        self.seen.append("arrived")
        self.news.set()

    def left(self, why: str) -> None:
        self.seen.append(f"left: {why}")
        self.news.set()

    def over(self, fault: EdgedError) -> None:
        raise AssertionError(fault)

    def heard(self, topic: str, payload: bytes, meaning: object = None) -> bool:
        self.messages.append((topic, payload))
        self.meanings.append(meaning)
        self.news.set()
        self.takes -= 1
        return self.takes > 0

    async def until(self, text: str) -> None:
        async with asyncio.timeout(20):
            while not any(text in line for line in self.seen):
                self.news.clear()
                await self.news.wait()


class Client:
    """Bytes in, bytes out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def read(self, count: int) -> bytes:
        async with asyncio.timeout(20):
            return await self.reader.readexactly(count)

    async def closed(self) -> bytes:
        async with asyncio.timeout(20):
            try:
                return await self.reader.read(-1)
            except ConnectionError:
                return b""


def connect_packet(
    user: str | None = "token", password: str | None = None, *, keep_alive: int = 60, version: int = 4
) -> bytes:
    flags = 2 | (0x80 if user is not None else 0) | (0x40 if password is not None else 0)
    body = b"\0\4MQTT" + bytes([version, flags]) + keep_alive.to_bytes(2, "big")
    body += b"\0" if version == 5 else b""
    for text in ("", user, password):
        if text is not None:
            body += len(text).to_bytes(2, "big") + text.encode()
    return bytes([0x10, len(body)]) + body


@pytest.fixture
def refused_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits to be let in is not refused before the session is there, though the machine stands still for a moment."""
    monkeypatch.setattr(subject, "REFUSE_S", 2.0)


_DIALLED: list[Client] = []
TOKEN = Credential(Proof.TOKEN, "pump-1", "token")


@asynccontextmanager
async def listening(
    tmp_path: Path, config: ListenConfig | None = None
) -> AsyncIterator[tuple[Endpoint, Env, int]]:
    env, port = Env(tmp_path), free_port()
    address = ListenAddress("127.0.0.1", port)
    try:
        async with open_endpoint(address, config or ListenConfig(), env) as endpoint:  # type: ignore[arg-type]
            yield endpoint, env, port
    finally:
        for client in _DIALLED:
            client.writer.transport.abort()
        _DIALLED.clear()
        await asyncio.sleep(0)


async def dial(port: int, context: ssl.SSLContext | None = None) -> Client:
    """A connection, which the end of :func:`listening` closes."""
    _DIALLED.append(Client(*await asyncio.open_connection("127.0.0.1", port, ssl=context)))
    return _DIALLED[-1]


@pytest.mark.parametrize(
    ("user", "password", "admitted"),
    [
        ("token", None, True),
        ("token", "whatever", True),
        ("nekot", None, False),
        ("valve-1", "secret", True),
        ("valve-1", "terces", False),
        ("valve-1", None, False),
        ("pump-1", None, False),
        (None, None, False),
    ],
)
def test_a_credential_is_one_device(
    tmp_path: Path, user: str | None, password: str | None, admitted: bool
) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, env, port):
            pump, valve = Guest(), Guest()
            async with (
                endpoint.seat("pump-1", TOKEN, pump),
                endpoint.seat("valve-1", Credential(Proof.PASSWORD, "valve-1", "secret"), valve),
            ):
                client = await dial(port)
                client.writer.write(connect_packet(user, password))
                assert await client.read(4) == (b"\x20\2\0\0" if admitted else b"\x20\2\0\4")
                if not admitted:
                    assert await client.closed() == b""
                    assert env.counted["login_refused"] == 1
                assert bool(pump.seen) == (admitted and user == "token")
                assert bool(valve.seen) == (admitted and user == "valve-1")

    asyncio.run(run())


def test_a_certificate_s_name_is_one_device(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    authority, stranger = Authority(tmp_path), Authority(tmp_path / "other")
    server, key = authority.issue("node")
    config = ListenConfig(str(server), key.name, str(authority.ca), "required")

    def context(whose: Authority, name: str) -> ssl.SSLContext:
        found = ssl.create_default_context(cafile=str(authority.ca))
        found.load_cert_chain(*whose.issue(name))
        return found

    async def run() -> None:
        async with listening(tmp_path, config) as (endpoint, _, port):
            guest = Guest()
            async with endpoint.seat("pump-9", Credential(Proof.CERTIFICATE, "pump-9"), guest):
                client = await dial(port, context(authority, "pump-9"))
                client.writer.write(connect_packet(None))
                assert await client.read(4) == b"\x20\2\0\0"
                other = await dial(port, context(authority, "pump-8"))
                other.writer.write(connect_packet("pump-9"))
                assert await other.read(4) == b"\x20\2\0\4"
                for wrong in (
                    context(stranger, "pump-9"),
                    ssl.create_default_context(cafile=str(authority.ca)),
                ):
                    with pytest.raises((OSError, asyncio.IncompleteReadError)):
                        bad = await dial(port, wrong)
                        bad.writer.write(connect_packet(None))
                        await bad.read(4)
                assert guest.seen == ["arrived"]

    asyncio.run(run())


@pytest.fixture
def strict_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """``ssl.create_default_context`` as it is from Python 3.13 on."""
    make = ssl.create_default_context

    def strict(*args: Any, **words: Any) -> ssl.SSLContext:
        found = make(*args, **words)
        found.verify_flags |= ssl.VERIFY_X509_STRICT
        return found

    monkeypatch.setattr(ssl, "create_default_context", strict)


@pytest.mark.usefixtures("strict_python")
def test_a_plant_s_bare_authority_is_good_enough_on_a_newer_python_too(tmp_path: Path) -> None:
    """Its certificates have neither key usage nor key identifiers: a device must not be lost by an upgrade of the node."""
    authority = Authority(tmp_path, bare=True)
    server, key = authority.issue("node")
    shown, private = authority.issue("pump-9")
    own_side = BrokerConfig(ca=str(authority.ca), certificate=str(shown), key_credential=private.name)
    env: Any = Env(tmp_path)
    # a context of the tests' own is as strict as that Python is
    assert ssl.create_default_context().verify_flags & ssl.VERIFY_X509_STRICT
    device = client_context(own_side, env)
    config = ListenConfig(str(server), key.name, str(authority.ca), "required")
    for context in (device, server_context(config, env)):
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT

    async def run() -> None:
        async with listening(tmp_path, config) as (endpoint, _, port):
            guest = Guest()
            async with endpoint.seat("pump-9", Credential(Proof.CERTIFICATE, "pump-9"), guest):
                # this node's side of a broker's connection, and its side of a device's, at once
                client = await dial(port, device)
                client.writer.write(connect_packet(None))
                assert await client.read(4) == b"\x20\2\0\0"
                await guest.until("arrived")

    asyncio.run(run())


def test_why_tls_failed_is_told_once_for_each_cause_and_counted_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    authority, stranger = Authority(tmp_path), Authority(tmp_path / "other")
    server, key = authority.issue("node")
    config = ListenConfig(str(server), key.name, str(authority.ca), "required")
    foreign = ssl.create_default_context(cafile=str(authority.ca))
    foreign.load_cert_chain(*stranger.issue("pump-9"))

    async def failed(port: int, context: ssl.SSLContext | None) -> None:
        with contextlib.suppress(OSError):
            client = await dial(port, context)
            client.writer.write(connect_packet(None))
            await client.closed()

    async def run() -> None:
        async with listening(tmp_path, config) as (_, env, port):
            for number, context in enumerate((foreign, None, foreign, None), start=1):
                await failed(port, context)
                async with asyncio.timeout(20):
                    while env.counted["tls_failed"] < number:
                        await asyncio.sleep(0.01)

    asyncio.run(run())
    told = [record.__dict__["detail"] for record in caplog.records if record.message == "TLS failed"]
    assert len(told) == 2, told
    assert all(text.startswith("127.0.0.1: ") for text in told)
    assert "CERTIFICATE_VERIFY_FAILED" in told[0] and "CERTIFICATE_VERIFY_FAILED" not in told[1]


def test_keys_that_do_not_fit_are_said(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, _ = authority.issue("node")
    _, key = authority.issue("other")

    async def run(config: ListenConfig, text: str) -> None:
        with pytest.raises(Permanent, match=text) as caught:
            async with listening(tmp_path, config):
                pass
        assert caught.value.reason is Reason.CONFIG_INVALID

    asyncio.run(run(ListenConfig(str(server), key.name), "certificate .*node.crt"))
    asyncio.run(run(ListenConfig(str(server), "absent"), "No such file"))
    asyncio.run(run(ListenConfig("/nowhere.crt", key.name), "No such file"))


def test_a_port_that_is_taken_is_busy_and_an_address_that_is_not_ours_absent(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (_, env, port):
            for host, reason in (("127.0.0.1", Reason.LINK_BUSY), ("192.0.2.1", Reason.DEVICE_ABSENT)):
                with pytest.raises(Transient) as caught:
                    address = ListenAddress(host, port)
                    async with open_endpoint(address, ListenConfig(), env):  # type: ignore[arg-type]
                        pass
                assert caught.value.reason is reason

    asyncio.run(run())


def test_a_place_is_taken_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, _):
            async with endpoint.seat("pump-1", TOKEN, Guest()):
                with pytest.raises(Transient, match="a session with pump-1 already"):
                    async with endpoint.seat("pump-1", TOKEN, Guest()):
                        pass
                with pytest.raises(Permanent, match="pump-2 and pump-1 have the same credential"):
                    async with endpoint.seat("pump-2", TOKEN, Guest()):
                        pass
            async with endpoint.seat("pump-1", TOKEN, Guest()):
                pass

    asyncio.run(run())


@pytest.mark.usefixtures("refused_later")
def test_the_newer_of_two_that_wait_to_be_let_in_has_the_place(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port):
            first = await dial(port)
            first.writer.write(connect_packet())
            await asyncio.sleep(0.1)
            second = await dial(port)
            second.writer.write(connect_packet())
            await asyncio.sleep(0.1)
            async with endpoint.seat("pump-1", TOKEN, Guest()) as seat:
                assert await second.read(4) == b"\x20\2\0\0"
                await first.closed()
                second.writer.write(b"\xc0\0")
                assert await second.read(2) == b"\xd0\0"
                assert seat.present

    asyncio.run(run())


@pytest.mark.parametrize("version", [4, 5])
def test_the_newest_connection_has_the_place_and_two_that_fight_for_it_are_told_apart(
    tmp_path: Path, version: int
) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, env, port):
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest):
                last = None
                for _ in range(1 + subject.TAKEOVERS):
                    client = await dial(port)
                    client.writer.write(connect_packet(version=version))
                    assert (await client.read(2))[0] == 0x20
                    if last is not None:
                        end = await last.closed()
                        assert end.endswith(b"\xe0\2\x8e\0" if version == 5 else b"")
                    last = client
                assert guest.seen.count("arrived") == 1 + subject.TAKEOVERS
                client = await dial(port)
                client.writer.write(connect_packet(version=version))
                answer = await client.closed()
                assert answer[3:4] == (b"\x89" if version == 5 else b"\3")
                assert env.counted["two_sessions"] == 1
                assert guest.seen[-1] == "arrived", "the one that was there was thrown out"

    asyncio.run(run())


def test_who_was_thrown_out_rests_longer_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "FIRST_REST_S", 0.2)
    monkeypatch.setattr(subject, "REFUSE_S", 0.01)

    async def refused(port: int) -> int:
        """How often, until it is let in."""
        for times in range(1000):
            client = await dial(port)
            client.writer.write(connect_packet())
            answer = await client.read(4)
            if answer == b"\x20\2\0\0":
                return times
            assert answer == b"\x20\2\0\3"
        raise AssertionError("never")

    async def run() -> None:
        async with listening(tmp_path) as (endpoint, env, port):
            loop = asyncio.get_running_loop()
            for rest_s in (0.2, 0.4, 0.8):
                # the next session of the same device does not forget it
                async with endpoint.seat("pump-1", TOKEN, Guest()) as seat:
                    await refused(port)
                    begun = loop.time()
                    seat.expel("it did something")
                    await refused(port)
                    assert loop.time() - begun >= rest_s
            assert env.counted["must_rest"] >= 1
            # that a session ends is nobody's fault
            async with endpoint.seat("pump-1", TOKEN, Guest()):
                assert await refused(port) == 0
            rest = subject._Rest()
            for now in (1000.0, 1010.0, 1020.0, 5000.0):
                rest.begin(now)
            assert rest.lasts(5000.1) and not rest.lasts(5000.3)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("packets", "event"),
    [
        (b"\x10\xff\xff\xff\x7f", "malformed"),
        (b"\xc0\0", "malformed"),
        (connect_packet() + b"\x30\xff\xff\xff\x7f", "malformed"),
        (connect_packet() + b"\x34\5\0\1ax\1", "malformed"),
        (connect_packet() + connect_packet(), "malformed"),
        (connect_packet() + b"\x82\2\0\1", "malformed"),
        (connect_packet() + b"\xf0\0", "malformed"),
        (b"GET / HTTP/1.1\r\n\r\n", "malformed"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", "malformed"),
    ],
)
def test_who_does_not_keep_to_the_protocol_is_cut_off(tmp_path: Path, packets: bytes, event: str) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, env, port):
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest):
                client = await dial(port)
                client.writer.write(packets)
                await client.closed()
                assert env.counted[event] == 1

    asyncio.run(run())


def test_a_client_is_sent_no_packet_larger_than_it_takes_and_is_told_its_name(tmp_path: Path) -> None:
    hello = b"\0\4MQTT\5\x82\0\x3c\5\x27\0\0\1\0\0\0\0\5token"

    async def run() -> None:
        async with (
            listening(tmp_path) as (endpoint, env, port),
            endpoint.seat("pump-1", TOKEN, Guest()) as seat,
        ):
            client = await dial(port)
            client.writer.write(bytes([0x10, len(hello)]) + hello)
            answer = await client.read(2)
            assert (await client.read(answer[1])).endswith(b"\x12\0\6pump-1")
            assert seat.largest_bytes == 128
            await seat.send("x", bytes(256 - 6))
            seat.tell("x", bytes(256 - 7))
            assert await client.read(256) == b"\x30\xfd\1\0\1x\0" + bytes(249)
            assert env.counted["too_large_for_it"] == 1
            client.writer.write(b"\xc0\0")
            assert await client.read(2) == b"\xd0\0"

    asyncio.run(run())


def test_a_session_to_keep_needs_a_name(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port), endpoint.seat("pump-1", TOKEN, Guest()):
            client = await dial(port)
            client.writer.write(b"\x10\x13\0\4MQTT\4\x80\0\x3c\0\0\0\5token")
            assert await client.closed() == b"\x20\2\0\2"

    asyncio.run(run())


def test_an_older_protocol_is_told_so(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port), endpoint.seat("pump-1", TOKEN, Guest()):
            client = await dial(port)
            client.writer.write(b"\x10\x10\0\6MQIsdp\3\2\0\x3c\0\2id")
            assert await client.closed() == b"\x20\2\0\1"

    asyncio.run(run())


def test_silence_beyond_the_keep_alive_ends_a_connection_and_a_ping_keeps_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, env, port):
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest):
                client = await dial(port)
                client.writer.write(connect_packet(keep_alive=2))
                await client.read(4)
                for _ in range(5):
                    await asyncio.sleep(0.7)
                    client.writer.write(b"\xc0\0")
                    assert await client.read(2) == b"\xd0\0"
                await client.closed()
                await guest.until("nothing was heard of it")
                assert env.counted["keep_alive_missed"] == 1

    asyncio.run(run())


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("keep_alive", [0, 65_535])
def test_a_dead_peer_without_a_keep_alive_leaves_its_place(
    tmp_path: Path, version: int, keep_alive: int
) -> None:
    """One that asks for none, or for one of many hours: the node has a bound of its own, and says so where the protocol can."""

    async def run() -> None:
        config = ListenConfig(longest_silence_s=1.5)
        async with listening(tmp_path, config) as (endpoint, env, port):
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest) as seat:
                client = await dial(port)
                client.writer.write(connect_packet(keep_alive=keep_alive, version=version))
                answer = await client.read((await client.read(2))[1])
                assert (b"\x13\0\1" in answer) == (version == 5), "Server Keep Alive, v5 3.2.2.3.14"
                await guest.until("nothing was heard of it")
                assert not seat.present and env.counted["keep_alive_missed"] == 1
                # one that asks for less is taken at its word
                client = await dial(port)
                client.writer.write(connect_packet(keep_alive=1, version=version))
                answer = await client.read((await client.read(2))[1])
                assert b"\x13" not in answer[2:]

    asyncio.run(run())


@pytest.mark.parametrize("version", [4, 5])
def test_a_device_stays_from_one_session_to_the_next_and_nothing_that_it_says_is_lost(
    tmp_path: Path, version: int
) -> None:
    nothing = b"\0" if version == 5 else b""

    def message(number: int) -> bytes:
        body = b"\0\1a" + nothing + bytes([number])
        return bytes([0x30, len(body)]) + body

    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port):
            first, second = Guest(), Guest()
            async with endpoint.seat("pump-1", TOKEN, first):
                client = await dial(port)
                client.writer.write(connect_packet(version=version))
                await client.read((await client.read(2))[1])
                await first.until("arrived")
            client.writer.write(b"".join(map(message, range(10))) + b"\xc0\0")
            assert await client.read(2) == b"\xd0\0", "it is served meanwhile"
            client.writer.write(b"".join(map(message, range(10, 100))))
            async with asyncio.timeout(20):
                while len(endpoint._seats["pump-1"]._held) < subject.MOST_HELD:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert len(endpoint._seats["pump-1"]._held) == subject.MOST_HELD, "more was held"
            second.takes = 5
            async with endpoint.seat("pump-1", TOKEN, second) as seat:
                assert seat.present and not second.seen, "it has not come anew"
                assert len(second.messages) == 5
                second.takes = 10**9
                seat.more()
                async with asyncio.timeout(20):
                    while len(second.messages) < 100:
                        await asyncio.sleep(0.01)
                assert [payload[0] for _, payload in second.messages] == list(range(100))
                assert not first.messages and first.seen == ["arrived"]

    asyncio.run(run())


def test_a_device_that_comes_between_two_sessions_is_let_in_and_has_come_anew(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, env, port):
            async with endpoint.seat("pump-1", TOKEN, Guest()):
                before = await dial(port)
                before.writer.write(connect_packet())
                assert await before.read(4) == b"\x20\2\0\0"
            after = await dial(port)
            after.writer.write(connect_packet() + b"\x30\4\0\1ax")
            assert await after.read(4) == b"\x20\2\0\0"
            assert await before.closed() == b"", "it has two connections"
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest) as seat:
                assert seat.present and guest.seen == ["arrived"] and guest.messages == [("a", b"x")]
            assert not env.counted["not_served"]
            # the session after that finds the same connection
            async with endpoint.seat("pump-1", TOKEN, guest := Guest()) as seat:
                assert seat.present and not guest.seen

    asyncio.run(run())


@pytest.mark.usefixtures("refused_later")
def test_a_device_that_comes_before_its_first_session_is_not_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, env, port):
            client = await dial(port)
            client.writer.write(connect_packet() + b"\x30\4\0\1ax")
            other = await dial(port)
            other.writer.write(connect_packet("nobody"))
            await asyncio.sleep(0.1)
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest):
                assert not guest.seen, "the session was there first, nothing is shown"
                assert await client.read(4) == b"\x20\2\0\0"
                client.writer.write(b"\xc0\0")
                assert await client.read(2) == b"\xd0\0"
                assert guest.seen == ["arrived"] and guest.messages == [("a", b"x")]
                assert await other.closed() == b"\x20\2\0\4"
            assert env.counted["login_refused"] == 1

    asyncio.run(run())


@pytest.mark.usefixtures("refused_later")
def test_one_that_waited_to_be_let_in_does_not_take_the_place_of_one_that_came_after_it(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port):
            first = await dial(port)
            first.writer.write(connect_packet())
            await asyncio.sleep(0.1)
            async with endpoint.seat("pump-1", TOKEN, guest := Guest()) as seat:
                second = await dial(port)
                second.writer.write(connect_packet())
                assert await second.read(4) == b"\x20\2\0\0"
                assert await first.closed() == b""
                second.writer.write(b"\xc0\0")
                assert await second.read(2) == b"\xd0\0"
                assert seat.present and guest.seen == ["arrived"]

    asyncio.run(run())


@pytest.mark.parametrize("version", [4, 5])
def test_a_device_whose_session_does_not_come_back_has_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(subject, "KEPT_S", 0.2)

    async def run() -> None:
        async with listening(tmp_path) as (endpoint, env, port):
            async with endpoint.seat("pump-1", TOKEN, Guest()):
                client = await dial(port)
                client.writer.write(connect_packet(version=version))
                await client.read((await client.read(2))[1])
            await client.closed()
            # it is not taken for one with a wrong credential
            client = await dial(port)
            client.writer.write(connect_packet(version=version))
            answer = await client.closed()
            assert answer[3:4] == (b"\x88" if version == 5 else b"\3")
            assert env.counted["not_served"] == 1 and not env.counted["login_refused"]

    asyncio.run(run())


def test_a_credential_that_was_changed_between_two_sessions_ends_the_connection(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port):
            async with endpoint.seat("pump-1", TOKEN, Guest()):
                client = await dial(port)
                client.writer.write(connect_packet())
                await client.read(4)
            async with endpoint.seat("pump-1", Credential(Proof.TOKEN, "pump-1", "other"), Guest()) as seat:
                assert not seat.present and await client.closed() == b""
                for user, answer in (("token", b"\4"), ("other", b"\0")):
                    client = await dial(port)
                    client.writer.write(connect_packet(user))
                    assert (await client.read(4))[3:] == answer
                # the old one may be another device's by now
                async with endpoint.seat("pump-2", TOKEN, guest := Guest()):
                    client = await dial(port)
                    client.writer.write(connect_packet())
                    assert await client.read(4) == b"\x20\2\0\0"
                    assert guest.seen == ["arrived"]

    asyncio.run(run())


def test_who_says_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "CONNECT_S", 0.2)

    async def run() -> None:
        async with listening(tmp_path) as (_, env, port):
            client = await dial(port)
            client.writer.write(b"\x10")
            assert await client.closed() == b""
            assert env.counted["connect_missed"] == 1

    asyncio.run(run())


def test_strangers_do_not_use_up_all_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "STRANGERS", 5)

    async def run() -> None:
        async with listening(tmp_path) as (endpoint, env, port), AsyncExitStack() as stack:
            await stack.enter_async_context(endpoint.seat("pump-1", TOKEN, Guest()))
            strangers = [await dial(port) for _ in range(8)]
            for one in strangers[5:]:
                assert await one.closed() == b""
            assert env.counted["connection_refused"] == 3
            strangers[0].writer.close()
            await strangers[0].writer.wait_closed()
            await until(lambda: len(endpoint._strangers) < 5)
            client = await dial(port)
            client.writer.write(connect_packet())
            assert await client.read(4) == b"\x20\2\0\0"

    asyncio.run(run())


def test_who_does_not_end_the_handshake_has_no_more_room_than_other_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "STRANGERS", 5)
    monkeypatch.setattr(subject, "CONNECT_S", 1.0)
    authority = Authority(tmp_path)
    certificate, _ = authority.issue("node")
    context = ssl.create_default_context(cafile=authority.ca)

    async def run() -> None:
        config = ListenConfig(certificate=str(certificate), key_credential="node.key")
        async with (
            listening(tmp_path, config) as (endpoint, env, port),
            endpoint.seat("pump-1", TOKEN, Guest()),
        ):
            strangers = [await dial(port) for _ in range(8)]
            for one in strangers[5:]:
                assert await one.closed() == b""
            assert env.counted["connection_refused"] == 3
            for one in strangers[:5]:
                await one.closed()
            assert env.counted["tls_failed"] == 5
            monkeypatch.setattr(subject, "CONNECT_S", 10.0)
            client = await dial(port, context)
            client.writer.write(connect_packet())
            assert await client.read(4) == b"\x20\2\0\0"
            # in the handshake when the listener ends
            await dial(port)
            async with asyncio.timeout(20):
                while not endpoint._greeting:
                    await asyncio.sleep(0.01)
        assert not endpoint._connections

    asyncio.run(run())


def test_one_address_leaves_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "STRANGERS_OF_ONE", 3)

    async def run() -> None:
        async with (
            listening(tmp_path) as (endpoint, env, port),
            endpoint.seat("pump-1", TOKEN, Guest()),
        ):
            strangers = [await dial(port) for _ in range(5)]
            for one in strangers[3:]:
                assert await one.closed() == b""
            assert env.counted["connection_refused"] == 2
            other = Client(*await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0)))
            _DIALLED.append(other)
            other.writer.write(connect_packet())
            assert await other.read(4) == b"\x20\2\0\0"

    asyncio.run(run())


def test_a_network_of_ipv6_is_one_address() -> None:
    assert subject._origin("2001:db8:0:1::5") == subject._origin("2001:db8:0:1:ffff::6%eth0")
    assert subject._origin("2001:db8:0:1::5") != subject._origin("2001:db8:0:2::5")
    assert subject._origin("192.0.2.1") != subject._origin("192.0.2.2")


@pytest.mark.parametrize("user", ["nobody", "token"])
def test_what_is_sent_before_a_credential_was_found_good_fills_no_memory(tmp_path: Path, user: str) -> None:
    """What is said at once behind a good CONNECT (3.1.4) is taken all the same."""
    blob = b"\x30\x84\x40\0\1a" + bytes(8193)

    async def run() -> None:
        async with (
            listening(tmp_path) as (endpoint, env, port),
            endpoint.seat("pump-1", TOKEN, guest := Guest()),
        ):
            client = await dial(port)
            client.writer.write(connect_packet(user) + blob * 4)
            if user == "token":
                assert await client.read(4) == b"\x20\2\0\0"
                async with asyncio.timeout(20):
                    while len(guest.messages) < 4:
                        await asyncio.sleep(0.01)
            else:
                assert await client.closed() == b""
            assert env.counted["malformed"] == (user == "nobody")

    asyncio.run(run())


@pytest.mark.parametrize("tls", [False, True])
def test_an_answer_does_not_wait_for_the_acknowledgement_of_the_one_before(tmp_path: Path, tls: bool) -> None:
    """With QoS 1 a PUBACK and a chunk go out one after the other: by Nagle's algorithm (RFC 896) the chunk would wait for the
    client's delayed acknowledgement, 40 ms each time."""
    authority = Authority(tmp_path)
    certificate, _ = authority.issue("node")
    context = ssl.create_default_context(cafile=authority.ca) if tls else None
    config = ListenConfig(certificate=str(certificate), key_credential="node.key") if tls else None

    async def run() -> None:
        async with (
            listening(tmp_path, config) as (endpoint, _, port),
            endpoint.seat("pump-1", TOKEN, Guest()),
        ):
            client = await dial(port, context)
            client.writer.write(connect_packet())
            assert await client.read(4) == b"\x20\2\0\0"
            (connection,) = endpoint._connections
            assert connection._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    asyncio.run(run())


def test_a_certificate_as_proof_needs_an_authority(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, _):
            with pytest.raises(Permanent, match="proof: found 'certificate', but .* asks for none") as caught:
                async with endpoint.seat("pump-1", Credential(Proof.CERTIFICATE, "pump-1"), Guest()):
                    pass
            assert caught.value.reason is Reason.CONFIG_INVALID

    asyncio.run(run())


def test_places_are_the_devices_and_one_that_comes_back_takes_its_own(tmp_path: Path) -> None:
    """Whoever has no credential takes none of them; nor has a device to wait until its dead connection is found out."""
    names = ["pump-1", "pump-2", "pump-3"]

    async def run() -> None:
        async with (
            listening(tmp_path, ListenConfig(connections=2)) as (endpoint, env, port),
            AsyncExitStack() as stack,
        ):
            for name in names:
                place = endpoint.seat(name, Credential(Proof.TOKEN, name, f"of {name}"), Guest())
                await stack.enter_async_context(place)
            for _ in range(4):
                await dial(port)

            async def greeted(name: str) -> bytes:
                client = await dial(port)
                client.writer.write(connect_packet(f"of {name}"))
                return await client.read(4)

            assert await greeted("pump-1") == await greeted("pump-2") == b"\x20\2\0\0"
            assert await greeted("pump-3") == b"\x20\2\0\3" and env.counted["connection_refused"] == 1
            assert await greeted("pump-1") == b"\x20\2\0\0", "it has a place"

    asyncio.run(run())


def test_a_device_that_says_much_between_two_sessions_is_not_read_and_loses_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port):
            async with endpoint.seat("pump-1", TOKEN, Guest()):
                client = await dial(port)
                client.writer.write(connect_packet())
                await client.read(4)
            body, count = b"\0\1x" + bytes(50_000), 16
            client.writer.write((b"\x30" + packets.length_bytes(len(body)) + body) * count)
            (connection,) = endpoint._connections
            async with asyncio.timeout(20):
                while not connection._resting:
                    await asyncio.sleep(0.01)
            assert len(endpoint._seats["pump-1"]._held) == 2
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest):
                async with asyncio.timeout(20):
                    while len(guest.messages) < count:
                        guest.news.clear()
                        await guest.news.wait()

    asyncio.run(run())


def test_a_client_that_sends_more_than_its_session_takes_waits_and_loses_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port):
            guest = Guest(takes=3)
            async with endpoint.seat("pump-1", TOKEN, guest) as seat:
                client = await dial(port)
                client.writer.write(connect_packet())
                client.writer.write(b"".join(b"\x30\4\0\1a" + bytes([number]) for number in range(100)))
                async with asyncio.timeout(20):
                    while len(guest.messages) < 3:
                        await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
                assert len(guest.messages) == 3, "it did not wait"
                guest.takes = 10**9
                seat.more()
                async with asyncio.timeout(20):
                    while len(guest.messages) < 100:
                        await asyncio.sleep(0.01)
                assert [payload[0] for _, payload in guest.messages] == list(range(100))

    asyncio.run(run())


def message(payload: bytes, number: int = 0, version: int = packets.V3) -> bytes:
    """To the topic "a"; with QoS 1 where it has a number."""
    if not number:
        return packets.publish_head(b"a", len(payload), version) + payload
    begin, between = packets.acked_publish(b"a", len(payload), version)
    return begin + number.to_bytes(2, "big") + between + payload


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("version", [packets.V3, packets.V5])
def test_a_message_that_was_foreseen_is_known_by_its_bytes_and_waits_as_any_other(
    tmp_path: Path, version: int, qos: int
) -> None:
    numbers = count(1)

    def packet(payload: bytes) -> bytes:
        return message(payload, next(numbers) if qos else 0, version)

    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port):
            guest = Guest()

            async def heard(data: bytes, count: int) -> None:
                client.writer.write(data)
                await until(lambda: len(guest.messages) >= count, 10)

            async with endpoint.seat("pump-1", TOKEN, guest) as seat:
                client = await dial(port)
                client.writer.write(connect_packet(version=version))
                await guest.until("arrived")
                await heard(packet(b"1"), 1)
                seat.foresee("a", b"2", "two")
                await heard(packet(b"2"), 2)
                cut = packet(b"2")
                client.writer.write(cut[:3])
                (connection,) = endpoint._connections
                async with asyncio.timeout(20):
                    while not connection._buffer:
                        await asyncio.sleep(0.01)
                await heard(cut[3:], 3)
                guest.takes = 1
                await heard(packet(b"2"), 4)
                client.writer.write(packet(b"2"))
                await asyncio.sleep(0.1)
                assert len(guest.messages) == 4, "it did not wait"
                guest.takes = 10**9
                seat.more()
                await heard(packet(b"3"), 6)
            assert [payload for _, payload in guest.messages] == [b"1", b"2", b"2", b"2", b"2", b"3"]
            assert set(guest.meanings[:1] + guest.meanings[5:]) == {None}
            assert (guest.meanings[1], guest.meanings[2], guest.meanings[3]) == ("two", None, "two")

            if qos:
                # each once, in order
                hello = await client.read(4 if version == 4 else 2)
                if version == 5:
                    await client.read(hello[1])
                assert await client.read(24) == b"".join(packets.puback(number) for number in range(1, 7))
                client.writer.write(packet(b"2").replace(b"\0\7", b"\0\0"))
                await client.closed()
                assert len(guest.messages) == 6, "0 is no packet identifier"
                return
            # without a session it is held, and read by the next one
            client.writer.write(packet(b"2"))
            async with asyncio.timeout(20):
                while not endpoint._seats["pump-1"]._held:
                    await asyncio.sleep(0.01)
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest):
                assert (guest.messages, guest.meanings) == ([("a", b"2")], [None])

    asyncio.run(run())


def test_a_message_of_another_quality_does_not_hide_what_was_foreseen(tmp_path: Path) -> None:
    """Its bytes were foreseen with the quality of the one before, and not of what came in between."""

    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port):
            guest = Guest()

            async def said(data: bytes) -> None:
                known = len(guest.messages)
                client.writer.write(data)
                await until(lambda: len(guest.messages) > known, 10)

            async with endpoint.seat("pump-1", TOKEN, guest) as seat:
                client = await dial(port)
                client.writer.write(connect_packet())
                assert (await client.read(4))[0] == 0x20
                await said(message(b"1"))
                seat.foresee("a", b"2", "two")
                await said(message(b"t", 7))
                assert await client.read(4) == packets.puback(7)
                # a PINGREQ is no packet identifier
                await said(message(b"2") + b"\xc0\0")
                assert await client.read(2) == packets.PINGRESP
                await said(message(b"3", 8))
                assert await client.read(4) == packets.puback(8)
                seat.foresee("a", b"4", "four")
                await said(message(b"t"))
                cut = message(b"4", 9)
                client.writer.write(cut[:-3])
                await asyncio.sleep(0.1)
                await said(cut[-3:])
                assert await client.read(4) == packets.puback(9)
            assert [payload for _, payload in guest.messages] == [b"1", b"t", b"2", b"3", b"t", b"4"]
            assert set(guest.meanings) == {None}

    asyncio.run(run())


def test_a_client_that_does_not_read_fills_no_memory(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            listening(tmp_path) as (endpoint, _, port),
            endpoint.seat("pump-1", TOKEN, Guest()) as seat,
        ):
            client = await dial(port)
            client.writer.write(connect_packet())
            await client.read(4)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            sent = 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    while True:
                        await seat.send("x", bytes(65536))
                        sent += 65536
            assert sent < 32 * 1024 * 1024, "nothing stopped it"
            for _ in range(1000):
                seat.tell("x", bytes(65536))
            (connection,) = endpoint._connections
            assert connection._transport.get_write_buffer_size() < 1024 * 1024

    asyncio.run(run())


def _subscribe(filters: int) -> bytes:
    body = b"\0\1" + b"\0\1a\0" * filters
    return b"\x82" + bytes([len(body) & 0x7F | 0x80, len(body) >> 7 & 0x7F | 0x80, len(body) >> 14]) + body


@pytest.mark.parametrize("blob", [b"\xc0\0" * 60_000, _subscribe(30_000) * 3], ids=["pings", "filters"])
def test_a_flood_of_packets_that_are_no_messages_is_cut_off(tmp_path: Path, blob: bytes) -> None:
    """Long before it is handled: nobody waits for it, and its answers fill no memory."""

    async def run() -> None:
        async with listening(tmp_path) as (endpoint, env, port), AsyncExitStack() as stack:
            await stack.enter_async_context(endpoint.seat("pump-1", TOKEN, guest := Guest()))
            client = await dial(port)
            client.writer.write(connect_packet() + blob)
            answers = await client.closed()
            assert len(answers) <= 4 + 4 * subject.CONTROL_AT_ONCE
            assert env.counted["flooded"] == 1
            await guest.until("too many packets that are no messages")
            client = await dial(port)
            client.writer.write(connect_packet() + b"\xc0\0" * 400 + _subscribe(100)[:1] + b"\x06\0\1\0\1a\1")
            assert await client.read(4 + 800 + 5) == b"\x20\2\0\0" + b"\xd0\0" * 400 + b"\x90\3\0\1\1"

    asyncio.run(run())


def test_many_packets_of_one_client_let_others_in_between(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port):
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest):
                client = await dial(port)
                client.writer.write(connect_packet())
                await client.read(4)
                client.writer.write(b"\x30\4\0\1ax" * 5000)
                async with asyncio.timeout(20):
                    most = before = 0
                    while len(guest.messages) < 5000:
                        await asyncio.sleep(0)
                        most = max(most, len(guest.messages) - before)
                        before = len(guest.messages)
                assert most <= 2 * subject.PACKETS_AT_ONCE

    asyncio.run(run())


def test_who_floods_does_not_keep_a_neighbour_waiting(tmp_path: Path) -> None:
    """Counted, not timed: so many packets of the one are handled between two of the other, however many it sends."""

    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port), AsyncExitStack() as stack:
            rude, good = Guest(), Guest()
            await stack.enter_async_context(endpoint.seat("pump-1", TOKEN, rude))
            other = Credential(Proof.TOKEN, "pump-2", "other")
            seat = await stack.enter_async_context(endpoint.seat("pump-2", other, good))
            flood, client = await dial(port), await dial(port)
            flood.writer.write(connect_packet())
            client.writer.write(connect_packet("other"))
            await flood.read(4)
            await client.read(4)
            flood.writer.write(b"\x30\4\0\1ax" * 200_000)
            between: list[int] = []
            async with asyncio.timeout(60):
                while not rude.messages:
                    await asyncio.sleep(0)
                while len(rude.messages) < 150_000 and len(between) < 100:
                    before = len(rude.messages)
                    client.writer.write(b"\x30\4\0\1ax")
                    while not good.messages:
                        await asyncio.sleep(0)
                    good.messages.clear()
                    await seat.send("a", bytes(4096))
                    await client.read(3 + 3 + 4096)
                    between.append(len(rude.messages) - before)
            assert len(between) == 100, "the flood was over before it was served"
            assert max(between) > 0, "there was no flood"
            assert sorted(between)[90] <= 16 * subject.PACKETS_AT_ONCE, between

    asyncio.run(run())


def test_an_answer_does_not_fall_into_a_long_message(tmp_path: Path) -> None:
    async def run() -> None:
        more = asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            yield b"a" * 1000
            await more.wait()
            yield b"b" * 1000

        async with (
            listening(tmp_path) as (endpoint, _, port),
            endpoint.seat("pump-1", TOKEN, guest := Guest()) as seat,
        ):
            client = await dial(port)
            client.writer.write(connect_packet())
            await client.read(4)
            sending = asyncio.create_task(seat.stream("x", 2000, parts()))
            head = await client.read(6)
            assert await client.read(1000) == b"a" * 1000
            client.writer.write(b"\xc0\0" + b"\x32\6\0\1a\0\1x")
            (connection,) = endpoint._connections
            async with asyncio.timeout(20):
                while len(connection._buffer) < 10:
                    await asyncio.sleep(0.01)
            assert not guest.messages
            more.set()
            await sending
            assert head == b"\x30\xd3\x0f\0\1x"
            assert await client.read(1000 + 2 + 4) == b"b" * 1000 + b"\xd0\0" + b"\x40\2\0\1"
            assert guest.messages == [("a", b"x")]

    asyncio.run(run())


def test_what_a_device_is_told_comes_after_a_long_message_and_when_it_reads_again(tmp_path: Path) -> None:
    async def run() -> None:
        more = asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            yield b"a" * 1000
            await more.wait()
            yield b"b" * 1000

        async with (
            listening(tmp_path) as (endpoint, env, port),
            endpoint.seat("pump-1", TOKEN, Guest()) as seat,
        ):
            client = await dial(port)
            client.writer.write(connect_packet())
            await client.read(4)
            sending = asyncio.create_task(seat.stream("x", 2000, parts()))
            await client.read(6 + 1000)
            seat.tell("y", b"told")
            more.set()
            await sending
            assert await client.read(1000 + 9) == b"b" * 1000 + b"\x30\7\0\1ytold"
            # a client that does not read
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            sent = 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    while True:
                        await seat.send("x", bytes(65536))
                        sent += 1
            seat.tell("y", b"told")
            for _ in range(10):
                seat.tell("y", bytes(65536))
            assert env.counted["dropped"] >= 6, "what waits for it is bounded"
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            end = b""
            async with asyncio.timeout(20):
                while b"\x30\7\0\1ytold" not in end:
                    end = end[-16:] + await client.reader.read(2**16)

    asyncio.run(run())


def _narrow(endpoint: Endpoint) -> None:
    """What the kernel holds for the one client is little."""
    (connection,) = endpoint._connections
    connection._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


@pytest.mark.parametrize("streams", [False, True])
def test_what_waits_to_be_told_comes_before_what_is_sent_later(tmp_path: Path, streams: bool) -> None:
    """A withdrawal behind the next offer would withdraw that."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"later"

    async def run() -> None:
        async with (
            listening(tmp_path) as (endpoint, _, port),
            endpoint.seat("pump-1", TOKEN, Guest()) as seat,
        ):
            client = await dial(port)
            client.writer.write(connect_packet())
            await client.read(4)
            _narrow(endpoint)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            while seat.ready:
                seat.send_now(seat.packed("x", bytes(65536)))
            seat.tell("y", b"told")
            later = seat.stream("z", 5, parts()) if streams else seat.send("z", b"later")
            sending = asyncio.create_task(later)
            await asyncio.sleep(0)
            assert not seat.ready
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            end = b""
            async with asyncio.timeout(20):
                while not (b"told" in end and b"later" in end):
                    end = end[-64:] + await client.reader.read(2**16)
                await sending
            assert end.index(b"told") < end.index(b"later")
            assert seat.ready

    asyncio.run(run())


def test_a_client_that_reads_nothing_is_cut_off_and_one_that_reads_slowly_is_not(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            listening(tmp_path) as (endpoint, _, port),
            endpoint.seat("pump-1", TOKEN, Guest()) as seat,
        ):
            seat.silence_s = 1.0
            client = await dial(port)
            client.writer.write(connect_packet())
            await client.read(4)
            _narrow(endpoint)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            sending = asyncio.create_task(seat.send("x", bytes(16 * 1024 * 1024)))
            sock = client.writer.transport.get_extra_info("socket")
            loop, taken = asyncio.get_running_loop(), 0
            begun = loop.time()
            while loop.time() - begun < 3 * seat.silence_s:
                with contextlib.suppress(BlockingIOError):
                    taken += len(socket.socket.recv(sock._sock, 16384))
                await asyncio.sleep(0.02)
            assert seat.present and not sending.done(), f"it was cut off after {taken} bytes"
            with pytest.raises(
                Transient, match="pump-1: it read nothing of what it was sent for 1 s"
            ) as caught:
                await sending
            assert caught.value.reason is Reason.NO_RESPONSE and not seat.present

    asyncio.run(run())


def test_a_client_that_does_not_read_is_not_read(tmp_path: Path) -> None:
    """Else its acknowledgements would fill the memory; and it loses nothing."""

    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port):
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest) as seat:
                client = await dial(port)
                client.writer.write(connect_packet())
                await client.read(4)
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5):
                        while True:
                            await seat.send("x", bytes(65536))
                client.writer.write(b"\x32\6\0\1a\0\1x" * 50_000)
                (connection,) = endpoint._connections
                async with asyncio.timeout(20):
                    while connection._transport.is_reading():
                        await asyncio.sleep(0.01)
                assert not guest.messages
                client.writer.transport.resume_reading()  # type: ignore[attr-defined]
                async with asyncio.timeout(30):
                    while len(guest.messages) < 50_000:
                        await client.reader.read(2**20)

    asyncio.run(run())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=64), max_size=12), st.booleans(), st.sampled_from([4, 5]))
def test_no_bytes_break_the_endpoint(tmp_path: Path, parts: list[bytes], greets: bool, version: int) -> None:
    """After whatever bytes the endpoint serves the next client."""
    broken: list[dict[str, Any]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: broken.append(context))
        async with listening(tmp_path) as (endpoint, _, port):
            guest = Guest()
            async with endpoint.seat("pump-1", TOKEN, guest):
                rude = await dial(port)
                if greets:
                    rude.writer.write(connect_packet(version=version))
                for part in parts:
                    rude.writer.write(part)
                rude.writer.write_eof()
                await rude.closed()
                client = await dial(port)
                client.writer.write(connect_packet() + b"\xc0\0")
                assert await client.read(6) == b"\x20\2\0\0\xd0\0"

    asyncio.run(run())
    assert not broken


def test_the_end_of_the_listener_ends_its_connections(tmp_path: Path) -> None:
    async def run() -> None:
        async with listening(tmp_path) as (endpoint, _, port), endpoint.seat("pump-1", TOKEN, Guest()):
            devices = [PullingDevice(port, "token")]
            for device in devices:
                device.start()
                await device.connected.wait()
        await until(lambda: not endpoint._connections)
        for device in devices:
            await device.stop()

    asyncio.run(run())

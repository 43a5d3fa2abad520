"""Packets, addresses, tables and topics: by example and by whatever hypothesis thinks of."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged_mqtt import packets
from edged_mqtt import thingsboard as tb
from edged_mqtt.config import BrokerConfig, MqttConfig, parse_address, parse_config, parse_device, parse_link
from edged_mqtt.packets import Malformed


@pytest.mark.parametrize("length", [0, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, 268_435_455])
def test_lengths_are_those_of_the_standards_table(length: int) -> None:
    data = packets.length_bytes(length)
    assert len(data) == 1 + (length > 127) + (length > 16_383) + (length > 2_097_151)
    assert packets.frame(b"\x30" + data[:-1], 2**28) is None
    found = packets.frame(b"\x30" + data, 2**28)
    assert found == (0x30, 1 + len(data), 1 + len(data)) if length == 0 else found is None


def test_what_does_not_fit_is_not_made() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        packets.length_bytes(268_435_456)


@given(st.binary(max_size=300), st.sampled_from([packets.V3, packets.V5]))
def test_no_bytes_break_the_parser(data: bytes, version: int) -> None:
    """Whatever comes is parsed, or refused as malformed; nothing else, and nothing beyond its end is read."""
    for parse in (
        lambda: packets.frame(data, 1000),
        lambda: packets.parse_connect(data),
        lambda: packets.parse_publish(0x32, data, version),
        lambda: packets.parse_publish(0x30, data, version),
        lambda: packets.parse_subscribe(data, version, with_options=True),
        lambda: packets.parse_subscribe(data, version, with_options=False),
    ):
        try:
            parse()
        except Malformed as exc:
            assert str(exc)


@given(
    st.text(st.characters(exclude_characters="\0+#", exclude_categories=["Cs"]), min_size=1, max_size=40),
    st.binary(max_size=200),
    st.sampled_from([packets.V3, packets.V5]),
)
def test_a_message_comes_back_as_it_was_sent(topic: str, payload: bytes, version: int) -> None:
    packet = packets.publish_head(topic.encode(), len(payload), version) + payload
    found = packets.frame(packet, 10_000)
    assert found is not None
    first, begin, end = found
    assert end == len(packet)
    assert packets.parse_publish(first, packet[begin:end], version) == packets.Publish(topic, payload)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"\0\4MQTX\4\2\0\0\0\0", packets.Code.UNSUPPORTED_VERSION),
        (b"\0\6MQIsdp\3\2\0\0\0\0", packets.Code.UNSUPPORTED_VERSION),
        (b"\0\4MQTT\4\3\0\0\0\0", packets.Code.MALFORMED),
        (b"\0\4MQTT\4\x42\0\0\0\0\0\1x", packets.Code.MALFORMED),
        (b"\0\4MQTT\4\2\0\0\0\0more", packets.Code.MALFORMED),
        (b"\0\4MQTT\4\0\0\0\0\0", packets.Code.BAD_CLIENT_ID),
        (b"\0\4MQTT\5\2\0\0\5\x27\0\0\0\0\0\0", packets.Code.PROTOCOL_ERROR),
        (b"\0\4MQTT\5\2\0\0\x0a\x27\0\0\1\0\x27\0\0\1\0\0\0", packets.Code.PROTOCOL_ERROR),
        (b"\0\4MQTT\5\2\0\0\2\x99\0\0\0", packets.Code.MALFORMED),
        (b"\0\4MQTT\5\2\0\0\2\x27\0\0\0", packets.Code.MALFORMED),
        (b"\0\4MQTT\4\x82\0\0\0\0\0\2\xff\xff", packets.Code.MALFORMED),
    ],
)
def test_a_connect_that_is_not_one(body: bytes, code: packets.Code) -> None:
    with pytest.raises(Malformed) as caught:
        packets.parse_connect(body)
    assert caught.value.code is code


def test_a_connect_with_a_will_and_properties() -> None:
    body = b"\0\4MQTT\5\xc6\0\x3c\5\x11\0\0\0\x0a\0\2id\0\0\1w\0\2by\0\5token\0\6secret"
    found = packets.parse_connect(body)
    assert found == packets.Connect(5, "id", 60, "token", b"secret")


def test_a_connect_says_how_large_a_packet_it_takes() -> None:
    properties = b"\x26\0\1a\0\1b\x27\0\0\1\0\x15\0\1m\x11\0\0\0\x0a"
    body = b"\0\4MQTT\5\2\0\x3c" + bytes([len(properties)]) + properties + b"\0\2id"
    assert packets.parse_connect(body) == packets.Connect(5, "id", 60, None, None, 256)
    assert packets.parse_connect(b"\0\4MQTT\4\2\0\0\0\0").most_bytes == packets.MOST_PACKET_BYTES


def test_a_packet_that_is_too_large_is_refused_before_it_is_there() -> None:
    with pytest.raises(Malformed, match="allowed: 100") as caught:
        packets.frame(b"\x30\xff\x7f", 100)
    assert caught.value.code is packets.Code.TOO_LARGE


# -- addresses and tables


@pytest.mark.parametrize(
    ("rest", "link", "place"),
    [
        ("listen@0.0.0.0:8883/pump-1", "mqtt:listen@0.0.0.0:8883", "pump-1"),
        ("listen@[::1]:1883/a", "mqtt:listen@[::1]:1883", "a"),
        ("broker.example:1883/devices/pump 1", "mqtt:broker.example:1883", "devices/pump 1"),
        ("[2001:db8::1]:8883/p", "mqtt:[2001:db8::1]:8883", "p"),
    ],
)
def test_an_address_names_wire_and_place(rest: str, link: str, place: str) -> None:
    found = parse_device(rest)
    assert (found.link, found.place) == (link, place)
    assert str(parse_address(link.removeprefix("mqtt:"))) == link.removeprefix("mqtt:")


@pytest.mark.parametrize(
    "rest",
    [
        "", "listen@0.0.0.0:8883", "listen@localhost:8883/a", "listen@0.0.0.0/a", "listen@0.0.0.0:0/a", "host:70000/a",
        "listen@0.0.0.0:8883/a/b", "listen@0.0.0.0:8883/", "host:1883/", "host:1883/a//b", "host:1883/a/+", "host:1883/#",
        "host:1883/$SYS", "ho st:1883/a", ":1883/a", "listen@[::1:1883/a", "[::g]:1883/a", "host:１883/a",
    ],
)  # fmt: skip
def test_an_address_that_is_none_says_what_is_allowed(rest: str) -> None:
    with pytest.raises(ValueError, match="allowed: mqtt:listen@ADDRESS:PORT/NAME"):
        parse_device(rest)


@given(st.text(max_size=60))
def test_no_text_breaks_an_address(rest: str) -> None:
    for text in (rest, "listen@" + rest, f"host:{rest}"):
        try:
            parse_address(text)
        except ValueError as exc:
            assert "allowed: " in str(exc)


def test_tables_name_each_fault() -> None:
    with pytest.raises(ValueError) as caught:
        parse_config({"proof": "smell", "rounds": True, "units": {"a": 1}, "odd": 1, "silence_s": "x"})
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["proof", "rounds", "units", "odd", "silence_s"]
    assert all("allowed: " in line for line in lines)
    assert parse_config({}) == MqttConfig()
    with pytest.raises(ValueError, match="certificate: found 'x'; allowed: an absolute path"):
        parse_link({"certificate": "x"}, LISTENER)
    with pytest.raises(ValueError, match="tls: found an unknown key"):
        parse_link({"tls": True}, LISTENER)
    assert parse_link({"tls": True}, "broker.example:8883") == BrokerConfig(tls=True)


LISTENER = "listen@0.0.0.0:8883"
CERTIFICATES = {"certificate": "/a.crt", "client_ca": "/ca.crt", "client_certificates": "required"}


@pytest.mark.parametrize(
    ("rest", "table", "keys"),
    [
        (LISTENER, {}, ["certificate"]),
        ("listen@127.0.0.1:1883", {}, []),
        ("listen@[::1]:1883", {}, []),
        (LISTENER, {"plain": True}, []),
        (LISTENER, CERTIFICATES, []),
        (LISTENER, CERTIFICATES | {"client_ca": ""}, ["client_certificates"]),
        ("listen@127.0.0.1:1883", CERTIFICATES | {"certificate": ""}, ["client_ca"]),
        (LISTENER, {"plain": True, "client_certificates": "required"}, ["client_certificates"]),
        ("broker.example:1883", {"user": "edged"}, []),
        ("broker.example:1883", {"ca": "/c"}, ["ca"]),
        ("192.0.2.1:1883", {"credential": "b", "certificate": "/c"}, ["certificate", "credential"]),
        ("192.0.2.1:1883", {"credential": "b", "plain": True}, []),
        ("192.0.2.1:8883", {"credential": "b", "tls": True}, []),
        ("localhost.example:1883", {"credential": "b"}, ["credential"]),
        *((host, {"credential": "b"}, []) for host in ("localhost:1883", "127.0.0.9:1883", "[::1]:1883")),
    ],
)
def test_what_would_go_in_the_clear_or_ask_for_nothing_is_refused(
    rest: str, table: dict[str, Any], keys: list[str]
) -> None:
    try:
        parse_link(table, rest)
        lines = []
    except ValueError as error:
        lines = str(error).splitlines()
    assert [line.partition(":")[0] for line in lines] == keys
    assert all("allowed: " in line for line in lines)


# -- ThingsBoard's payloads


def test_silence_is_borne_for_longer_than_the_shortest_keep_alive_that_a_device_is_told() -> None:
    """One second, and MQTT gives it half of that on top."""
    with pytest.raises(ValueError, match="longest_silence_s: found 1"):
        parse_link({"longest_silence_s": 1}, "listen@127.0.0.1:1883")
    assert parse_link({"longest_silence_s": 2}, "listen@127.0.0.1:1883")


@pytest.mark.parametrize(
    ("topic", "payload", "expected"),
    [
        ("v2/fw/request/1/chunk/0", b"4096", tb.ChunkRequest("fw", "1", 0, 4096)),
        ("v2/sw/request/abc/chunk/7", b"", tb.ChunkRequest("sw", "abc", 7, None)),
        ("v2/fw/request/1/chunk/0", b"0", tb.ChunkRequest("fw", "1", 0, 0)),
        ("v2/fw/request/1/chunk/-1", b"1", None),
        ("v2/fw/request//chunk/0", b"1", None),
        ("v2/fw/request/1/chunk/0/x", b"1", None),
        ("v2/fw/request/1/chunk/9999999999", b"1", None),
    ],
)
def test_chunk_requests(topic: str, payload: bytes, expected: tb.ChunkRequest | None) -> None:
    assert tb.chunk_request(topic, payload) == expected


@given(
    st.sampled_from(["fw", "sw"]),
    st.from_regex(r"[0-9A-Za-z_-]{1,32}", fullmatch=True),
    st.integers(0, 999_999_998),
    st.none() | st.integers(0, 999_999_999),
)
def test_what_follows_a_request_means_what_it_is_read_as(
    component: str, number: str, chunk: int, size: int | None
) -> None:
    following = tb.ChunkRequest(component, number, chunk, size).following
    assert following == (component, number, chunk + 1, size)
    assert tb.chunk_request(following.topic, following.payload) == following


@pytest.mark.parametrize("payload", [b"-1", b"4k", b"1e3", b"9" * 10, "４".encode(), b" 1"])
def test_a_size_that_is_none_is_misbehaviour(payload: bytes) -> None:
    with pytest.raises(tb.Misbehaved, match="is no number"):
        tb.chunk_request("v2/fw/request/1/chunk/0", payload)


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 6)).map(lambda part: (part[0], sum(part))), max_size=20
    )
)
def test_pieces_are_the_bytes_that_were_added(parts: list[tuple[int, int]]) -> None:
    """In any order, twice, or in parts that touch or overlap."""
    pieces, added = tb.Pieces(), set[int]()
    for begin, end in parts:
        pieces.add(begin, end)
        added.update(range(begin, end))
        assert pieces.total_bytes == len(added)
        assert len(pieces) == sum(at - 1 not in added for at in added)


@given(st.text(max_size=60), st.binary(max_size=100))
def test_no_message_breaks_the_rules(topic: str, payload: bytes) -> None:
    for read in (
        lambda: tb.chunk_request(topic, payload),
        lambda: tb.reported(payload),
        lambda: tb.attributes_answer(payload, {"a": 1}, {"b": 2}),
        lambda: tb.rpc_answer(payload),
    ):
        try:
            read()
        except (ValueError, tb.Misbehaved) as exc:
            assert str(exc)


@pytest.mark.parametrize(
    "value",
    ["[" * 200 + "]" * 200, '{"a":' * 33 + "1" + "}" * 33, "[" * 100_000, '"\\ud800"', '"\ud800"'],
    ids=["lists", "objects", "unclosed", "half a pair", "half a pair in its bytes"],
)
def test_what_could_not_be_written_again_is_not_read(value: str) -> None:
    payload = b'{"x":%b}' % value.encode(errors="surrogatepass")
    with pytest.raises(ValueError, match="nests|JSON within|Expecting|surrogates|decode"):
        tb.reported(payload)


def test_what_nests_a_little_is_read() -> None:
    flat: dict[str, Any] = {f"k{number}": [{}] for number in range(100)}
    deep: Any = 1
    for _ in range(tb.DEEPEST - 2):
        deep = [deep]
    (found,) = tb.reported(json.dumps({**flat, "deep": deep, "pair": "\U0001f600"}).encode())
    assert found == {**flat, "deep": deep, "pair": "\U0001f600"}


def test_samples_come_in_the_order_of_their_times() -> None:
    late, early = {"ts": 2000, "values": {"a": 2}}, {"ts": 1000, "values": {"a": 1}}
    for sent in ([late, early], [early, late], [{**late, "ts": "2000"}, early]):
        assert tb.reported(json.dumps(sent).encode()) == [{"a": 1}, {"a": 2}]
    same = [{"ts": 1, "values": {"a": number}} for number in range(5)]
    assert tb.reported(json.dumps(same).encode()) == [{"a": number} for number in range(5)]
    now = {"a": 3}
    assert tb.reported(json.dumps([now, late]).encode()) == [{"a": 2}, {"a": 3}], "without a time: now"
    assert tb.reported(json.dumps(late).encode()) == [{"a": 2}]
    assert tb.reported(b'{"ts":1}') == [{"ts": 1}], "a name like any other"


@pytest.mark.parametrize("time", ["null", "[]", '"noon"'])
def test_a_time_that_is_none_makes_no_sample(time: str) -> None:
    with pytest.raises(ValueError, match="time|convert"):
        tb.reported(b'{"ts":%b,"values":{}}' % time.encode())


def test_answers_to_attribute_requests() -> None:
    def answer(**asked: str) -> object:
        return json.loads(tb.attributes_answer(json.dumps(asked).encode(), {"a": 1}, {"b": 2, "c": 3}))

    assert answer() == {"client": {"a": 1}, "shared": {"b": 2, "c": 3}}
    assert answer(sharedKeys="b,x") == {"shared": {"b": 2}}
    assert answer(sharedKeys="x") == {"shared": {}}
    assert answer(clientKeys="a", sharedKeys="c") == {"client": {"a": 1}, "shared": {"c": 3}}


def test_a_crc_is_written_as_thingsboard_writes_it() -> None:
    found = tb.checksum("CRC32")
    found.update(b"1234")
    found.update(b"56789")
    assert found.hexdigest() == "2639f4cb"
    assert zlib.crc32(b"123456789") == 0xCBF43926


# -- what a download may cost


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(64, 3000)), max_size=200), st.integers(1, 5))
def test_no_client_gets_more_than_its_rounds(asked: list[tuple[int, int]], rounds: int) -> None:
    size = 10_000
    download = tb.Download(size, rounds)
    served = 0
    for index, chunk in asked:
        offset = index * chunk
        length = max(0, min(chunk, size - offset))
        try:
            download.ask(offset, length)
        except tb.Misbehaved:
            break
        download.sent(offset, length)
        served += length
        assert 0 <= download.acknowledged_bytes <= size
    assert served <= rounds * size + download.slack_bytes


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=60))
def test_what_was_sent_is_counted_once_and_parts_that_touch_are_one(parts: list[tuple[int, int]]) -> None:
    pieces, sent = tb.Pieces(), set[int]()
    for begin, length in parts:
        if length:
            pieces.add(begin, begin + length)
            sent |= set(range(begin, begin + length))
        assert pieces.total_bytes == len(sent)
        assert len(pieces) == sum(at - 1 not in sent for at in sent)


def test_chunks_that_overlap_are_no_whole_image() -> None:
    download = tb.Download(200, 3)
    for offset, length in ((0, 120), (20, 100)):
        download.ask(offset, length)
        download.sent(offset, length)
    assert not download.is_whole
    download.ask(120, 80)
    assert download.acknowledged_bytes == 120
    download.sent(120, 80)
    assert download.is_whole


@given(st.permutations(range(8)))
def test_chunks_in_any_order_are_one_round_and_the_first_one_again_is_another(order: list[int]) -> None:
    download = tb.Download(800, 3)
    for chunk in order:
        assert not download.ask(100 * chunk, 100)
        download.sent(100 * chunk, 100)
    assert download.is_whole
    assert download.ask(0, 100) and not download.is_whole


def test_what_a_download_cost_is_not_forgotten_where_it_begins_anew() -> None:
    download = tb.Download(200, 3)
    for chunk in (0, 1):
        download.ask(100 * chunk, 100)
        download.sent(100 * chunk, 100)
    download.began(anew=False)
    assert (download.wholes, download.sent_bytes, download.is_whole) == (0, 200, True), "it goes on"
    download.began(anew=True)
    assert (download.wholes, download.sent_bytes, download.is_whole) == (1, 200, False)
    download.ask(0, 100)
    download.sent(0, 100)
    download.began(anew=True)
    assert (download.wholes, download.sent_bytes, download.acknowledged_bytes) == (1, 300, 0)


@pytest.mark.parametrize(("size", "allowed"), [(1, False), (63, False), (64, True), (4096, True)])
def test_a_chunk_is_no_smaller_than_what_it_costs_unless_it_ends_the_image(size: int, allowed: bool) -> None:
    download = tb.Download(10_001, 3)
    if allowed:
        download.ask(0, size)
    else:
        with pytest.raises(tb.Misbehaved, match=f"a chunk of {size} bytes; allowed: 64 or more") as caught:
            download.ask(0, size)
        assert caught.value.event == "chunk_too_small"
    download.ask(10_000, 1)
    tb.Download(40, 3).ask(0, 40)


def _offer(version: str) -> tb.Offer:
    return tb.Offer("fw", "pump", version, 100_000, "", "SHA256")


def test_a_number_stands_for_its_image_after_any_number_of_cuts_and_until_that_is_withdrawn() -> None:
    numbers, offer = tb.Numbers(), _offer("2")
    assert numbers.stands_for("7", offer) and not numbers.stands_for("7", _offer("3"))
    for _ in range(3):
        numbers.reconnected()
        assert numbers.stood_for("7", offer) and not numbers.stood_for("7", _offer("3"))
    numbers.withdrawn()
    assert not numbers.stood_for("7", offer)
    for number in range(2 * tb.MOST_NUMBERS):
        numbers.stands_for(str(number), offer)
        numbers.reconnected()
    known = [number for number in range(2 * tb.MOST_NUMBERS) if numbers.stood_for(str(number), offer)]
    assert known == list(range(tb.MOST_NUMBERS, 2 * tb.MOST_NUMBERS)), "the oldest are forgotten"


def test_a_size_of_chunks_is_that_of_its_image_alone() -> None:
    numbers = tb.Numbers()
    assert numbers.stands_for("1", _offer("2")) and numbers.size("1", 4096) == 4096
    assert numbers.size("1", None) == 4096
    numbers.reconnected()
    assert numbers.stands_for("1", _offer("2")) and numbers.size("1", None) == 4096, "it goes on"
    numbers = tb.Numbers()
    assert numbers.stands_for("1", _offer("2")) and numbers.size("1", 4096) == 4096
    numbers.reconnected()
    assert numbers.stands_for("1", _offer("3"))
    assert numbers.size("1", None) is None, "the size was another image's"


def test_a_device_that_may_boot_something_else_runs_nothing_for_sure() -> None:
    offer = tb.Offer("fw", "pump", "2", 1, "", "SHA256")
    told = tb.Told()
    assert not told.take("fw", {"temperature": 1}, 1.0)
    told.take("fw", {"current_fw_title": "pump", "current_fw_version": "2", "fw_state": "UPDATING"}, 2.0)
    assert not told.runs(offer)
    told.take("fw", {"current_fw_title": "pump", "current_fw_version": "2"}, 3.0)
    assert told.runs(offer)
    told.take("fw", {"current_fw_title": "valve", "current_fw_version": "2"}, 4.0)
    assert not told.runs(offer)
    told = tb.Told("pump", "1", awaits="2")
    assert not told.runs(tb.Offer("fw", "pump", "1", 1, "", "SHA256")), "it has another image whole"
    told.reconnected(5.0)
    assert told.version is None


def test_a_version_that_failed_to_install_does_not_run() -> None:
    told, old, new = tb.Told(), _offer("1"), _offer("2")
    told.offered("2")
    told.take("fw", {"current_fw_version": "2", "fw_state": "FAILED"}, 1.0)
    assert not told.runs(new)
    told.take("fw", {"current_fw_version": "1", "fw_state": "FAILED"}, 2.0)
    assert told.runs(old), "it failed to install the other one"
    told.take("fw", {"current_fw_version": "2"}, 3.0)
    assert told.runs(new)


def test_since_when_a_device_speaks_for_what_it_runs() -> None:
    told = tb.Told()
    told.reconnected(1.0)
    told.take("fw", {"current_fw_version": "1"}, 2.0)
    assert told.since == 1.0, "what it said first on a connection is of what it runs there"
    told.take("fw", {"current_fw_version": "1"}, 3.0)
    assert told.since == 1.0
    told.take("fw", {"current_fw_version": "2"}, 4.0)
    assert told.since == 4.0
    told.reconnected(5.0)
    assert (told.title, told.version, told.since) == (None, None, 5.0)
    told.offered("2")
    told.take("fw", {"current_fw_version": "2"}, 6.0)
    assert told.since == 6.0, "it was another until then, and did not say which"

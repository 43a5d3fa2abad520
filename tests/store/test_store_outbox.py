from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from store_kit import START, read, write

from edged.store import Tx, audit, outbox
from edged.store.outbox import Trimmed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "edged.db"


def put(*numbers: int) -> Callable[[Tx], list[int]]:
    return lambda tx: [outbox.put(tx, "job", "uno", "j1", {"n": n}, f"k{n}") for n in numbers]


def acknowledge(consumer: str, seq: int) -> Callable[[Tx], int]:
    return lambda tx: outbox.acknowledge(tx, consumer, seq)


def held(path: Path) -> list[int]:
    return [event.seq for event in read(path, lambda tx: outbox.after(tx, 0))]


def test_events_come_in_order_and_whole(path: Path) -> None:
    assert write(path, put(1, 2, 3)) == [[1, 2, 3]]
    first = read(path, lambda tx: outbox.after(tx, 0))[0]
    assert first == outbox.Event(1, START, "job", "uno", "j1", {"n": 1}, "k1")
    assert [event.seq for event in read(path, lambda tx: outbox.after(tx, 1, limit=1))] == [2]
    assert read(path, outbox.head) == 3


def test_a_key_is_put_once(path: Path) -> None:
    assert write(path, put(1, 2), put(2, 1, 3)) == [[1, 2], [2, 1, 3]]
    assert held(path) == [1, 2, 3]


def test_a_cursor_is_durable_and_never_goes_back(path: Path) -> None:
    write(path, put(1, 2, 3))
    assert write(path, acknowledge("u", 2), acknowledge("u", 1)) == [2, 2]
    assert read(path, lambda tx: outbox.cursor(tx, "u")) == 2
    assert read(path, lambda tx: outbox.cursor(tx, "unknown")) == 0
    assert read(path, outbox.depth) == {"u": 1}
    with pytest.raises(ValueError, match="newest is 3"):
        write(path, acknowledge("u", 4))


def test_a_new_consumer_starts_with_what_is_still_there(path: Path) -> None:
    write(path, put(*range(1, 6)), acknowledge("u", 3), lambda tx: outbox.trim(tx, 100))
    assert write(path, lambda tx: outbox.register(tx, "v"), lambda tx: outbox.register(tx, "u")) == [3, 3]
    assert read(path, outbox.depth) == {"u": 2, "v": 2}
    write(path, acknowledge("u", 5), acknowledge("v", 5), lambda tx: outbox.trim(tx, 100))
    assert write(path, lambda tx: outbox.register(tx, "w")) == [5]


def test_what_all_have_goes_and_its_number_never_comes_back(path: Path) -> None:
    write(path, put(*range(1, 6)), acknowledge("u", 5), acknowledge("v", 3))
    assert write(path, lambda tx: outbox.trim(tx, 100)) == [Trimmed(3, 0)]
    assert held(path) == [4, 5]
    write(path, acknowledge("v", 5))
    assert write(path, lambda tx: outbox.trim(tx, 100), put(9)) == [Trimmed(2, 0), [6]]
    assert read(path, outbox.lost) == {"u": 0, "v": 0}
    assert read(path, audit.head).seq == 0


def test_the_newest_stay_for_those_who_watch(path: Path) -> None:
    write(path, put(*range(1, 11)), acknowledge("u", 10))
    assert write(path, lambda tx: outbox.trim(tx, 100, keep_rows=4)) == [Trimmed(6, 0)]
    assert held(path) == [7, 8, 9, 10]
    assert write(path, lambda tx: outbox.trim(tx, 100, keep_rows=40)) == [Trimmed(0, 0)]


def test_without_a_consumer_the_log_is_bounded_and_nothing_is_lost(path: Path) -> None:
    write(path, put(*range(1, 41)))
    assert write(path, lambda tx: outbox.trim(tx, 40)) == [Trimmed(0, 0)]
    assert write(path, put(41), lambda tx: outbox.trim(tx, 40))[1] == Trimmed(5, 0)
    assert held(path) == list(range(6, 42))
    assert read(path, audit.head).seq == 0


def test_a_dead_consumer_cannot_fill_the_disk_and_what_it_lost_is_on_record(path: Path) -> None:
    write(path, lambda tx: outbox.register(tx, "dead"), put(*range(1, 31)), acknowledge("live", 30))
    write(path, put(*range(31, 42)))
    assert write(path, lambda tx: outbox.trim(tx, 40)) == [Trimmed(0, 5)]
    assert held(path) == list(range(6, 42))
    assert read(path, outbox.lost) == {"dead": 5, "live": 0}
    assert read(path, outbox.depth) == {"dead": 36, "live": 11}
    (row,) = read(path, audit.list)
    assert (row.event, row.data) == ("outbox_dropped", {"before_seq": 6, "dropped": {"dead": 5}})
    assert write(path, lambda tx: outbox.trim(tx, 40)) == [Trimmed(0, 0)]
    assert len(read(path, audit.list)) == 1


def test_a_consumer_that_is_removed_holds_nothing_back(path: Path) -> None:
    write(path, lambda tx: outbox.register(tx, "dead"), put(1, 2, 3), acknowledge("live", 3))
    assert write(path, lambda tx: outbox.remove(tx, "dead"), lambda tx: outbox.trim(tx, 9))[1] == Trimmed(
        3, 0
    )

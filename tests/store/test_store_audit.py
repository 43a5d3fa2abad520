from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import START, HandClock, raw, read, write

from edged.store import Store, Tx, audit

KEY = Ed25519PrivateKey.generate()
ROWS = 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "edged.db"


def add(n: int) -> Callable[[Tx], audit.Head]:
    return lambda tx: audit.append(tx, "operator", "event", {"n": n, "text": "ü"})


def fill(path: Path, signed_at: tuple[int, ...] = (4, 8)) -> None:
    def step(tx: Tx) -> None:
        for n in range(1, ROWS + 1):
            add(n)(tx)
            if n in signed_at:
                audit.sign_head(tx, KEY.sign)

    write(path, step)


def report_of(path: Path) -> audit.AuditReport:
    """What the whole finds; slices of any size find the same."""
    report = read(path, lambda tx: audit.verify(tx, KEY.public_key()))
    for limit in (1, 3, ROWS, 1000):
        assert in_slices(path, limit) == report
    return report


def in_slices(path: Path, limit: int, between: Callable[[Tx], object] | None = None) -> audit.AuditReport:
    async def main() -> audit.AuditReport:
        found = audit.Verifying()
        async with Store.open(path, HandClock()) as store:
            while not found.ended:
                found = await store.read(
                    lambda tx, so_far=found: audit.verify_more(tx, so_far, KEY.public_key(), limit)  # type: ignore[misc]
                )
                if between is not None and found.report.rows < ROWS:
                    await store.write(between)
        return found.report

    return asyncio.run(main())


def without_guards(path: Path, *statements: str) -> None:
    """What somebody does who can write to the file."""
    with raw(path) as conn:
        for (name,) in conn.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            conn.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            conn.execute(statement)


def test_an_empty_trail(path: Path) -> None:
    assert report_of(path) == audit.AuditReport(True, 0, None, "", 0)
    assert read(path, audit.head) == audit.Head(0, audit.GENESIS)
    assert write(path, lambda tx: audit.sign_head(tx, KEY.sign)) == [None]


def test_an_intact_trail(path: Path) -> None:
    fill(path)
    assert report_of(path) == audit.AuditReport(True, ROWS, None, "", 2)
    rows = read(path, audit.list)
    assert [row.seq for row in rows] == list(range(1, ROWS + 1))
    assert [row.seq for row in read(path, lambda tx: audit.list(tx, after=3, limit=2))] == [4, 5]
    assert (rows[0].ts, rows[0].actor, rows[0].event, rows[0].data) == (
        START,
        "operator",
        "event",
        {"n": 1, "text": "ü"},
    )


def test_the_encoding_is_the_one_that_is_written_down(path: Path) -> None:
    """Computed here from the words of the module's docstring, not with its code."""
    write(path, lambda tx: audit.append(tx, "ope:rator", "event", {"b": "ü", "a": [1, None]}))
    fields = [
        b"1",
        b"2026-01-01T00:00:00.000Z",
        b"ope:rator",
        b"event",
        b'{"a":[1,null],"b":"\\u00fc"}',
        b"0" * 64,
    ]
    told = b"edged-audit-1\n" + b"".join(str(len(f)).encode() + b":" + f + b"," for f in fields)
    assert read(path, audit.head).hash == hashlib.sha256(told).hexdigest()


def test_the_schema_refuses_to_change_or_remove(path: Path) -> None:
    fill(path)
    forbidden = [
        "UPDATE audit SET actor = 'nobody' WHERE seq = 3",
        "DELETE FROM audit WHERE seq = 10",
        "INSERT OR REPLACE INTO audit SELECT * FROM audit WHERE seq = 10",
        "INSERT INTO audit SELECT 12, format, ts, actor, event, json, prev_hash, hash FROM audit LIMIT 1",
        "UPDATE signatures SET seq = 9 WHERE seq = 8",
        "DELETE FROM signatures",
    ]
    with raw(path) as conn:
        for statement in forbidden:
            with pytest.raises(Exception, match=r"cannot be|can only be"):
                conn.execute(statement)
    assert report_of(path).intact


SWAP = "UPDATE audit SET {0} = (SELECT {0} FROM audit AS o WHERE o.seq = 11 - audit.seq) WHERE seq IN (5, 6)"


@pytest.mark.parametrize(
    ("statements", "first_bad", "says"),
    [
        (["UPDATE audit SET actor = 'nobody' WHERE seq = 3"], 3, "not what was written"),
        (["UPDATE audit SET json = '{}' WHERE seq = 10"], 10, "not what was written"),
        (["UPDATE audit SET ts = '2026-01-01T00:00:00.001Z' WHERE seq = 1"], 1, "not what was written"),
        (["UPDATE audit SET format = 2 WHERE seq = 7"], 7, "unknown format"),
        (["UPDATE audit SET prev_hash = hash WHERE seq = 7"], 7, "does not follow"),
        (["DELETE FROM audit WHERE seq = 5"], 5, "missing"),
        (["DELETE FROM audit WHERE seq = 1"], 1, "missing"),
        (["UPDATE audit SET seq = 0 WHERE seq = 1"], 1, "missing"),
        (["UPDATE audit SET seq = -9223372036854775808 WHERE seq = 1"], 1, "missing"),
        (["DELETE FROM audit WHERE seq = 5", "UPDATE audit SET seq = seq - 1 WHERE seq > 5"], 5, "not follow"),
        (["DELETE FROM audit WHERE seq > 7"], 8, "the head 8 was signed"),
        (["DELETE FROM audit"], 1, "the head 8 was signed"),
        ([SWAP.format(c) for c in ("ts", "actor", "event", "json", "prev_hash", "hash")], 5, ""),
        (["UPDATE audit SET seq = 100 WHERE seq = 5", "UPDATE audit SET seq = 5 WHERE seq = 6",
          "UPDATE audit SET seq = 6 WHERE seq = 100"], 5, "does not follow"),
        (["UPDATE signatures SET signature = replace(signature, '0', '1')"], 4, "not this node's"),
        (["UPDATE signatures SET signature = 'zz' WHERE seq = 8"], 8, "not this node's"),
        (["UPDATE signatures SET ts = '2027-01-01T00:00:00.000Z' WHERE seq = 8"], 8, "not this node's"),
        (["UPDATE signatures SET seq = 9 WHERE seq = 8"], 9, "not the row that was signed"),
    ],
)  # fmt: skip
def test_what_was_done_to_the_file_is_found(
    path: Path, statements: list[str], first_bad: int, says: str
) -> None:
    fill(path)
    without_guards(path, *statements)
    report = report_of(path)
    assert (report.intact, report.first_bad_seq) == (False, first_bad)
    assert says in report.reason
    assert report.rows == first_bad - 1


def test_what_is_added_between_two_slices_is_checked_too(path: Path) -> None:
    fill(path)

    def add_signed(tx: Tx) -> None:
        add(0)(tx)
        audit.sign_head(tx, KEY.sign)

    assert in_slices(path, 4, add_signed) == audit.AuditReport(True, ROWS + 2, None, "", 4)


def test_other_reads_come_between_the_slices_of_a_long_check(path: Path) -> None:
    many = 6 * audit.VERIFY_ROWS
    write(path, lambda tx: [add(n)(tx) for n in range(many)])

    async def main() -> list[int]:
        seen: list[int] = []
        async with Store.open(path, HandClock()) as store:

            async def look() -> None:
                while not found.ended:
                    await store.read(audit.head)
                    seen.append(found.report.rows)

            found = audit.Verifying()
            other = asyncio.create_task(look())
            while not found.ended:
                found = await store.read(lambda tx, so_far=found: audit.verify_more(tx, so_far, None))  # type: ignore[misc]
            await other
        assert found.report.rows == many
        return seen

    seen = asyncio.run(main())
    assert len({rows for rows in seen if 0 < rows < many}) >= 4


def test_a_chain_that_was_computed_anew_does_not_fit_the_signed_head(path: Path) -> None:
    fill(path)
    without_guards(path, "DELETE FROM audit WHERE seq > 2")
    write(path, *(add(100 + n) for n in range(3, ROWS + 1)))
    report = report_of(path)
    assert (report.intact, report.first_bad_seq) == (False, 4)
    assert "not the row that was signed" in report.reason


def test_another_key_does_not_pass(path: Path) -> None:
    fill(path)
    other = Ed25519PrivateKey.generate().public_key()
    assert not read(path, lambda tx: audit.verify(tx, other)).intact
    assert read(path, lambda tx: audit.verify(tx, None)).intact


def test_a_head_is_signed_once(path: Path) -> None:
    fill(path, signed_at=())
    first, again = write(
        path,
        lambda tx: audit.sign_head(tx, KEY.sign),
        lambda tx: audit.sign_head(tx, lambda message: b"other"),
    )
    assert first == again
    assert first is not None
    assert (first.seq, first.ts) == (ROWS, START)
    assert report_of(path).signed_heads == 1


def test_text_that_is_no_unicode_does_not_stop_the_trail(path: Path) -> None:
    write(path, lambda tx: audit.append(tx, "operator", "event", {"argument": "\udcff"}))
    assert report_of(path).intact
    assert read(path, audit.list)[0].data == {"argument": "\udcff"}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_change_of_any_field_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("audit") / "edged.db"
    fill(path)
    column = data.draw(st.sampled_from(["ts", "actor", "event", "json", "prev_hash", "hash"]))
    seq = data.draw(st.integers(1, ROWS))
    with raw(path) as conn:
        (old,) = conn.execute(f"SELECT {column} FROM audit WHERE seq = ?", [seq]).fetchone()
    at = data.draw(st.integers(0, len(old) - 1))
    new = old[:at] + data.draw(st.sampled_from("0123456789abz ")) + old[at + 1 :]
    if new == old:
        return
    with raw(path) as conn:
        conn.execute("PRAGMA ignore_check_constraints = ON")
        for name in ("audit_no_update", "audit_no_delete"):
            conn.execute(f"DROP TRIGGER {name}")
        conn.execute(f"UPDATE audit SET {column} = ? WHERE seq = ?", [new, seq])
    report = report_of(path)
    assert not report.intact
    assert report.first_bad_seq in (seq, seq + 1)

"""The audit trail: an append-only chain of rows, whose head the node signs.

**What is hashed** (format 1; ``format`` stands in each row, so that a later one can follow in the same
chain)::

    hash      = sha256("edged-audit-1\\n" N(seq) N(ts) N(actor) N(event) N(json) N(prev_hash)), lower-case hex
    signature = Ed25519 over "edged-audit-head-1\\n" N(seq) N(hash) N(ts), hex
    N(text)   = the length of the UTF-8 bytes in decimal, ":", the bytes, ","      (a netstring)

``seq`` is decimal, counts from 1 and has no gap; ``ts`` is RFC 3339 UTC with milliseconds; ``json`` is the
text as it is stored (keys sorted, no spaces, ASCII), so that a checker needs no JSON at all; the first
``prev_hash`` is 64 zeros.

The schema refuses UPDATE and DELETE, which stops mistakes. Whoever can write to the file can undo that and
cut the tail together with the signatures over it: only a head that was told to somebody else (an uplink, a
USB stick) shows it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from edged.api import JsonValue
from edged.clock import from_text, to_text

from .database import Tx

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

__all__ = [
    "GENESIS",
    "VERIFY_ROWS",
    "AuditReport",
    "Head",
    "Record",
    "SignedHead",
    "Verifying",
    "append",
    "broken",
    "dump",
    "head",
    "list",
    "sign_head",
    "verify",
    "verify_more",
    "verify_rows",
]

GENESIS: Final = "0" * 64
VERIFY_ROWS: Final = 500
"""So many rows a reader may check at once, some milliseconds, before others have their turn."""
_FORMAT: Final = 1
_FIRST: Final = -(2**63)

Row: TypeAlias = "sqlite3.Row | Mapping[str, Any]"
"""A row as it is stored: of the database, or of a file that it was written to."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the trail."""

    seq: int
    ts: datetime
    actor: str
    event: str
    data: Mapping[str, JsonValue]
    prev_hash: str
    hash: str


@dataclass(frozen=True, slots=True)
class Head:
    """The newest row: its number (0 where there is none) and its hash (then :data:`GENESIS`)."""

    seq: int
    hash: str


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A head with the node's signature over it, in hex."""

    seq: int
    hash: str
    signature: str
    ts: datetime


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What :func:`verify` found. ``first_bad_seq`` and ``reason`` speak of the first fault; ``signed_heads``
    counts the signatures that were checked (with a key) or compared with their rows (without).
    """

    intact: bool
    rows: int
    first_bad_seq: int | None
    reason: str
    signed_heads: int


@dataclass(frozen=True, slots=True)
class Verifying:
    """A check of the chain on its way: what was found up to ``head``. ``ended``: there is nothing more to check."""

    report: AuditReport = AuditReport(True, 0, None, "", 0)
    head: Head = Head(0, GENESIS)
    ended: bool = False


def append(tx: Tx, actor: str, event: str, data: Mapping[str, JsonValue]) -> Head:
    """Add a row and return the new head.

    ``data`` is any JSON object. Raises ``ValueError`` for what JSON has no word for.
    """
    before = head(tx)
    seq, ts = before.seq + 1, to_text(tx.now)
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = _hash(seq, ts, actor, event, text, before.hash)
    tx.db.execute(
        "INSERT INTO audit (seq, format, ts, actor, event, json, prev_hash, hash)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [seq, _FORMAT, ts, actor, event, text, before.hash, digest],
    )
    return Head(seq, digest)


def head(tx: Tx) -> Head:
    """The newest row."""
    row = tx.db.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    return Head(0, GENESIS) if row is None else Head(row["seq"], row["hash"])


def list(tx: Tx, after: int = 0, limit: int = 100) -> tuple[Record, ...]:
    """The rows after number ``after``, in order, at most ``limit``."""
    rows = tx.db.execute("SELECT * FROM audit WHERE seq > ? ORDER BY seq LIMIT ?", [after, limit])
    return tuple(_record(row) for row in rows)


def sign_head(tx: Tx, sign: Callable[[bytes], bytes]) -> SignedHead | None:
    """Sign the newest row and keep the signature; the one that is kept already where nothing was added since.

    ``sign`` is given the message of the module's docstring. None where the trail is empty.
    """
    newest = head(tx)
    if newest.seq == 0:
        return None
    kept = tx.db.execute("SELECT * FROM signatures WHERE seq = ?", [newest.seq]).fetchone()
    if kept is not None:
        return SignedHead(kept["seq"], kept["hash"], kept["signature"], from_text(kept["ts"]))
    ts = to_text(tx.now)
    signature = sign(_head_message(newest.seq, newest.hash, ts)).hex()
    tx.db.execute(
        "INSERT INTO signatures (seq, hash, signature, ts) VALUES (?, ?, ?, ?)",
        [newest.seq, newest.hash, signature, ts],
    )
    return SignedHead(newest.seq, newest.hash, signature, from_text(ts))


def verify(tx: Tx, public_key: Ed25519PublicKey | None) -> AuditReport:
    """Check the whole chain, and every signed head against its row; the signatures themselves where a key is
    given.

    Finds a row that was changed, removed, added or moved, and a tail that was cut off below the newest signed
    head.
    """
    return verify_rows(_rows(tx), _signatures(tx), public_key)


def verify_more(
    tx: Tx, so_far: Verifying, public_key: Ed25519PublicKey | None, limit: int = VERIFY_ROWS
) -> Verifying:
    """:func:`verify` in slices, each in a transaction of its own: check the next ``limit`` rows.

    What is added meanwhile is checked as well. Rows are never changed, so that those that were checked stay so.
    """
    first = so_far.head.seq + 1 if so_far.head.seq else _FIRST
    rows = tx.db.execute("SELECT * FROM audit WHERE seq >= ? ORDER BY seq LIMIT ?", [first, limit]).fetchall()
    if not rows:
        newest = tx.db.execute("SELECT max(seq) FROM signatures").fetchone()[0]
        return _at_the_end(so_far, newest or 0)
    signed = tx.db.execute(
        "SELECT * FROM signatures WHERE seq BETWEEN ? AND ?", [rows[0]["seq"], rows[-1]["seq"]]
    )
    return _checked(so_far, rows, {row["seq"]: row for row in signed}, public_key)


def verify_rows(
    rows: Iterable[Row], signatures: Iterable[Row], public_key: Ed25519PublicKey | None
) -> AuditReport:
    """:func:`verify` over what :func:`dump` returned, wherever it was in the meantime.

    Raises ``KeyError`` or ``TypeError`` where a row is not what this module stores.
    """
    signed = {row["seq"]: row for row in signatures}
    found = _checked(Verifying(), rows, signed, public_key)
    return (found if found.ended else _at_the_end(found, max(signed, default=0))).report


def _checked(
    so_far: Verifying,
    rows: Iterable[Row],
    signed: Mapping[int, Row],
    public_key: Ed25519PublicKey | None,
) -> Verifying:
    """``rows`` follow on ``so_far``; ``signed`` has the signed heads among them. Ended where a row is not intact."""
    report, before = so_far.report, so_far.head
    for row in rows:
        fault = _row_fault(row, before) or _head_fault(signed.get(row["seq"]), row, public_key)
        if fault:
            return Verifying(broken(report, fault), before, ended=True)
        before = Head(row["seq"], row["hash"])
        report = replace(
            report, rows=report.rows + 1, signed_heads=report.signed_heads + (row["seq"] in signed)
        )
    return Verifying(report, before)


def _at_the_end(found: Verifying, newest_signed: int) -> Verifying:
    last, report = found.head.seq, found.report
    if newest_signed > last:
        report = broken(report, f"the rows after {last} are missing: the head {newest_signed} was signed")
    return replace(found, report=report, ended=True)


def broken(report: AuditReport, fault: str) -> AuditReport:
    """What was intact up to ``report``, and is not after it because of ``fault``."""
    return replace(report, intact=False, first_bad_seq=report.rows + 1, reason=fault)


def dump(tx: Tx) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    """All rows and all signed heads as they are stored; what :func:`verify_rows` takes, and JSON can carry."""
    return tuple(map(dict, _rows(tx))), tuple(map(dict, _signatures(tx)))


def _rows(tx: Tx) -> Iterator[sqlite3.Row]:
    yield from tx.db.execute("SELECT * FROM audit ORDER BY seq")


def _signatures(tx: Tx) -> Iterator[sqlite3.Row]:
    yield from tx.db.execute("SELECT * FROM signatures ORDER BY seq")


def _row_fault(row: Row, before: Head) -> str:
    if row["seq"] != before.seq + 1:
        return f"row {before.seq + 1} is missing"
    if row["format"] != _FORMAT:
        return f"row {row['seq']} has the unknown format {row['format']}"
    if row["prev_hash"] != before.hash:
        return f"row {row['seq']} does not follow row {before.seq}"
    if row["hash"] != _hash(row["seq"], row["ts"], row["actor"], row["event"], row["json"], row["prev_hash"]):
        return f"row {row['seq']} is not what was written"
    return ""


def _head_fault(signed: Row | None, row: Row, public_key: Ed25519PublicKey | None) -> str:
    if signed is None:
        return ""
    if signed["hash"] != row["hash"]:
        return f"row {row['seq']} is not the row that was signed"
    if public_key is not None and not _is_signed(public_key, signed):
        return f"the signature over row {row['seq']} is not this node's"
    return ""


def _is_signed(public_key: Ed25519PublicKey, signed: Row) -> bool:
    from cryptography.exceptions import InvalidSignature

    message = _head_message(signed["seq"], signed["hash"], signed["ts"])
    try:
        public_key.verify(bytes.fromhex(signed["signature"]), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _hash(seq: int, ts: str, actor: str, event: str, text: str, prev_hash: str) -> str:
    return hashlib.sha256(_encoded("edged-audit-1", str(seq), ts, actor, event, text, prev_hash)).hexdigest()


def _head_message(seq: int, digest: str, ts: str) -> bytes:
    return _encoded("edged-audit-head-1", str(seq), digest, ts)


def _encoded(domain: str, *fields: str) -> bytes:
    parts = [f"{domain}\n".encode()]
    for text in fields:
        # a lone surrogate, legal in a Python string, must not stop the trail
        data = text.encode("utf-8", "surrogatepass")
        parts.append(b"%d:%b," % (len(data), data))
    return b"".join(parts)


def _record(row: sqlite3.Row) -> Record:
    return Record(
        row["seq"],
        from_text(row["ts"]),
        row["actor"],
        row["event"],
        json.loads(row["json"]),
        row["prev_hash"],
        row["hash"],
    )

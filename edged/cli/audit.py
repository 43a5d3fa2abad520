"""``audit list|verify|export``: the trail through the daemon, in the database file, and in a file that leaves the node.

**The exported file** (JSON Lines, format 1): a head ``{"edged_audit_export": 1, "node", "key", "exported", "rows"}``, where
``key`` is the node's public key (Ed25519, hex) or null; then every row of the trail as it is stored (see
``edged.store.audit`` for what is hashed and signed); then the signed heads. Nothing in it is secret.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edged.cli.context import Context, command, counted, echo, json_option, show_json
from edged.domain import reasons

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from edged.store import Tx
    from edged.store.audit import AuditReport

_FORMAT = 1
_FORMAT_KEY = "edged_audit_export"
_KEY_BYTES = 32


@click.group()
def audit() -> None:
    """Read, check and take away the audit trail.

    \b
    Examples:
      edged audit list --limit 20
      edged audit verify
      sudo edged audit export /media/usb/node-7.jsonl
    """


@audit.command("list")
@click.option("--after", type=click.IntRange(0), help="Rows after this number. [default: the newest rows]")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@json_option
@click.pass_obj
@command
def list_command(context: Context, after: int | None, limit: int, as_json: bool) -> None:
    """List rows of the audit trail, in their order.

    \b
    Examples:
      edged audit list
      edged audit list --after 1000 --limit 500 --json
    """
    found = context.client().get("audit", after=after, limit=limit)
    if as_json:
        show_json(found)
        return
    for row in found["records"]:
        echo(
            f"{row['seq']:>6}  {row['time']}  {row['actor']:<10}  {row['event']:<20}  {json.dumps(row['data'])}"
        )


@audit.command()
@click.option("--offline", is_flag=True, help="Read the database file itself; needs no daemon.")
@click.option(
    "--file",
    "exported",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Check a file of `edged audit export`; needs no node.",
)
@click.option("--key", help="The node's public key in hex, with --file. [default: the one in the file]")
@json_option
@click.pass_obj
@command
def verify(context: Context, offline: bool, exported: Path | None, key: str | None, as_json: bool) -> None:
    """Check that no row of the audit trail was changed, removed or added by others.

    A file that was exported names its node's key itself: whoever may have written all of it anew is found out only with
    --key, by the key as you know it from `edged status`.

    \b
    Examples:
      edged audit verify
      edged audit verify --offline
      edged audit verify --file node-7.jsonl --key 3b6a27bc...
    """
    if key is not None and exported is None:
        raise click.UsageError("--key goes with --file: the node knows its own key")
    if exported is not None:
        found = _verify_export(exported, key)
    else:
        found = _verify_database(context) if offline else context.client().get("audit", "verify")
    _show_report(found, as_json=as_json)
    if not found["intact"]:
        raise SystemExit(reasons.EXIT_FAILED)


@audit.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@json_option
@click.pass_obj
@command
def export(context: Context, file: Path, as_json: bool) -> None:
    """Write the whole trail, with the node's signatures, into FILE, which must not be there yet.

    Reads the database file itself, so that it works with and without the daemon; run it as root or as the daemon's user.
    `edged audit verify --file FILE` checks it anywhere.

    \b
    Example:
      sudo edged audit export /media/usb/node-7.jsonl
    """
    from edged.config import load
    from edged.store.node_key import public_hex
    from edged_firmware.durable import write_durably

    if file.exists():
        raise click.UsageError(f"{file} is there already: name another file")
    config = load(context.config_path)
    folder, key = config.node.state_dir, _node_key(config.node.state_dir)
    key_hex = public_hex(key) if key else None
    lines = _in_database(folder / "edged.db", lambda tx: list(_lines(tx, config.node.id, key_hex)))
    # durable: it is written to be taken away, and the state may be deleted next
    write_durably(file, "".join(f"{json.dumps(line)}\n" for line in lines).encode(), 0o600)
    rows = lines[0]["rows"]
    if as_json:
        show_json({"file": str(file), "rows": rows, "key": key_hex})
    else:
        echo(f"{file}: {counted(rows, 'row')}; check it with: edged audit verify --file {file}")


def _show_report(found: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(found)
    elif found["intact"]:
        key = f"checked with key {found['key'][:16]}" if found["key"] else "not checked: no key at hand"
        echo(f"Intact: {counted(found['rows'], 'row')}; {counted(found['signed_heads'], 'signature')} {key}.")
    else:
        echo(f"NOT INTACT at row {found['first_bad_seq']}: {found['detail']}", err=True)


# -- the database file


def _verify_database(context: Context) -> dict[str, Any]:
    from edged.config import load
    from edged.store import audit as trail

    folder = load(context.config_path).node.state_dir
    key = _node_key(folder)
    return _reported(_in_database(folder / "edged.db", lambda tx: trail.verify(tx, key)), key)


def _node_key(folder: Path) -> Ed25519PublicKey | None:
    """The node's public key, None where this user cannot read it. Never makes one."""
    from edged.store.node_key import FILE_NAME, NodeKey

    return NodeKey.load_or_create(folder).public_key if os.access(folder / FILE_NAME, os.R_OK) else None


def _in_database(path: Path, read: Callable[[Tx], Any]) -> Any:
    """What ``read`` returns on one unchanging snapshot. Raises ``Permanent(STORAGE_FAILED)``."""
    import sqlite3

    from edged.cli.files import open_database
    from edged.clock import SystemClock
    from edged.errors import Permanent, Reason
    from edged.store import Tx

    try:
        with closing(open_database(path)) as db:
            db.execute("BEGIN")
            return read(Tx(db, SystemClock().now()))
    except sqlite3.Error as exc:
        raise Permanent(Reason.STORAGE_FAILED, f"{path}: {exc}") from exc


def _lines(tx: Tx, node: str, key: str | None) -> Iterator[dict[str, Any]]:
    from edged.clock import to_text
    from edged.store import audit as trail

    rows, signed = trail.dump(tx)
    yield {_FORMAT_KEY: _FORMAT, "node": node, "key": key, "exported": to_text(tx.now), "rows": len(rows)}
    yield from rows
    yield from ({"signed_head": head} for head in signed)


# -- a file that left the node


def _verify_export(file: Path, key_hex: str | None) -> dict[str, Any]:
    from edged.errors import Permanent, Reason
    from edged.store import audit as trail

    try:
        head, *lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if head[_FORMAT_KEY] != _FORMAT:
            raise ValueError(f"format {head[_FORMAT_KEY]!r} is not known; update edged")
        rows = [line for line in lines if "signed_head" not in line]
        signed = [line["signed_head"] for line in lines if "signed_head" in line]
        key = _public_key(key_hex or head["key"])
        report = trail.verify_rows(rows, signed, key)
        if report.intact and report.rows != head["rows"]:
            report = trail.broken(report, f"the file says {head['rows']} rows")
    except OSError as exc:
        raise Permanent(Reason.STORAGE_FAILED, f"{file}: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        detail = f"{file} is not a file of `edged audit export`: {exc!r}"
        raise Permanent(Reason.STORAGE_FAILED, detail) from exc
    return _reported(report, key)


def _public_key(key_hex: str | None) -> Ed25519PublicKey | None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not key_hex:
        return None
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key_hex))
    except ValueError as exc:
        raise click.UsageError(
            f"{key_hex!r} is no public key: allowed are {_KEY_BYTES} bytes in hex"
        ) from exc


def _reported(report: AuditReport, key: Ed25519PublicKey | None) -> dict[str, Any]:
    from edged.store.node_key import public_hex
    from edged.views import report_json

    return report_json(report) | {"key": public_hex(key) if key else None}

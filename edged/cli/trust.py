"""``trust init|show|refresh``, ``audit list|verify``."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edged.cli.context import (
    Context,
    command,
    counted,
    json_option,
    show_json,
    show_table,
    size_text,
    text,
)
from edged.domain import reasons

if TYPE_CHECKING:
    from edged.store.audit import AuditReport


@click.group()
def trust() -> None:
    """Set and show whose releases this node installs.

    \b
    Examples:
      edged trust init 1.root.json
      edged trust show
    """


@trust.command()
@click.argument("root", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--replace", is_flag=True, help="Even where an operator set another root before.")
@json_option
@click.pass_obj
@command
def init(context: Context, root: Path, replace: bool, as_json: bool) -> None:
    """Trust the repository whose root metadata is the file ROOT, after it verified.

    \b
    Example:
      edged trust init /media/usb/metadata/1.root.json
    """
    try:
        data = root.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise click.UsageError(f"{root} is no root metadata: {exc}") from exc
    _show(context.client().post("trust", body={"root": data, "replace": replace}), as_json=as_json)


@trust.command()
@json_option
@click.pass_obj
@command
def show(context: Context, as_json: bool) -> None:
    """Show the repository, its roles and its releases, as this node verified them last.

    \b
    Example:
      edged trust show --json | jq -r '.releases[].release'
    """
    _show(context.client().get("trust"), as_json=as_json)


@trust.command()
@json_option
@click.pass_obj
@command
def refresh(context: Context, as_json: bool) -> None:
    """Verify the repository's metadata now, and not at the next turn.

    \b
    Example:
      edged trust refresh
    """
    _show(context.client().post("trust", "refresh"), as_json=as_json)


def _show(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    state = {None: "not verified yet", True: "online", False: "offline, from the last good metadata"}[
        found["online"]
    ]
    click.echo(f"repository  {text(found['repository'])} ({state})")
    if found["offline_because"]:
        click.echo(f"offline     {found['offline_because']}")
    if found["stale_s"]:
        click.echo(f"stale       the metadata expired {found['stale_s'] / 3600:.1f} hours ago")
    if found["failure"]:
        click.echo(f"failure     {found['failure']['detail']}; cure: {text(found['failure']['cure'])}")
    show_table(
        [[role["role"], str(role["version"]), role["expires"]] for role in found["roles"]],
        ["ROLE", "VERSION", "EXPIRES"],
    )
    rows = [
        [
            item["release"],
            str(item["release_counter"]),
            ", ".join(item["models"]),
            size_text(item["size_bytes"]),
        ]
        for item in found["releases"]
    ]
    show_table(rows, ["RELEASE", "COUNTER", "MODELS", "SIZE"])
    for item in found["rejected"]:
        click.echo(f"not usable: {item['path']}: {item['detail']}")


@click.group()
def audit() -> None:
    """Read and check the audit trail.

    \b
    Examples:
      edged audit list --limit 20
      edged audit verify
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
        click.echo(
            f"{row['seq']:>6}  {row['time']}  {row['actor']:<10}  {row['event']:<20}  {json.dumps(row['data'])}"
        )


@audit.command()
@click.option("--offline", is_flag=True, help="Read the database file itself; needs no daemon.")
@json_option
@click.pass_obj
@command
def verify(context: Context, offline: bool, as_json: bool) -> None:
    """Check that no row of the audit trail was changed, removed or added by others.

    \b
    Examples:
      edged audit verify
      edged audit verify --offline
    """
    found = _verify_file(context) if offline else context.client().get("audit", "verify")
    if as_json:
        show_json(found)
    elif found["intact"]:
        key = f"checked with key {found['key'][:16]}" if found["key"] else "not checked: no key at hand"
        click.echo(
            f"Intact: {counted(found['rows'], 'row')}; {counted(found['signed_heads'], 'signature')} {key}."
        )
    else:
        click.echo(f"NOT INTACT at row {found['first_bad_seq']}: {found['detail']}", err=True)
    if not found["intact"]:
        raise SystemExit(reasons.EXIT_FAILED)


def _verify_file(context: Context) -> dict[str, Any]:
    from edged.config import load
    from edged.store.node_key import FILE_NAME, NodeKey

    folder = load(context.config_path).node.state_dir
    key = NodeKey.load_or_create(folder) if os.access(folder / FILE_NAME, os.R_OK) else None
    report = _check_file(folder / "edged.db", key)
    from edged.views import report_json

    return report_json(report) | {"key": key.public_hex if key else None}


def _check_file(path: Path, key: Any) -> AuditReport:
    """The trail in the database at ``path``. Raises ``Permanent(STORAGE_FAILED)``."""
    import sqlite3

    from edged.cli.files import open_database
    from edged.clock import SystemClock
    from edged.errors import Permanent, Reason
    from edged.store import Tx
    from edged.store import audit as trail

    try:
        with closing(open_database(path)) as db:
            return trail.verify(Tx(db, SystemClock().now()), key.public_key if key else None)
    except sqlite3.Error as exc:
        raise Permanent(Reason.STORAGE_FAILED, f"{path}: {exc}") from exc

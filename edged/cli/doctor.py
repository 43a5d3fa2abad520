"""``doctor``: everything that a node needs, checked without the daemon where it can be; each line has its cure.

Looks only: it makes no file but the backup that it is asked for, opens no port, and sends nothing to a device.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edged.cli.context import Context, command, counted, echo, json_option, show_json, size_text
from edged.domain import reasons
from edged.helper.protocol import SOCKET

if TYPE_CHECKING:
    from edged.config import Config

_LOW_BYTES = 256 * 1024 * 1024
_LEAST_BYTES = 64 * 1024 * 1024
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


class Level(StrEnum):
    """How a check went."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor: ``cure`` is empty where all is well."""

    level: Level
    what: str
    detail: str
    cure: str = ""


@click.command()
@click.option(
    "--backup",
    "backup_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Instead, put the node's database, keys and configuration into this file, which must not be there yet.",
)
@json_option
@click.pass_obj
@command
def doctor(context: Context, backup_file: Path | None, as_json: bool) -> None:
    """Check everything that a node needs; say how to cure what is wrong.

    Exit code 1 where a check failed. Works with and without a running daemon. What is in a backup and how to put it back is in
    edged(1) and in the README.

    \b
    Examples:
      edged doctor
      sudo edged doctor --json
      sudo edged doctor --backup /media/usb/node-7.tar
    """
    if backup_file is not None:
        _back_up(context, backup_file, as_json=as_json)
        return
    found = list(_examine(context))
    if as_json:
        show_json({"findings": [asdict(finding) for finding in found]})
    else:
        for finding in found:
            cure = f"; cure: {finding.cure}" if finding.cure else ""
            echo(f"{finding.level.value:<4}  {finding.what:<8}  {finding.detail}{cure}")
    if any(finding.level is Level.FAIL for finding in found):
        raise SystemExit(reasons.EXIT_FAILED)


def _back_up(context: Context, file: Path, *, as_json: bool) -> None:
    from edged.cli import backup
    from edged.config import load
    from edged_firmware.durable import write_durably

    if file.exists():
        raise click.UsageError(f"{file} is there already: name another file")
    found = list(backup.members(load(context.config_path), context.config_path))
    data = backup.archive(found)
    write_durably(file, data, 0o600)
    if as_json:
        show_json({"file": str(file), "size_bytes": len(data), "members": [member.name for member in found]})
        return
    for member in found:
        echo(f"{size_text(len(member.data)):>10}  {member.name}")
    echo(f"{file}: {size_text(len(data))}. Keep it safe: whoever has it can sign as this node.")


def _examine(context: Context) -> Iterator[Finding]:
    from edged.config import load
    from edged.errors import ConfigError

    try:
        config = load(context.config_path)
    except ConfigError as exc:
        cure = "correct the file; edged check-config lists the faults"
        yield from (Finding(Level.FAIL, "config", problem, cure) for problem in exc.problems)
        return
    text = f"{context.config_path}: {counted(config.model, 'model')}, {counted(config.device, 'device')}"
    yield Finding(Level.OK, "config", text)
    checks: tuple[Callable[[Config], Iterator[Finding]], ...] = (
        check_folder,
        check_database,
        check_devices,
        check_ports,
        check_trust,
        check_clock,
        check_disk,
    )
    for check in checks:
        yield from check(config)
    yield from check_package(Path(SOCKET))
    yield from check_daemon(context)


def check_folder(config: Config) -> Iterator[Finding]:
    """Is the state folder there, and can this user work in it?"""
    folder = config.node.state_dir
    if not folder.exists():
        yield Finding(
            Level.WARN, "state", f"{folder} is not there yet", "the first start of the daemon makes it"
        )
    elif not folder.is_dir():
        yield Finding(Level.FAIL, "state", f"{folder} is no folder", "move it away, or set node.state_dir")
    elif not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        text = f"user {os.getuid()} may not write to {folder}"
        yield Finding(Level.WARN, "state", text, "run this command as the daemon's user")
    elif others := _of_another_owner(folder):
        # as a backup that was put back leaves them; root, who runs this, may read them
        owner = _owner_of(folder)
        text = f"not everything in {folder} is {owner}'s, as the folder is: {counted(others, 'file')}, first {others[0]}"
        yield Finding(Level.FAIL, "state", text, f"sudo chown -R {owner}: {folder}")
    else:
        yield Finding(Level.OK, "state", f"{folder}, mode {folder.stat().st_mode & 0o777:04o}")


def _of_another_owner(folder: Path) -> list[Path]:
    """What does not belong to whom the folder itself belongs to, which systemd sees to."""
    owner = folder.stat().st_uid
    found = []
    for path in sorted(folder.rglob("*")):
        # the daemon is at work meanwhile: a download ends, a log of the database goes
        with suppress(FileNotFoundError):
            if path.lstat().st_uid != owner:
                found.append(path)
    return found


def _owner_of(path: Path) -> str:
    return _name_of(path.stat().st_uid)


def _name_of(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def check_database(config: Config) -> Iterator[Finding]:
    """Is the database whole, and of a schema that this version knows?"""
    import sqlite3

    from edged.cli.files import open_database
    from edged.store import migrations

    path = config.node.state_dir / "edged.db"
    if not os.access(path.parent, os.X_OK):
        return  # check_folder has said it
    if not os.access(path, os.R_OK):
        if path.exists():
            yield Finding(
                Level.WARN, "database", f"{path} cannot be read", "run this command as the daemon's user"
            )
        return
    cure = "stop the daemon, move the file away, and restore a copy"
    try:
        with closing(open_database(path)) as db:
            problem = migrations.why_unknown(db)
            check = "ok" if problem else db.execute("PRAGMA quick_check(1)").fetchone()[0]
            rows = 0 if problem else db.execute("SELECT count(*) FROM job").fetchone()[0]
    except sqlite3.Error as exc:
        damaged = exc.sqlite_errorname.startswith(_DAMAGED)
        yield Finding(Level.FAIL, "database", f"{path}: {exc}", cure if damaged else _rights_cure(path))
        return
    if problem or check != "ok":
        yield Finding(Level.FAIL, "database", f"{path}: {problem or check}", cure)
    else:
        yield Finding(Level.OK, "database", f"{path} is whole, {counted(rows, 'job')}")


def _rights_cure(database: Path) -> str:
    """Even to read a database with a write-ahead log, files beside it are written."""
    folder, user = database.parent, _name_of(os.getuid())
    return (
        f"leave the file where it is, it need not be damaged: {user} must be able to write to {folder}; "
        f"run this command as the daemon's user, and where that is {user}: sudo chown -R {user}: {folder}"
    )


def check_devices(config: Config) -> Iterator[Finding]:
    """Are the plugins in use, and does each device have a mapper that understands it?"""
    from edged import plugins
    from edged.devices import LeftOut, resolve

    found = plugins.discover()
    for state in found.states:
        if state.problem:
            text = f"{state.name} ({state.distribution}): {state.problem}"
            yield Finding(Level.FAIL, "plugin", text, "install a version of it that fits, or remove it")
        else:
            yield Finding(
                Level.OK, "plugin", f"{state.name} ({state.distribution}): {', '.join(state.mappers)}"
            )
    resolved = resolve(config, found)
    for settings in config.device:
        device = resolved[settings.id]
        if isinstance(device, LeftOut):
            cure = (
                reasons.cure(device.reason)
                or "correct the device's file; edged mapper list shows the mappers"
            )
            yield Finding(Level.FAIL, "device", f"{settings.id}: {device.detail}", cure)
        else:
            yield Finding(Level.OK, "device", f"{settings.id}: {settings.mapper} at {settings.address}")
    if not config.device:
        yield Finding(Level.WARN, "device", "no device is configured", "add one in devices.d")


def check_ports(config: Config) -> Iterator[Finding]:
    """Are the serial ports there, and may this user open them?"""
    for settings in config.device:
        scheme, _, rest = settings.address.partition(":")
        if scheme != "serial" or not rest.startswith(("/", "by-id/", "by-path/")):
            continue  # what is no port check_devices has said
        path = Path(rest) if rest.startswith("/") else Path("/dev/serial") / rest
        if not path.exists():
            cure = "connect the device; ls -l /dev/serial/by-id shows what is there"
            yield Finding(Level.WARN, "port", f"{settings.id}: {path} is not there", cure)
        elif not os.access(path, os.R_OK | os.W_OK):
            text = f"{settings.id}: user {os.getuid()} may not open {path}"
            if _is_daemons_user(config):
                cure = f"add the daemon's user to group {_group_of(path)}"
                yield Finding(Level.FAIL, "port", text, cure)
            else:
                yield Finding(Level.WARN, "port", text, "run this command as the daemon's user")
        elif not path.is_char_device():
            text = f"{settings.id}: {path} is no serial port"
            yield Finding(
                Level.FAIL, "port", text, "correct the address; ls -l /dev/serial/by-id shows what is there"
            )
        else:
            yield Finding(Level.OK, "port", f"{settings.id}: {path}")


def _is_daemons_user(config: Config) -> bool:
    """Whether this user would run the daemon: the state folder is his, or is yet to be made."""
    try:
        return config.node.state_dir.stat().st_uid == os.getuid()
    except OSError:
        return True


def _group_of(path: Path) -> str:
    number = path.stat().st_gid
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def check_trust(config: Config) -> Iterator[Finding]:
    """Is there a root of trust, and how old is the metadata? Their signatures are checked by the daemon."""
    folder = config.node.state_dir / "trust"
    root = config.trust.root
    if folder.parent.exists() and not os.access(folder.parent, os.X_OK):
        return  # check_folder has said it
    if not (folder / "root.json").is_file() and not (root is not None and root.is_file()):
        text = "no root of trust: no release can be installed"
        yield Finding(Level.FAIL, "trust", text, "edged trust init ROOT.json")
        return
    if not config.trust.repository:
        text = "no release repository: nothing can be fetched"
        yield Finding(Level.WARN, "trust", text, "set trust.repository")
        return
    expires = _expiry(folder / "metadata" / "timestamp.json")
    now = _now()
    if expires is None:
        yield Finding(Level.WARN, "trust", "the repository was not verified yet", "edged trust refresh")
    elif now >= expires + config.trust.offline_grace:
        text = (
            f"the metadata expired at {expires:%Y-%m-%d %H:%M} UTC, longer ago than trust.offline_grace_days"
        )
        yield Finding(Level.FAIL, "trust", text, "publish the repository again, and bring it to this node")
    elif now >= expires:
        text = f"the metadata expired at {expires:%Y-%m-%d %H:%M} UTC, within trust.offline_grace_days"
        yield Finding(Level.WARN, "trust", text, "publish the repository again, and bring it to this node")
    else:
        yield Finding(
            Level.OK, "trust", f"{config.trust.repository}, valid until {expires:%Y-%m-%d %H:%M} UTC"
        )


def _expiry(path: Path) -> datetime | None:
    from edged.clock import from_text

    try:
        return from_text(json.loads(path.read_text(encoding="utf-8"))["signed"]["expires"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_clock(config: Config) -> Iterator[Finding]:
    """Can the clock be right? It cannot be earlier than this version, nor than what a signature proved."""
    from edged import BUILD_TIME
    from edged.clock import from_text

    now, floor = _now(), max(from_text(BUILD_TIME), _time_floor(config) or from_text(BUILD_TIME))
    if now + timedelta(minutes=5) < floor:
        text = f"the clock says {now:%Y-%m-%d %H:%M} UTC, it is at least {floor:%Y-%m-%d %H:%M}"
        yield Finding(
            Level.FAIL, "clock", text, "set the clock: timedatectl, an NTP server, the RTC's battery"
        )
    else:
        yield Finding(Level.OK, "clock", f"{now:%Y-%m-%d %H:%M} UTC")


def _time_floor(config: Config) -> datetime | None:
    """The newest time that a signature proved, where the database can be read."""
    import sqlite3

    from edged.cli.files import open_database
    from edged.store import Tx, floors

    try:
        with closing(open_database(config.node.state_dir / "edged.db")) as db:
            return floors.get_time(Tx(db, _now()))
    except sqlite3.Error:
        return None


def _now() -> datetime:
    from edged.clock import SystemClock

    return SystemClock().now()


def check_disk(config: Config) -> Iterator[Finding]:
    """Is there space for the database and an image?"""
    folder = config.node.state_dir
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    text = f"{size_text(free)} free for {config.node.state_dir}"
    if free < _LEAST_BYTES:
        yield Finding(Level.FAIL, "disk", text, "free some space: jobs wait until there is")
    elif free < _LOW_BYTES:
        yield Finding(Level.WARN, "disk", text, "free some space, or lower storage.artifact_quota_bytes")
    else:
        yield Finding(Level.OK, "disk", text)


def check_package(helper: Path) -> Iterator[Finding]:
    """Is the package whole, and what became of its last upgrade? Nothing is said where no helper belongs to it."""
    import asyncio

    from edged.cli.upgrade import UNREACHABLE_CURE
    from edged.helper.client import HelperClient, HelperGone

    if not helper.exists():
        return
    try:
        found = asyncio.run(HelperClient(helper).status())
    except HelperGone as exc:
        yield Finding(Level.WARN, "package", str(exc), UNREACHABLE_CURE)
        return
    if found.get("event") == "status":
        yield from _judge_package(found)
    else:
        yield Finding(Level.WARN, "package", found["detail"], found["cure"])


def _judge_package(found: dict[str, Any]) -> Iterator[Finding]:
    from edged.cli.upgrade import RECOVER_CURE, named, recovery, told

    state = "whole" if found["whole"] else found["dpkg"] or "not installed"
    text = f"edged {found['version'] or '-'}, {state}"
    if found["operation"] or found["at_work"]:
        yield Finding(Level.OK, "package", f"{text}; an upgrade is at work")
    elif found["interrupted"] or not found["whole"]:
        yield Finding(Level.FAIL, "package", f"{text}; an upgrade was cut", RECOVER_CURE)
    else:
        yield Finding(Level.OK, "package", text)
    if found["recovered"]:
        yield Finding(Level.OK, "boot", recovery(found["recovered"]))
    last = found["outcome"]
    if last and last["result"] == "failed":
        yield Finding(Level.WARN, "package", f"{named(last)}: {told(last)} ({last['ended']})", last["cure"])


def check_daemon(context: Context) -> Iterator[Finding]:
    """Does the daemon answer, and what does it say is wrong?"""
    from edged.cli.client import ApiError, Unreachable

    try:
        client = context.client()
        status, devices = client.get("status"), client.get("devices")["devices"]
    except Unreachable as exc:
        yield Finding(Level.WARN, "daemon", exc.detail, exc.cure)
        return
    except ApiError as exc:
        yield Finding(Level.FAIL, "daemon", exc.detail, exc.cure)
        return
    yield Finding(
        Level.OK, "daemon", f"edged {status['version']}, pid {status['pid']}, since {status['started']}"
    )
    for problem in status["problems"]:
        if problem["part"] not in ("device", "plugin"):
            yield Finding(Level.WARN, problem["part"], problem["detail"], problem["cure"])
    for device in devices:
        # what is left out was found above, by the configuration
        if device["reason"] and device["state"] != "left_out":
            text = f"{device['id']}, the daemon says: {device['reason']}: {device['detail']}"
            yield Finding(Level.WARN, "device", text, device["cure"])

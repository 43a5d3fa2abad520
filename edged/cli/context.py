"""What every command shares: where the daemon and its configuration are, and how an answer or an error is shown."""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import click

from edged_firmware.errors import EdgedError, Reason

if TYPE_CHECKING:
    from edged.cli.client import Client
    from edged.config import Config

P = ParamSpec("P")

DEFAULT_CONFIG = Path("/etc/edged/edged.toml")
DEFAULT_SOCKET = Path("/run/edged/edged.sock")

json_option = click.option("--json", "as_json", is_flag=True, help="Answer as JSON.")


@dataclass(frozen=True, slots=True)
class Context:
    """The options of ``edged`` itself. ``socket_path`` None: as the configuration says."""

    config_path: Path
    socket_path: Path | None

    @property
    def socket(self) -> Path:
        """The daemon's socket. Reads no more of the configuration than that, so that a fault elsewhere in it is no matter."""
        if self.socket_path is not None:
            return self.socket_path
        try:
            found = tomllib.loads(self.config_path.read_text(encoding="utf-8"))["api"]["socket"]
            return self.config_path.parent / str(found)
        except OSError as exc:
            if self.config_path != DEFAULT_CONFIG:
                # a slip in --config must not reach another node's daemon
                raise click.UsageError(f"{self.config_path}: cannot be read: {exc.strerror}") from exc
            return DEFAULT_SOCKET
        except (ValueError, KeyError, TypeError):
            return DEFAULT_SOCKET

    def client(self) -> Client:
        """A connection to the daemon; opened by its first request."""
        from edged.cli.client import Client

        return Client(self.socket)


def command(function: Callable[P, None], *, cures: bool = True) -> Callable[P, None]:
    """Show an error as one line (what, why, cure) and end with its exit code.

    Without ``cures`` where the command is not a node's: the cures of the reasons are for those who run one.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from edged.cli.client import ApiError, Unreachable
        from edged.domain import reasons

        as_json = bool(kwargs.get("as_json"))
        try:
            function(*args, **kwargs)
        except Unreachable as exc:
            fail(reasons.EXIT_UNREACHABLE, "unreachable", None, exc.detail, exc.cure, as_json=as_json)
        except ApiError as exc:
            fail(exit_code(exc.code, exc.reason), exc.code, exc.reason, exc.detail, exc.cure, as_json=as_json)
        except EdgedError as exc:
            code = reasons.exit_code(exc.reason)
            kind = "refused" if code == reasons.EXIT_REFUSED else "failed"
            cure = exc.cure or (reasons.cure(exc.reason) if cures else "")
            fail(code, kind, exc.reason.value, exc.detail, cure, as_json=as_json)

    return run


def load_config(context: Context, *, as_json: bool) -> Config:
    """The configuration; its faults end the process."""
    from edged.config import load
    from edged.errors import ConfigError

    try:
        return load(context.config_path)
    except ConfigError as exc:
        give_up(exc.problems, as_json=as_json)


def give_up(problems: Sequence[str], *, as_json: bool) -> NoReturn:
    """End the process with exit code 2, and the faults of the configuration each on a line."""
    from edged.domain import reasons

    if as_json:
        show_json({"problems": list(problems)})
    for problem in problems:
        echo(f"edged: configuration: {problem}", err=True)
    raise SystemExit(reasons.EXIT_USAGE)


def exit_code(code: str, reason: str | None) -> int:
    """The exit code for an error of the API."""
    from edged.domain import reasons

    if code == "bad_request":
        return reasons.EXIT_USAGE
    if code == "refused":
        return reasons.EXIT_REFUSED
    return job_exit_code(reason) or reasons.EXIT_FAILED


def job_exit_code(reason: str | None) -> int:
    """The exit code for the reason that a job ended with; None is success."""
    from edged.domain import reasons

    try:
        return reasons.exit_code(Reason(reason) if reason else None)
    except ValueError:
        # a newer daemon has a reason that this command does not know
        return reasons.EXIT_FAILED


def fail(code: int, kind: str, reason: str | None, detail: str, cure: str, *, as_json: bool) -> NoReturn:
    """One line on standard error; with ``--json`` the same as an object on standard output. Ends the process."""
    if as_json:
        show_json({"code": kind, "reason": reason, "detail": detail, "cure": cure})
    why = f" ({reason})" if reason else ""
    hint = f"; cure: {cure}" if cure else ""
    echo(f"edged: {kind.replace('_', ' ')}{why}: {' '.join(detail.split())}{hint}", err=True)
    raise SystemExit(code)


def echo(line: str, *, err: bool = False) -> None:
    """One line for a person. All that is shown goes through here or :func:`show_json`."""
    click.echo(printable(line), err=err)


def printable(line: str) -> str:
    """``line`` with escapes for what is no visible character: what a device or somebody else made up must neither command
    the terminal, nor look like a line of ours, nor have no encoding."""
    if line.isprintable():
        return line
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in line
    )


def show_json(answer: object) -> None:
    """An answer for a script."""
    click.echo(json.dumps(answer, indent=1))


def show_table(rows: list[list[str]], header: list[str]) -> None:
    """Aligned columns, no frame: readable by people and by ``awk``. Nothing where there are no rows."""
    if not rows:
        return
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def text(value: Any) -> str:
    """A value of an answer, for a table: ``-`` for nothing."""
    if value is None or value == "":
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def counted(things: Sized | int, name: str) -> str:
    """``1 model``, ``2 models``."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def size_text(size_bytes: float | None) -> str:
    """Bytes for a person."""
    if size_bytes is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"

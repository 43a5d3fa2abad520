"""``edged demo``: the whole way of a release, on this machine, with the commands that an operator would use."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edged.domain.reasons import EXIT_DONE, EXIT_REFUSED
from edged.errors import Reason

if TYPE_CHECKING:
    from edged.testing.demo import Bench

_START_S = 180.0
_STEP_S = 600.0


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One step of the demo: what was done, and how it ended against how it should."""

    what: str
    expected: int
    code: int
    seconds: float
    note: str
    right: bool


@click.command()
@click.option("--fake", is_flag=True, help="Use the fake device, also where the simulator could be built.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep everything in this new folder, to look at it afterwards.",
)
def demo(fake: bool, folder: Path | None) -> None:
    """See it all work: sign releases, flash them into a real boot loader, refuse what must be refused.

    Needs no hardware and no network, and touches nothing outside a folder of its own.
    """
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edged-demo-")))
        else:
            folder = folder.absolute()
            folder.mkdir(parents=True)
        bench = stack.enter_context(_bench(folder, fake))
        outcomes = _run(bench, folder)
    _table(outcomes)
    if not all(outcome.right for outcome in outcomes):
        click.echo("demo: failed", err=True)
        raise SystemExit(1)
    click.echo("demo: ok")


@contextmanager
def _bench(folder: Path, fake: bool) -> Iterator[Bench]:
    from edged.testing import avr
    from edged.testing.demo import fake_device, simulated_board

    missing = [] if fake else avr.missing_packages()
    if missing:
        click.echo("No simulated board: missing Debian packages " + ", ".join(missing))
        click.echo("Get them with: sudo apt-get install " + " ".join(missing))
    make = fake_device if fake or missing else simulated_board
    with make(folder) as bench:
        click.echo(f"Device: {bench.title}")
        yield bench


def _run(bench: Bench, folder: Path) -> list[_Outcome]:
    from edged.testing.demo import DEVICE, GOOD, TAMPERED, configure, publish, tamper

    _say("A publisher makes keys, signs three releases, and puts them into a folder")
    repository = publish(bench, folder)
    config = configure(bench, repository, folder)
    edged = [sys.executable, "-P", "-m", "edged", "--config", str(config)]
    _call([*edged, "release", "list", str(repository)])
    _say(f"A mirror damages one bit of blink@{TAMPERED}")
    tamper(repository, TAMPERED)

    _say("The daemon starts")
    first, second = GOOD
    outcomes = []
    daemon = [part.format(config=config) for part in bench.daemon]
    with _daemon(daemon, folder / "daemon.log", edged):
        for version, reason, note in (
            (first, None, "flashed, read back, healthy"),
            (second, None, "flashed, read back, healthy"),
            (TAMPERED, Reason.CHUNK_MISMATCH, "one bit is not what was signed"),
            (first, Reason.COUNTER_LOWER, "its release counter is lower"),
        ):
            _say(f"The operator deploys blink@{version} to {DEVICE}")
            deploy = [*edged, "deploy", f"blink@{version}", "--to", DEVICE, "--wait", "--yes"]
            if reason is None:
                outcomes.append(_step(f"deploy blink@{version}", EXIT_DONE, deploy, note))
            else:
                outcomes.append(_refusal(f"deploy blink@{version}", reason, deploy, note, bench))
        _say("What the device runs, and what happened")
        _call([*edged, "devices"])
        _call([*edged, "jobs"])
    outcomes.append(
        _step("audit trail", EXIT_DONE, [*edged, "audit", "verify", "--offline"], "intact, head signed")
    )
    if bench.board_port is not None:
        outcomes += _avrdude(bench, bench.board_port, folder)
    return outcomes


@contextmanager
def _daemon(command: list[str], log: Path, edged: list[str]) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
        try:
            _await_ready(process, log, edged)
            yield
        finally:
            process.terminate()
            try:
                process.wait(_START_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_ready(process: subprocess.Popen[bytes], log: Path, edged: list[str]) -> None:
    deadline = time.monotonic() + _START_S
    status = [*edged, "status"]
    while (
        subprocess.run(status, capture_output=True, check=False, env=_environment()).returncode != EXIT_DONE
    ):
        if process.poll() is not None or time.monotonic() > deadline:
            raise click.ClickException(f"the daemon did not start:\n{log.read_text()}")
        time.sleep(0.1)


def _avrdude(bench: Bench, port: Path, folder: Path) -> list[_Outcome]:
    """Somebody else's program reads the flash back, where it is installed, and compares it with the publisher's file."""
    import shutil

    from edged.testing.demo import GOOD

    program = shutil.which("avrdude")
    if program is None:
        click.echo("avrdude is not installed: nobody else reads the flash back")
        return []
    version = GOOD[-1]
    _say(f"avrdude reads the flash back and compares it with the publisher's file of blink@{version}")
    read = [program, "-q", "-p", "m328p", "-c", "arduino", "-P", str(port), "-b", "115200"]
    verify = [*read, "-U", f"flash:v:{bench.images[version]}:i"]
    return [
        _step("avrdude reads back", EXIT_DONE, verify, "agrees byte for byte", quiet=folder / "avrdude.log")
    ]


def _say(text: str) -> None:
    click.secho(f"\n== {text}", bold=True)


def _call(command: list[str]) -> int:
    sys.stdout.flush()
    return subprocess.run(command, check=False, timeout=_STEP_S, env=_environment()).returncode


def _environment() -> dict[str, str]:
    """The packaged command alone looks into its folder of modules; the commands of the demo must find them there too."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


def _step(what: str, expected: int, command: list[str], note: str, quiet: Path | None = None) -> _Outcome:
    begun = time.monotonic()
    if quiet is None:
        code = _call(command)
    else:
        with quiet.open("wb") as output:
            done = subprocess.run(
                command, check=False, timeout=_STEP_S, stdout=output, stderr=subprocess.STDOUT
            )
        code = done.returncode
    return _Outcome(what, expected, code, time.monotonic() - begun, note, code == expected)


def _refusal(what: str, reason: Reason, command: list[str], note: str, bench: Bench) -> _Outcome:
    """A step that must be refused for ``reason``, with nothing sent to the board, which counts for itself."""
    before = bench.received_bytes() if bench.received_bytes else 0
    begun = time.monotonic()
    done = subprocess.run(
        command, check=False, timeout=_STEP_S, capture_output=True, text=True, env=_environment()
    )
    click.echo(done.stdout + done.stderr, nl=False)
    right = done.returncode == EXIT_REFUSED and reason.value in done.stdout + done.stderr
    if bench.received_bytes:
        sent = bench.received_bytes() - before
        note, right = f"{note}; {sent} bytes were sent", right and sent == 0
    return _Outcome(what, EXIT_REFUSED, done.returncode, time.monotonic() - begun, note, right)


def _table(outcomes: list[_Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What happened")
    for heading in ("step", "exit code", "expected", "seconds", "meaning"):
        table.add_column(
            heading, justify="right" if heading in ("exit code", "expected", "seconds") else "left"
        )
    for outcome in outcomes:
        note = outcome.note if outcome.right else "NOT as it should be"
        table.add_row(outcome.what, str(outcome.code), str(outcome.expected), f"{outcome.seconds:.1f}", note)
    click.echo()
    Console(width=110).print(table)

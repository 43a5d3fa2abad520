"""What every guest can do: run a command to its end and say what came of it."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

ENVIRONMENT: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
    "DEBIAN_FRONTEND": "noninteractive",
}


class GuestError(RuntimeError):
    """A guest cannot be built, does not boot or does not answer; the text says what its console or tool said."""


@dataclass(frozen=True, slots=True)
class Done:
    """A command of a guest that has ended."""

    command: tuple[str, ...]
    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"{' '.join(self.command)}: exit code {self.code}\n{self.out}{self.err}"


class Guest(ABC):
    """A running Debian with systemd as PID 1."""

    @abstractmethod
    def execute(self, command: tuple[str, ...], stdin: bytes, timeout_s: float) -> Done:
        """Run ``command`` as root. Raises GuestError where the guest does not answer in time."""

    def run(
        self,
        *command: str,
        stdin: str | bytes = b"",
        check: bool = True,
        timeout_s: float = 180,
        user: str = "",
    ) -> Done:
        """Run ``command`` as root, or as ``user``; ``check``: an exit code other than 0 is an AssertionError."""
        whole = ("runuser", "-u", user, "--", *command) if user else command
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = self.execute(whole, data, timeout_s)
        assert not check or done.code == 0, str(done)
        return done

    def sh(self, script: str, *, check: bool = True, timeout_s: float = 180) -> str:
        """What ``script`` prints, without the last line end."""
        return self.run("sh", "-ec", script, check=check, timeout_s=timeout_s).out.rstrip("\n")

    def python(self, program: str, *arguments: str, user: str = "", timeout_s: float = 180) -> str:
        """What a Python program prints in the guest."""
        return self.run(
            "python3", "-I", "-", *arguments, stdin=program, user=user, timeout_s=timeout_s
        ).out.rstrip("\n")

    def json(self, *command: str, timeout_s: float = 180) -> Any:
        """What a command prints as JSON."""
        return json.loads(self.run(*command, timeout_s=timeout_s).out)

    def write(self, path: str, content: str | bytes, *, mode: str = "644") -> None:
        """Make the file ``path``, and its folder where it is missing."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        self.run("sh", "-c", script, "sh", path, mode, stdin=content)

    def put(self, source: Path, path: str, *, mode: str = "644") -> None:
        """Copy a file of the host into the guest."""
        self.write(path, source.read_bytes(), mode=mode)

    def unit(self, unit: str, prop: str) -> str:
        """A property of a unit, as ``systemctl show`` says it."""
        return self.run("systemctl", "show", "--value", "--property", prop, unit).out.strip()

    def journal(self, unit: str) -> str:
        """The lines of a unit in the journal, without time and host."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit).out

    def await_boot(self, timeout_s: float) -> None:
        """Return when systemd has started what the boot wants. Raises AssertionError where a unit failed."""
        state = self.run(
            "systemctl", "is-system-running", "--wait", check=False, timeout_s=timeout_s
        ).out.strip()
        failed = self.run("systemctl", "--failed", "--plain", "--no-legend", check=False).out
        assert state == "running", f"the guest is {state}: {failed}"


def eventually(ask: Callable[[], T | None], timeout_s: float, what: str, *, every_s: float = 0.1) -> T:
    """The first true answer of ``ask``. Raises GuestError where none came in time."""
    deadline = time.monotonic() + timeout_s
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise GuestError(f"{what}: not within {timeout_s} s")
        time.sleep(every_s)
    return answer

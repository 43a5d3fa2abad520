"""A Debian in a container: systemd as PID 1 on the host's kernel, booted in less than a second.

It has no kernel of its own: no CAN, no modules, no hot-plug, no clock, no power to cut. It has no network but
its own loopback.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from guest.command import ENVIRONMENT, Done, Guest, GuestError, eventually
from guest.images import Image, run

_BOOT_S: Final = 240.0
_END_S: Final = 120.0
_MNT_DETACH: Final = "--lazy"


class Container(Guest):
    """A container on an overlay over ``image``'s tree; what it changes is in ``folder`` and nowhere else.

    ``binds`` are files and folders of the host by the path that they have inside. ``disk``: the container is on this raw
    ext4 disk instead, which it changes. ``options`` are systemd-nspawn's. Use it as a context manager.
    """

    def __init__(
        self,
        image: Image,
        folder: Path,
        *,
        binds: Mapping[str, Path] | None = None,
        disk: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.image = image
        self.root = folder / "root"
        self.boot_s = 0.0
        self._upper = folder / "upper"
        self._work = folder / "work"
        self._log = folder / "console.log"
        self._binds = binds or {}
        self._disk = disk
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> Self:
        for folder in (self.root, self._upper, self._work):
            folder.mkdir(parents=True)
        if self._disk is None:
            # "volatile": nothing here outlives its test, so that nobody waits for the disk
            layers = f"lowerdir={self.image.tree},upperdir={self._upper},workdir={self._work},volatile"
            run("mount", "-t", "overlay", "overlay", "-o", layers, str(self.root))
        else:
            run("mount", "-o", "loop", str(self._disk), str(self.root))
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def start(self) -> None:
        """Boot. Raises GuestError where no init comes up, AssertionError where a unit failed."""
        began = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"),
                    *("--console=read-only", "--private-network", "--resolv-conf=off", "--timezone=off"),
                    *("--link-journal=no", f"--directory={self.root}"),
                    *(f"--bind={source}:{inside}" for inside, source in self._binds.items()),
                    *self._options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._leader = eventually(self._find_leader, _BOOT_S, "the container's init", every_s=0.01)
        eventually(self._answers, _BOOT_S, "the container's bus", every_s=0.05)
        self.await_boot(_BOOT_S)
        self.boot_s = time.monotonic() - began

    def stop(self) -> None:
        """Power off in good order; :meth:`start` boots again on what was written."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            # nspawn asks its init to halt, and kills it at the second time
            process.terminate()
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def execute(self, command: tuple[str, ...], stdin: bytes, timeout_s: float) -> Done:
        """Run ``command`` in the container's namespaces."""
        environment = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        whole = [
            *("nsenter", "--target", str(self._leader), "--mount", "--uts", "--ipc", "--net", "--pid"),
            *("--wd=/", "--root", "--", "env", "-i", *environment, *command),
        ]
        try:
            done = subprocess.run(whole, input=stdin, capture_output=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"{' '.join(command)}: no end within {timeout_s} s") from error
        return Done(command, done.returncode, done.stdout.decode(), done.stderr.decode())

    def beside(self, *command: str) -> list[str]:
        """``command`` of the host, to be run in the container's network: its files and libraries are the host's."""
        return ["nsenter", "--target", str(self._leader), "--net", "--", *command]

    def console(self) -> str:
        """What the boot and systemd-nspawn itself said."""
        return self._log.read_text(errors="replace")

    def _find_leader(self) -> int:
        assert self._process is not None
        if self._process.poll() is not None:
            raise GuestError(f"systemd-nspawn ended: {self.console()[-2000:]}")
        # until its init has started, the only child is a helper that sets the namespaces up
        for child in Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split():
            # it may end at any moment: before its file is opened, or before that is read
            with suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    return int(child)
        return 0

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise GuestError(f"systemd-nspawn ended: {self.console()[-2000:]}")
        asked = ("systemctl", "is-system-running")
        return self.execute(asked, b"", 10).out.strip() in ("starting", "running", "degraded")

    def _end(self) -> None:
        try:
            self.stop()
        finally:
            run("umount", _MNT_DETACH, str(self.root))

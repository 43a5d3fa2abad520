"""Roots of Debian without a kernel or a systemd of their own: also for machines of another kind, run by qemu-user.

Built once, by mmdebstrap or (those of other machines) by ``foreign.py``, into ``.cache/roots/SUITE-ARCHITECTURE-HASH``, and
never written to: each use lies on an overlay in a mount namespace of its own, in which the kernel is told who runs the foreign
programs, too. All of that ends with it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import foreign

CACHE: Final = Path(__file__).resolve().parents[2] / ".cache" / "roots"
COMMAND_S: Final = 900

BUILD: Final = """
exec mmdebstrap --quiet --mode=root --variant=apt --include="$1" \
    --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    "$2" "$3" "$4"
"""

ENTER: Final = """
mount -t tmpfs tmpfs "$3"
mkdir "$3/upper" "$3/work" "$3/root"
mount -t overlay -o "lowerdir=$2,upperdir=$3/upper,workdir=$3/work" overlay "$3/root"
mount -t proc proc "$3/root/proc"
mount --rbind /dev "$3/root/dev"
echo ready
exec sleep infinity
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a root is made of."""

    suite: str
    architecture: str
    packages: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it lies in the cache; another recipe is another root."""
        how = foreign.ingredients(self.suite) if self.interpreter else (BUILD,)
        text = "\0".join((self.mirror, *self.packages, *how))
        return CACHE / f"{self.suite}-{self.architecture}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def mirror(self) -> str:
        """A line of apt's sources."""
        return f"deb http://deb.debian.org/debian {self.suite} main"

    @property
    def interpreter(self) -> str:
        """QEMU's name of the machine; empty for this one's own."""
        return foreign.INTERPRETERS.get(self.architecture, "")


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str


@dataclass(frozen=True, slots=True)
class Root:
    """A root that may be written to; it is gone with its ``with`` block. ``pid`` is in its namespace."""

    pid: int
    folder: Path
    processor: str

    def run(self, *command: str, timeout_s: float = COMMAND_S) -> Done:
        """Run a program of the root, as root; what it printed, on either channel."""
        environment = (
            "LANG=C.UTF-8",
            "HOME=/root",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            f"QEMU_CPU={self.processor}",
        )
        done = subprocess.run(
            [
                *("nsenter", f"--target={self.pid}", "--mount", "--", "env", "-i", *environment),
                *("DEBIAN_FRONTEND=noninteractive", "chroot", str(self.folder), *command),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return Done(done.returncode, done.stdout)

    def put(self, source: Path, path: str) -> None:
        """Copy a file of the host into the root."""
        target = str(self.folder / path.lstrip("/"))
        command = ["nsenter", f"--target={self.pid}", "--mount", "--", "cp", str(source.resolve()), target]
        subprocess.run(command, check=True)


def tree(recipe: Recipe) -> Path:
    """The root, built now where the cache has none; older ones of the same suite and machine are removed."""
    folder = recipe.folder
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{recipe.architecture}-", dir=CACHE) as half:
            Path(half).chmod(0o755)
            built = Path(half) / "root"
            _make(recipe, built)
            built.rename(folder)
        for other in CACHE.glob(f"{recipe.suite}-{recipe.architecture}-*"):
            if other != folder:
                shutil.rmtree(other)
    return folder


@contextmanager
def root(recipe: Recipe) -> Iterator[Root]:
    """An overlay over the recipe's root, in memory."""
    lower = tree(recipe)
    with tempfile.TemporaryDirectory(prefix=f"edged-{recipe.architecture}-") as work:
        process = subprocess.Popen(
            [*foreign.in_namespace(foreign.REGISTER + ENTER), recipe.interpreter, str(lower), work],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline() == b"ready\n", process.stderr.read().decode()
            yield Root(process.pid, Path(work) / "root", foreign.PROCESSORS.get(recipe.architecture, ""))
        finally:
            process.kill()
            process.communicate()


def _make(recipe: Recipe, folder: Path) -> None:
    if recipe.interpreter:
        foreign.make(recipe.suite, recipe.architecture, recipe.mirror, recipe.packages, folder)
    else:
        foreign.alone(BUILD, ",".join(recipe.packages), recipe.suite, str(folder), recipe.mirror)

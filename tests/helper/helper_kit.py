"""A throw-away system with its own dpkg and apt, and signed repositories for it. The machine's own packages are not touched."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

from edged.helper.apt import Apt
from edged.helper.client import HelperClient
from edged.helper.server import Server
from edged.helper.state import State
from edged.helper.units import Systemd
from edged.helper.upgrade import Upgrades

ROOT = Path(__file__).parents[2]
LIBEXEC = ROOT / "systemd" / "libexec"
GOOD, BAD, LATE, HUNG = "good", "bad", "late", "hung"
FORCE = "script-chrootless,not-root,bad-path,unsafe-io"

Answers = list[dict[str, Any]]


def run(
    *command: str | Path, env: Mapping[str, str] | None = None, code: int = 0, timeout_s: float = 240
) -> str:
    """What a command writes; its exit code must be ``code``."""
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def make_deb(
    folder: Path,
    version: str,
    *,
    health: str = GOOD,
    scripts: Mapping[str, str] | None = None,
    depends: str = "",
    name: str = "edged",
    size_bytes: int = 20_000,
) -> Path:
    """A real package: a tree of Python, a conffile, and ``health``, which the stand-in for systemctl reads."""
    tree = folder / f"{name}-{version}"
    lib = tree / "usr" / "lib" / name
    lib.mkdir(parents=True)
    (lib / "app.py").write_text(f"VERSION = {version!r}\n")
    (lib / "health").write_text(health)
    for number in range(8):
        (lib / f"part{number}.bin").write_bytes(os.urandom(size_bytes // 8))
    conffile = tree / "etc" / name / f"{name}.toml"
    conffile.parent.mkdir(parents=True)
    conffile.write_text("# a comment\n")
    control = tree / "DEBIAN"
    control.mkdir()
    fields = {
        "Package": name, "Version": version, "Architecture": "all", "Maintainer": "nobody <nobody@example.org>",
        "Depends": depends, "Description": "a test",
    }  # fmt: skip
    (control / "control").write_text("".join(f"{key}: {text}\n" for key, text in fields.items() if text))
    (control / "conffiles").write_text(f"/etc/{name}/{name}.toml\n")
    sums = [
        f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(tree)}\n"
        for path in sorted(tree.rglob("*"))
        if path.is_file() and "DEBIAN" not in path.parts and "etc" not in path.parts
    ]
    (control / "md5sums").write_text("".join(sums))
    for script, text in (scripts or {}).items():
        (control / script).write_text(f"#!/bin/sh\n{text}\n")
        (control / script).chmod(0o755)
    deb = folder / f"{name}_{version}_all.deb"
    run("dpkg-deb", "-Zgzip", "--build", tree, deb)
    shutil.rmtree(tree)
    return deb


class Repository:
    """A folder that apt reads, signed with a key of its own."""

    def __init__(self, folder: Path, keys: Path) -> None:
        self.folder = folder
        self._keys = keys
        self.keyring = keys / "public.gpg"
        folder.mkdir(exist_ok=True)

    @classmethod
    def create(cls, folder: Path, keys: Path) -> Repository:
        """With a new key. ``keys`` must have a short path: gpg's agent has a socket in it."""
        made = cls(folder, keys)
        keys.mkdir(mode=0o700)
        made._gpg("--passphrase", "", "--quick-gen-key", "test", "ed25519", "sign", "never")
        made._gpg("--output", str(made.keyring), "--export")
        return made

    @property
    def source(self) -> str:
        return f"deb [signed-by={self.keyring}] file:{self.folder} ./\n"

    def add(self, *debs: Path) -> None:
        for deb in debs:
            shutil.copy(deb, self.folder)
        self.publish()

    def publish(self, *, sign: bool = True, valid_s: float | None = None) -> None:
        """Write the index of what lies in the folder, and sign it; ``valid_s``: so long is it valid from now."""
        records = [self._record(deb) for deb in sorted(self.folder.glob("*.deb"))]
        packages = self.folder / "Packages"
        packages.write_text("\n".join(records))
        digest = hashlib.sha256(packages.read_bytes()).hexdigest()
        release = self.folder / "Release"
        until = "" if valid_s is None else f"Valid-Until: {formatdate(time.time() + valid_s, usegmt=True)}\n"
        release.write_text(
            f"{until}Suite: test\nArchitectures: all amd64 arm64 armhf\nDate: {formatdate(usegmt=True)}\n"
            f"SHA256:\n {digest} {packages.stat().st_size} Packages\n"
        )
        signed = self.folder / "InRelease"
        signed.unlink(missing_ok=True)
        if sign:
            self._gpg("--clearsign", "--output", str(signed), str(release))

    def end(self) -> None:
        """Stop the agent that gpg started."""
        run("gpgconf", "--homedir", self._keys, "--kill", "all")

    def _record(self, deb: Path) -> str:
        return (
            run("dpkg-deb", "--field", deb)
            + f"Filename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {hashlib.sha256(deb.read_bytes()).hexdigest()}\n"
        )

    def _gpg(self, *words: str) -> None:
        run("gpg", "--homedir", self._keys, "--batch", "--yes", "--quiet", *words)


@dataclass(frozen=True)
class Node:
    """The throw-away system below ``root``. ``state`` is the helper's folder."""

    root: Path
    state: Path

    @classmethod
    def create(cls, root: Path) -> Node:
        for folder in (
            "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers", "var/lib/apt/lists/partial",
            "var/cache/apt/archives/partial", "var/log/apt", "etc/apt/preferences.d", "etc/apt/trusted.gpg.d",
            "etc/apt/apt.conf.d", "etc/apt/sources.list.d", "bin",
        ):  # fmt: skip
            (root / folder).mkdir(parents=True)
        (root / "var/lib/dpkg/status").touch()
        (root / "etc/apt/sources.list").touch()
        (root / ".dpkg.cfg").write_text(f"log {root}/dpkg.log\n")
        node = cls(root, root / "var/lib/edged-helper")
        node.state.mkdir(mode=0o700)
        node._write_configuration()
        node._write_systemctl()
        return node

    @property
    def environment(self) -> dict[str, str]:
        """For the scripts, and for dpkg."""
        return {
            "DPKG_ROOT": str(self.root),
            "DPKG_FORCE": FORCE,
            # dpkg's log, which would be the machine's: see .dpkg.cfg there
            "HOME": str(self.root),
            "EDGED_HELPER_STATE": str(self.state),
            "EDGED_HELPER_TREE": str(self.root / "usr/lib/edged"),
            "EDGED_HELPER_LOCK_TRIES": "2",
        }

    def dpkg(self, *words: str | Path, code: int = 0) -> str:
        return run("dpkg", *words, env=self.environment, code=code)

    def start_dpkg(self, *words: str | Path) -> subprocess.Popen[bytes]:
        """dpkg with all its children in a session of their own, to be killed as one."""
        return subprocess.Popen(
            ["dpkg", *map(str, words)],
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def status(self, package: str = "edged") -> str:
        """dpkg's letters and the version, as ``ii 1.0``; empty where it knows nothing."""
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}${Version}", package],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
        )
        return done.stdout

    def runs(self) -> str:
        """The version that the files say."""
        return (self.root / "usr/lib/edged/app.py").read_text()

    def keep_deb(self, *debs: Path, done: bool = False) -> str:
        """As apt calls it around dpkg."""
        finished = subprocess.run(
            [LIBEXEC / "edged-keep-deb", *(["--done"] if done else [])],
            input="".join(f"{deb}\n" for deb in debs),
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert finished.returncode == 0
        return finished.stderr

    def recover(self, *, code: int = 0, lock_tries: int = 2) -> str:
        """A boot."""
        environment = self.environment | {"EDGED_HELPER_LOCK_TRIES": str(lock_tries)}
        return run(LIBEXEC / "edged-recover", env=environment, code=code)

    def note(self) -> dict[str, str]:
        text = (self.state / "recovered").read_text()
        return dict(line.partition("=")[::2] for line in text.splitlines())

    def sources(self, *repositories: Repository) -> None:
        (self.root / "etc/apt/sources.list").write_text("".join(one.source for one in repositories))

    def apt(self) -> Apt:
        return Apt(
            options=("-c", str(self.root / "apt.conf")),
            root=str(self.root),
            dpkg_options=(f"--log={self.root}/dpkg.log", *(f"--force-{word}" for word in FORCE.split(","))),
        )

    def systemd(self) -> Systemd:
        return Systemd(str(self.root / "bin/systemctl"))

    def upgrades(self, health_s: float = 1, start_s: float = 3) -> Upgrades:
        return Upgrades(
            State(self.state),
            self.apt(),
            self.systemd(),
            recover=str(self.root / "bin/recover"),
            start_s=start_s,
            health_s=health_s,
        )

    def stopped(self, stopped: bool) -> None:
        """Whether an operator stopped the daemon."""
        (self.root / "stopped").touch() if stopped else (self.root / "stopped").unlink(missing_ok=True)

    def reboots(self) -> int:
        log = self.root / "reboots"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def _write_configuration(self) -> None:
        """apt's configuration, without what the machine's own adds around dpkg, and with our hooks."""
        hooks = (LIBEXEC / "50edged").read_text()
        environment = " ".join(f"{key}={value}" for key, value in self.environment.items())
        script = self.root / "bin/edged-keep-deb"
        _executable(script, f'exec env {environment} {LIBEXEC}/edged-keep-deb "$@"')
        _executable(self.root / "bin/recover", f"exec env {environment} {LIBEXEC}/edged-recover")
        options = "".join(f'"--force-{word}"; ' for word in FORCE.split(","))
        (self.root / "apt.conf").write_text(
            textwrap.dedent(f"""\
                #clear DPkg::Pre-Install-Pkgs;
                #clear DPkg::Pre-Invoke;
                #clear DPkg::Post-Invoke;
                #clear APT::Update::Post-Invoke;
                #clear APT::Update::Post-Invoke-Success;
                Dir "{self.root}/";
                Dir::State::status "{self.root}/var/lib/dpkg/status";
                Dir::Bin::dpkg "/usr/bin/dpkg";
                Dir::Bin::methods "/usr/lib/apt/methods";
                Dir::Log "{self.root}/var/log/apt";
                APT::Sandbox::User "root";
                DPkg::Options {{ "--root={self.root}"; "--log={self.root}/dpkg.log"; {options}}};
                """)
            + hooks.replace("/usr/libexec/edged-keep-deb", str(script))
        )

    def _write_systemctl(self) -> None:
        """A stand-in for systemctl: the daemon is as well as ``health`` of the package that is installed says.

        ``late`` is up at first, and ends after a second. ``hung`` is up, and does not tell its watchdog, which ends it later.
        """
        _executable(
            self.root / "bin/systemctl",
            f"""
            root={self.root}
            case "$1 $2" in
                "show "*)
                    health=$(cat "$root/usr/lib/edged/health"); id=$(cat "$root/usr/lib/edged/app.py" | md5sum)
                    [ -e "$root/stopped" ] && health=stopped
                    if [ "$health" = late ]; then
                        echo x >>"$root/asked"
                        [ "$(wc -l <"$root/asked")" -gt 2 ] && health=bad
                    fi
                    told=$(date +%s%N)
                    if [ "$health" = hung ]; then
                        told=1
                        echo x >>"$root/asked"
                        [ "$(wc -l <"$root/asked")" -gt 6 ] && health=bad
                    fi
                    printf 'WatchdogUSec=1min\\nWatchdogTimestampMonotonic=%s\\n' "$told"
                    case $health in
                        good | late | hung) printf 'ActiveState=active\\nSubState=running\\nNRestarts=0\\n' ;;
                        stopped) printf 'ActiveState=inactive\\nSubState=dead\\nNRestarts=0\\n' ;;
                        *) printf 'ActiveState=activating\\nSubState=auto-restart\\nNRestarts=0\\n' ;;
                    esac
                    echo "InvocationID=${{id%% *}}" ;;
                "is-system-running "*) echo running ;;
                "--no-block reboot") echo reboot >>"$root/reboots" ;;
                *) exit 1 ;;
            esac""",
        )


def _executable(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text).strip() + "\n")
    path.chmod(0o755)


def me() -> str:
    """The name of whoever runs the tests."""
    return pwd.getpwuid(os.getuid()).pw_name


@asynccontextmanager
async def served(
    node: Node,
    folder: Path,
    *,
    user: str = "",
    idle_s: float = 60.0,
    health_s: float = 1,
    start_s: float = 3,
) -> AsyncIterator[HelperClient]:
    """The helper on a real socket; whoever runs the tests may ask."""
    path = folder / "helper.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        path.chmod(0o666)
        listening.listen(16)
        upgrades = node.upgrades(health_s, start_s)
        await upgrades.resume()
        serving = asyncio.create_task(Server(listening, upgrades, user=user or me(), idle_s=idle_s).run())
        try:
            yield HelperClient(path)
        finally:
            serving.cancel()
            await asyncio.wait([serving])
            await upgrades.stop()
            path.unlink()


async def ask(client: HelperClient, verb: str, **fields: str) -> Answers:
    return [answer async for answer in client.ask({"verb": verb, **fields}, timeout_s=None)]


@contextmanager
def somebody_at_work(node: Node, name: str = "lock-frontend") -> Iterator[None]:
    """Another process holds dpkg's lock, as an apt of this system would."""
    hold = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o640); "
        "fcntl.lockf(fd, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, node.root / "var/lib/dpkg" / name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        yield
        process.stdin.close()


def kill(process: subprocess.Popen[bytes]) -> None:
    """As a power cut does it: the process and its children at once, without a word."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(path: Path, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)

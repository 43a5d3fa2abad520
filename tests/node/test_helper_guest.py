"""The privileged helper on each Debian: upgrades from a signed repository, and what it does with a version that is not well.

The daemon is restarted in the middle of each of these upgrades: the package's own scripts do that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from guest import Container, Image
from guest.command import eventually
from repository_kit import (
    BROKEN,
    CRASHES,
    LATE,
    NEW,
    QUICK,
    QUICK_FILE,
    REPOSITORY,
    STATE,
    install_from,
    version_of,
)

SOCKET = "/run/edged-helper.sock"


@contextmanager
def node(image: Image, folder: Path, repository: Path, deb: Path) -> Iterator[Container]:
    """A Debian on which the package runs and that trusts the repository."""
    with Container(image, folder, binds={REPOSITORY: repository}) as guest:
        key = (repository / "edged.asc").read_bytes()
        install_from(guest, key, f"file:{REPOSITORY}", f"edged={version_of(deb)}")
        guest.write(QUICK_FILE, QUICK)
        guest.run("systemctl", "daemon-reload")
        yield guest


def runs(guest: Container) -> str:
    """The version, by dpkg, where all is well: whole, the daemon up, nothing failed."""
    assert guest.unit("edged.service", "ActiveState") == "active", guest.journal("edged.service")
    assert guest.run("dpkg", "--verify", "edged").out == ""
    assert guest.run("systemctl", "is-system-running", check=False).out.strip() == "running"
    state, _, version = guest.sh("dpkg-query -W -f '${db:Status-Abbrev}|${Version}' edged").partition("|")
    assert state == "ii "
    assert guest.json("edged", "status", "--json")["version"] == version.replace("~", "")
    return version


def test_upgraded_by_the_daemon_s_user_while_the_daemon_is_restarted(
    suite_image: Image, tmp_path: Path, repository: Path, deb: Path
) -> None:
    with node(suite_image, tmp_path, repository, deb) as guest:
        old = runs(guest)
        before = guest.unit("edged.service", "InvocationID")
        done = guest.run("edged", "node", "upgrade", NEW, user="_edged", timeout_s=600)
        assert done.out == f"{NEW} runs\n", f"{done}{guest.journal('edged-helper.service')}"
        assert runs(guest) == NEW and guest.unit("edged.service", "InvocationID") != before
        assert guest.unit("edged.service", "NRestarts") == "0"
        found = guest.json("edged", "node", "status", "--json")
        assert (found["previous"], found["kept"], found["outcome"]["result"]) == (old, [old, NEW], "ok")
        assert guest.sh(f"stat -c '%a %U' {STATE}") == "700 root"
        eventually(
            lambda: guest.unit("edged-helper.service", "ActiveState") == "inactive",
            300,
            "the idle helper's end",
        )
        # what is asked next is answered by the new version
        guest.run("edged", "node", "rollback", timeout_s=600)
        assert runs(guest) == old


def test_the_asker_dies_and_the_upgrade_goes_on(
    suite_image: Image, tmp_path: Path, repository: Path, deb: Path
) -> None:
    with node(suite_image, tmp_path, repository, deb) as guest:
        guest.run("systemd-run", "--collect", "--unit=asker", "--uid=_edged", "edged", "node", "upgrade", NEW)
        eventually(
            lambda: guest.json("edged", "node", "status", "--json")["operation"], 300, "the upgrade's begin"
        )
        guest.run("systemctl", "kill", "--signal=KILL", "asker.service")
        eventually(lambda: not guest.json("edged", "node", "status", "--json")["operation"], 300, "its end")
        assert guest.json("edged", "node", "status", "--json")["outcome"]["result"] == "ok"
        assert runs(guest) == NEW


@pytest.mark.parametrize(
    ("version", "reason"), [(CRASHES, "health_failed"), (LATE, "health_failed"), (BROKEN, "install_failed")]
)
def test_a_version_that_is_not_well_is_taken_back(
    bookworm: Image, tmp_path: Path, repository: Path, deb: Path, version: str, reason: str
) -> None:
    with node(bookworm, tmp_path, repository, deb) as guest:
        old = runs(guest)
        done = guest.run("edged", "node", "upgrade", version, check=False, timeout_s=600)
        assert done.code == 1 and f"({reason})" in done.err and f"{old} is back" in done.err, done
        assert runs(guest) == old
        assert f"upgrade from {old} to {version}: reverting" in guest.journal("edged-helper.service")


def test_what_is_refused_is_refused_in_a_word(
    bookworm: Image, tmp_path: Path, repository: Path, deb: Path
) -> None:
    with node(bookworm, tmp_path, repository, deb) as guest:
        old = runs(guest)
        for version, reason in (("9.9", "not_found"), ("0.0.1", "older"), ("1.0-", "request_invalid")):
            done = guest.run("edged", "node", "upgrade", version, check=False)
            assert done.code == 3 and f"({reason})" in done.err, done
        # nobody's key signed it, as far as this node knows
        guest.write("/etc/apt/sources.list.d/edged.list", f"deb file:{REPOSITORY} ./\n")
        guest.sh("rm -rf /var/lib/apt/lists/*")
        done = guest.run("edged", "node", "upgrade", NEW, check=False)
        assert done.code == 3, done
        assert runs(guest) == old


def test_the_helper_asks_the_kernel_who_is_there(
    bookworm: Image, tmp_path: Path, repository: Path, deb: Path
) -> None:
    """Also where the socket's mode was opened."""
    with node(bookworm, tmp_path, repository, deb) as guest:
        guest.run("useradd", "--groups", "edged", "alice")
        refused = guest.run("edged", "node", "status", user="alice", check=False)
        assert refused.code == 4 and "sudo" in refused.err
        guest.run("chmod", "666", SOCKET)
        for words in (("status",), ("upgrade", NEW), ("rollback",), ("reboot",)):
            refused = guest.run("edged", "node", *words, user="alice", check=False)
            assert refused.code == 3 and "(not_allowed)" in refused.err, refused
        assert guest.run("edged", "node", "status", user="_edged").code == 0


def test_a_boot_goes_on_with_an_upgrade_that_a_shutdown_left(
    bookworm: Image, tmp_path: Path, repository: Path, deb: Path
) -> None:
    """Nobody asks for anything after the boot; and a daemon that ends with its node is not taken for one that is not well."""
    with node(bookworm, tmp_path, repository, deb) as guest:
        runs(guest)
        guest.write(
            QUICK_FILE,
            QUICK.replace("health-s 5", "health-s 20"),
        )
        guest.run("systemctl", "daemon-reload")
        guest.run("systemctl", "restart", "edged-helper.service")
        guest.run("systemd-run", "--collect", "--unit=asker", "edged", "node", "upgrade", NEW)
        eventually(lambda: b'"watching"' in operation(guest), 300, "the new version to be watched")
        guest.stop()
        assert b'"watching"' in operation(guest)
        guest.start()
        eventually(lambda: operation(guest) == b"", 300, "the end of the upgrade")
        outcome = guest.json("edged", "node", "status", "--json")["outcome"]
        assert outcome["result"] == "ok" and runs(guest) == NEW, outcome


def operation(guest: Container) -> bytes:
    """What is written down of an upgrade that has not ended; empty where there is none. Read from outside."""
    path = guest.root / STATE.lstrip("/") / "operation.json"
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


def test_killed_in_each_phase_it_goes_on(
    bookworm: Image, tmp_path: Path, repository: Path, deb: Path
) -> None:
    """The helper and all that it runs are killed at once; systemd starts it again, and the upgrade ends well."""
    with node(bookworm, tmp_path, repository, deb) as guest:
        old = runs(guest)
        for phase in ("installing", "watching"):
            guest.run("systemd-run", "--collect", "--unit", f"asker-{phase}", "edged", "node", "upgrade", NEW)

            # not asked of a command, which takes as long as a phase may on a slow machine
            eventually(lambda: f'"{phase}"'.encode() in operation(guest), 300, phase, every_s=0.02)  # noqa: B023
            time.sleep(1)
            assert f'"{phase}"'.encode() in operation(guest), f"{phase} was over too soon"
            # a child that dies meanwhile by itself is an error to systemctl
            guest.run("systemctl", "kill", "--signal=KILL", "edged-helper.service", check=False)
            eventually(
                lambda: guest.run("test", "-e", f"{STATE}/operation.json", check=False).code, 300, "the end"
            )
            found = guest.json("edged", "node", "status", "--json")
            assert found["whole"] and not found["interrupted"], found
            assert found["outcome"]["result"] == "ok" or runs(guest) == old, found
            if runs(guest) == NEW:
                guest.run("edged", "node", "rollback", timeout_s=600)
            assert runs(guest) == old


def test_exposure_of_what_runs(suite_image: Image, tmp_path: Path, repository: Path, deb: Path) -> None:
    with node(suite_image, tmp_path, repository, deb) as guest:
        for unit, most_tenths in (("edged", 17), ("edged-helper", 32), ("edged-recover", 32)):
            said = guest.run(
                "systemd-analyze", "security", "--no-pager", f"--threshold={most_tenths}", f"{unit}.service"
            )
            print(said.out.splitlines()[-1])


def test_credentials_are_the_daemon_s_alone(
    suite_image: Image, tmp_path: Path, repository: Path, deb: Path
) -> None:
    with node(suite_image, tmp_path, repository, deb) as guest:
        inside = "/run/credentials/edged.service"
        assert guest.run("ls", inside).out == "", "an empty folder stops nothing"
        guest.write("/etc/edged/credentials/repository", "s3cret\n", mode="600")
        guest.run("systemctl", "restart", "edged.service")
        assert guest.run("cat", f"{inside}/edged_repository", user="_edged").out == "s3cret\n"
        guest.run("useradd", "--groups", "edged", "alice")
        for path in (f"{inside}/edged_repository", "/etc/edged/credentials/repository"):
            assert guest.run("cat", path, user="alice", check=False).code == 1
        assert guest.run("cat", "/etc/edged/credentials/repository", user="_edged", check=False).code == 1
        pid = guest.unit("edged.service", "MainPID")
        assert "s3cret" not in guest.run("cat", f"/proc/{pid}/environ").out


def test_stopped_it_stays_stopped_and_killed_it_comes_back(
    suite_image: Image, tmp_path: Path, repository: Path, deb: Path
) -> None:
    with node(suite_image, tmp_path, repository, deb) as guest:
        guest.run("systemctl", "stop", "edged.service")
        assert guest.run("edged", "status", check=False).code == 4
        assert guest.unit("edged.service", "ActiveState") == "inactive", "a question started it"
        guest.run("systemctl", "disable", "edged.service")
        assert guest.unit("edged.socket", "UnitFileState") == "disabled", (
            "a question after a boot would start it"
        )
        guest.run("systemctl", "enable", "--now", "edged.service")
        for _ in range(7):
            guest.run("systemctl", "restart", "edged.service")
        assert guest.run("edged", "status").code == 0, "the socket has a limit that the daemon has not"
        for killed in range(1, 8):
            guest.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "edged.service", check=False)
            eventually(lambda: guest.unit("edged.service", "NRestarts") == str(killed), 300, "the next start")  # noqa: B023
            eventually(lambda: guest.unit("edged.service", "ActiveState") == "active", 300, "the daemon")
        assert guest.run("edged", "status").code == 0
        assert guest.unit("edged.socket", "ActiveState") == "active"

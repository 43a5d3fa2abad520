"""The guests themselves: what the other tests rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
from guest import Container, Image, Machine
from guest.images import copy_disk

MARK = "/var/lib/mark"


def test_a_container_boots_in_seconds_and_leaves_nothing(suite_image: Image, tmp_path: Path) -> None:
    with Container(suite_image, tmp_path) as guest:
        assert guest.boot_s < 20
        assert guest.run("cat", "/proc/1/comm").out == "systemd\n"
        assert suite_image.suite in guest.sh("cat /etc/os-release")
        guest.write(MARK, "kept", mode="600")
        assert guest.sh(f"stat -c %a {MARK}") == "600"
        assert guest.run("false", check=False).code == 1
        assert guest.run("id", "-un", user="nobody").out == "nobody\n"
        assert guest.sh("ip -o link | wc -l") == "1", "a network beyond its own loopback"
        guest.stop()
        guest.start()
        assert guest.sh(f"cat {MARK}") == "kept"
    assert not (suite_image.tree / MARK.lstrip("/")).exists()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


@pytest.mark.timeout(600)
def test_a_machine_boots_speaks_and_loses_what_was_not_flushed(bookworm: Image, tmp_path: Path) -> None:
    disk = copy_disk(bookworm.disk, tmp_path / "disk.raw")
    with Machine(bookworm, disk, tmp_path / "vm") as guest:
        print(f"booted in {guest.boot_s:.1f} s")
        assert guest.run("cat", "/proc/1/comm").out == "systemd\n"
        guest.sh(f"echo kept >{MARK}; sync; echo lost >{MARK}-2; echo told >/dev/virtio-ports/witness")
        guest.kill()
        assert guest.witness.read_text() == "told\n"
        guest.start()
        assert "recovery complete" in guest.sh("dmesg")
        assert guest.sh(f"cat {MARK}") == "kept"
        assert guest.run("test", "-s", f"{MARK}-2", check=False).code == 1
        guest.power_off()

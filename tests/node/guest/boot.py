"""What a machine boots with: Debian's kernel as it is when it has unpacked itself, and the smallest initramfs.

Emulated, a kernel that unpacks itself and an initramfs with a shell and udev are a third of a boot.
"""

from __future__ import annotations

import lzma
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from guest.command import GuestError

MODULES: Final = ("virtio_pci", "virtio_blk", "ext4")
"""What a guest's disk needs."""

INIT: Final = Path(__file__).with_name("init.c")
_XZ, _ZSTD = b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
_SECTOR: Final = 512


def unpacked_kernel(packed: bytes, tree: Path) -> bytes:
    """The ELF file within a bzImage (Linux/x86 boot protocol 2.08), which QEMU starts by its PVH entry. Raises GuestError."""
    begin = (packed[0x1F1] + 1) * _SECTOR + int.from_bytes(packed[0x248:0x24C], "little")
    # the last four bytes are the length of what is packed
    payload = packed[begin : begin + int.from_bytes(packed[0x24C:0x250], "little") - 4]
    if payload.startswith(_XZ):
        return lzma.decompress(payload)
    if payload.startswith(_ZSTD):
        return _inside(tree, "zstd", "-dc", stdin=payload)
    raise GuestError(f"a kernel that is packed in another way: {payload[:6].hex()}")


def initramfs(tree: Path) -> bytes:
    """An archive (cpio, "newc") with our init and the modules of ``tree`` that it loads, in their order. Raises GuestError."""
    return b"".join(
        (
            _entry("init", _init()),
            *(_entry(str(number), _module(path)) for number, path in enumerate(_modules(tree))),
            _entry("TRAILER!!!", b""),
        )
    )


def _init() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "init"
        _run("gcc", "-O2", "-Wall", "-Wextra", "-static", "-s", "-o", str(made), str(INIT))
        return made.read_bytes()


def _modules(tree: Path) -> list[Path]:
    """Each after those that it needs; what is built in is none."""
    (version,) = (path.name for path in (tree / "lib/modules").iterdir())
    words = ("modprobe", "--show-depends", "--set-version", version)
    said = b"".join(_inside(tree, *words, name) for name in MODULES).decode()
    paths = [line.split()[1] for line in said.splitlines() if line.startswith("insmod ")]
    return [tree / path.lstrip("/") for path in dict.fromkeys(paths)]


def _module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if data.startswith(_XZ) else data


def _entry(name: str, content: bytes) -> bytes:
    text = name.encode() + b"\0"
    # inode, mode, user, group, links, time, size, four device numbers, length of the name, checksum
    numbers = (0, stat.S_IFREG | 0o755, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(text), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + text
    return b"".join(part + bytes(-len(part) % 4) for part in (head, content))


def _inside(tree: Path, *command: str, stdin: bytes = b"") -> bytes:
    return _run("chroot", str(tree), *command, stdin=stdin)


def _run(*command: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    if done.returncode != 0:
        raise GuestError(f"{' '.join(command)}: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout

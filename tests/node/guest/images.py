"""Images of Debian for guests: one tree for each suite serves containers as it is, and machines as an ext4 disk.

They are built by mmdebstrap from the Debian archive once, into ``.cache/guests/SUITE-HASH``, where the hash is
that of this recipe. A folder appears there whole or not at all; older recipes' folders are removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guest import boot
from guest.command import GuestError

SUITES: Final = ("bookworm", "trixie")
CACHE: Final = Path(__file__).resolve().parents[3] / ".cache" / "guests"

PACKAGES: Final = (
    *("systemd", "systemd-sysv", "dbus", "udev", "kmod", "iproute2", "procps", "login", "adduser"),
    *("linux-image-amd64", "zstd", "qemu-guest-agent"),
    # what edged needs of the distribution: a guest has no way to the archive
    *("python3", "python3-cryptography", "python3-aiohttp", "tzdata"),
    "mosquitto",
)

CUSTOMIZE: Final = r"""
set -eu
cd "$1"
echo node >etc/hostname
echo "127.0.0.1 localhost node" >etc/hosts
printf '%s\n' '/dev/vda / ext4 defaults 0 1' >etc/fstab
# nothing outside can be reached, and a guest that waits for it costs every test
rm -rf etc/apt/sources.list etc/apt/sources.list.d/* var/lib/apt/lists/*
printf '%s\n' 'APT::Install-Recommends "false";' 'Acquire::Languages "none";' >etc/apt/apt.conf.d/90guest
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer systemd-networkd-wait-online.service systemd-timesyncd.service mosquitto.service \
    getty@tty1.service console-getty.service serial-getty@ttyS0.service \
    dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
    modprobe@drm.service modprobe@dm_mod.service modprobe@loop.service modprobe@efi_pstore.service \
    modprobe@configfs.service modprobe@fuse.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
    systemd-binfmt.service proc-sys-fs-binfmt_misc.automount; do
    ln -sf /dev/null "etc/systemd/system/$unit"
done
mkdir -p var/log/journal etc/systemd/system/qemu-guest-agent.service.d
# it has a line for each question of the host, and the journal's writes would be most of what a waiting machine does
printf '%s\n' '[Service]' StandardOutput=null StandardError=null >etc/systemd/system/qemu-guest-agent.service.d/quiet.conf
"""
"""Run with the tree's path after the packages are in. The kernel stays Debian's own, with CAN and USB serial."""

OPTIONS: Final = (
    *("--mode=root", "--variant=apt", '--aptopt=APT::Install-Recommends "false"'),
    *('--aptopt=Acquire::Languages "none"', "--dpkgopt=path-exclude=/usr/share/locale/*"),
    # no initramfs of Debian's: a machine boots with one of its own, see boot.py
    "--dpkgopt=path-exclude=/etc/kernel/postinst.d/initramfs-tools",
    # two thirds of a kernel's modules, and of each copy of a disk: for what no guest has
    *(
        f"--dpkgopt=path-exclude=*/lib/modules/*/kernel/{part}/*"
        for part in (
            *("sound", "drivers/gpu", "drivers/media", "drivers/net/ethernet", "drivers/net/wireless"),
            *("drivers/infiniband", "drivers/scsi", "drivers/iio", "drivers/staging", "drivers/isdn"),
        )
    ),
)
DISK_MIB: Final = 1536


@dataclass(frozen=True, slots=True)
class Image:
    """One built suite. ``tree`` and ``disk`` are never written to: guests work on overlays and copies."""

    suite: str
    folder: Path

    @property
    def tree(self) -> Path:
        """The root file system as a folder."""
        return self.folder / "tree"

    @property
    def disk(self) -> Path:
        """The same as a raw, sparse ext4 disk."""
        return self.folder / "disk.raw"

    @property
    def kernel(self) -> Path:
        """Debian's kernel of the tree, unpacked, to be booted without a boot loader."""
        return self.folder / "vmlinux"

    @property
    def initrd(self) -> Path:
        """What mounts the disk for it."""
        return self.folder / "initrd"


def image(suite: str) -> Image:
    """The image of ``suite``, built now where the cache has none. Raises GuestError."""
    built = Image(suite, CACHE / f"{suite}-{recipe_hash(suite)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with _alone(CACHE / f"{suite}.lock"):
        if not built.folder.exists():
            _build(built)
            _remove_others(built)
    return built


def images() -> dict[str, Image]:
    """All suites, built at the same time where the cache lacks them."""
    with ThreadPoolExecutor(len(SUITES)) as pool:
        return dict(zip(SUITES, pool.map(image, SUITES), strict=True))


def recipe_hash(suite: str) -> str:
    """Names what an image is made of; another recipe is another image."""
    booted = (*boot.MODULES, boot.INIT.read_text())
    recipe = "\0".join((suite, *PACKAGES, CUSTOMIZE, *OPTIONS, *booted, str(DISK_MIB)))
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def make_disk(tree: Path, disk: Path, size_mib: int = DISK_MIB) -> None:
    """A raw, sparse ext4 file system with the content of ``tree``. Raises GuestError."""
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(disk), f"{size_mib}M")


def copy_disk(source: Path, target: Path) -> Path:
    """A raw disk of a test's own, as sparse as its source; returns ``target``."""
    run("cp", "--sparse=always", str(source), str(target))
    return target


def make_overlay(source: Path, target: Path) -> Path:
    """A qcow2 disk that holds what differs from the raw ``source``; returns ``target``. It can keep snapshots."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(source), "-F", "raw", str(target))
    return target


def run(*command: str) -> str:
    """A command of the host to its end; what it printed. Raises GuestError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise GuestError(
            f"{command[0]} is not installed; packaging/setup-dev.sh --node installs it"
        ) from error
    if done.returncode != 0:
        raise GuestError(f"{' '.join(command)}: {(done.stderr + done.stdout)[-2000:]}")
    return done.stdout


def _build(built: Image) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{built.suite}-", dir=CACHE) as folder:
        # mmdebstrap's own user must be able to reach the tree
        Path(folder).chmod(0o755)
        half = Image(built.suite, Path(folder) / "image")
        half.folder.mkdir()
        hook = half.folder / "customize"
        hook.write_text(CUSTOMIZE)
        run(
            *("mmdebstrap", *OPTIONS, f"--include={','.join(PACKAGES)}"),
            *(f'--customize-hook=sh {hook} "$1"', built.suite, str(half.tree)),
        )
        hook.unlink()
        (packed,) = (half.tree / "boot").glob("vmlinuz-*")
        half.kernel.write_bytes(boot.unpacked_kernel(packed.read_bytes(), half.tree))
        half.initrd.write_bytes(boot.initramfs(half.tree))
        packed.unlink()
        make_disk(half.tree, half.disk)
        half.folder.rename(built.folder)


def _remove_others(built: Image) -> None:
    for folder in CACHE.glob(f"{built.suite}-*"):
        if folder != built.folder:
            shutil.rmtree(folder)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Nobody else builds meanwhile; the lock ends with its process."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

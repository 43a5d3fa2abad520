"""Roots of Debian for machines of another kind, made without running their programs: that would take minutes.

The machine's own: every package, chosen, fetched, checked, unpacked and registered by this machine's apt and dpkg, which are
told of the other architecture; so that the machine's own apt and dpkg go on from there.

Configured on this machine: no maintainer script of these packages is run. What scripts leave behind is the same for each
architecture, and is taken over from the guests' tree of the same suite: every file there that no package owns, such as users,
alternatives and compiled Python. Some of it is of packages that only guests have (names of users, links to units); what
scripts do to files of packages, such as to give them to a group, and their diversions are left out. Where the guests' packages
are newer, the guests' own Python compiles anew.

Only ``ldconfig`` and a check by apt are run on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from guest.images import image, recipe_hash
from package_kit import run

INTERPRETERS: Final = {"arm64": "aarch64", "armhf": "arm"}
"""Debian's name of an architecture to that of QEMU."""

PROCESSORS: Final = {"arm64": "cortex-a53", "armhf": "cortex-a7"}
"""Raspberry Pi 3's and 2's. Signed pointers, which only newer ones have and Debian 13 uses, take five times as long in QEMU."""

BUILD_S: Final = 1800

REGISTER: Final = """
if [ -n "$1" ]; then
    mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    grep -qs enabled "/proc/sys/fs/binfmt_misc/qemu-$1" ||
        cat "/usr/lib/binfmt.d/qemu-$1.conf" >/proc/sys/fs/binfmt_misc/register
fi
"""
"""With the flag F: the interpreter is opened now, and need not be in the root."""

INSTALL: Final = """
architecture=$1 mirror=$2 root=$3
shift 3
mount --bind "$root" "$root"
mount -o remount,bind,ro /
cd "$root"
umask 022
mkdir -p etc/apt/apt.conf.d etc/apt/preferences.d usr/bin usr/sbin usr/lib
mkdir -p var/cache/apt/archives/partial var/lib/dpkg var/log/apt
ln -s usr/bin usr/sbin usr/lib .
touch var/lib/dpkg/status
echo "$architecture" >var/lib/dpkg/arch
echo "$mirror" >etc/apt/sources.list
export APT_CONFIG="$root/apt.conf" TMPDIR="$root" DEBIAN_FRONTEND=noninteractive
cat >"$APT_CONFIG" <<END
Dir "$root";
Dir::Bin::dpkg "/usr/bin/dpkg";
Dir::Etc::TrustedParts "/etc/apt/trusted.gpg.d/";
APT::Architecture "$architecture";
APT::Architectures { "$architecture"; };
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Immediate-Configure "false";
Acquire::Languages "none";
DPkg::Options {
    "--root=$root"; "--log=$root/var/log/dpkg.log"; "--force-architecture,depends,script-chrootless,unsafe-io";
    "--path-exclude=/usr/share/locale/*"; "--path-exclude=/usr/share/doc/*";
};
END
apt-get -qq update
for interpreter in /bin/sh /bin/bash /usr/bin/perl; do
    mount --bind /bin/true "$interpreter"
done
apt-get -qq --yes install '?essential' apt "$@"
apt-get clean
exec rm -rf "$APT_CONFIG" etc/apt/sources.list var/lib/apt/lists
"""
"""For a mount namespace of its own. Scripts are run by ``true`` there; one with another interpreter would find this machine's
root read-only. dpkg cannot be told that it runs on another architecture, and takes packages for all for this one's; the
dependencies are held by apt, which can.
"""

FINISH: Final = """
mount --bind "$3" "$2/mnt"
PYTHONDONTWRITEBYTECODE=1 chroot "$2" sh -c \\
    'exec python3 -m compileall -q -s /mnt -p / /mnt/usr/lib/python3* /mnt/usr/share/python3'
export QEMU_CPU="$4"
chroot "$3" ldconfig
exec chroot "$3" apt-get check
"""
"""Compiles what is older than its source or missing; the guests' tree is not written to."""

NOT_TAKEN: Final = re.compile(
    r"/(bin|sbin|lib|dev/.*|run/.*|initrd\.img.*|vmlinuz.*|etc/ld\.so\.cache|usr/lib/modules/.*)"
    r"|/var/(cache|lib/apt|log)/.*|/var/lib/dpkg/(?!alternatives/).*|.*x86_64-linux-gnu.*"
)
"""What is of the guest's architecture or its kernel, of the day it was made, or already here."""


def ingredients(suite: str) -> tuple[str, ...]:
    """What a root is made of, but for its packages and their mirror; another text is another root."""
    return INSTALL, FINISH, NOT_TAKEN.pattern, recipe_hash(suite)


def make(suite: str, architecture: str, mirror: str, packages: Sequence[str], folder: Path) -> None:
    """Make a root in ``folder``, which must not be there. The guests' tree is built now where the cache has none."""
    tree = image(suite).tree
    folder.mkdir()
    alone(INSTALL, architecture, mirror, str(folder), *packages)
    run(
        "cp", "--archive", "--parents", f"--target-directory={folder}", "--", *left_by_scripts(tree), cwd=tree
    )
    alone(REGISTER + FINISH, INTERPRETERS[architecture], str(tree), str(folder), PROCESSORS[architecture])


def alone(script: str, *arguments: str) -> str:
    """Run a script for ``sh`` in a mount namespace of its own to its end; what it printed."""
    return run(*in_namespace(script), *arguments, timeout_s=BUILD_S)


def in_namespace(script: str) -> list[str]:
    """The command for that; the script's arguments follow."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script, "sh"]


def left_by_scripts(tree: Path) -> list[str]:
    """What no package of the tree owns and is not to be left out: files, links and empty folders, by their relative paths."""
    owned = _owned(tree)
    names = (f"/{path.relative_to(tree)}" for path in tree.rglob("*") if _is_leaf(path))
    return [name[1:] for name in names if name not in owned and not NOT_TAKEN.fullmatch(name)]


def _owned(tree: Path) -> set[str]:
    """By the paths on a merged /usr, which not all packages name."""
    lists = (file.read_text() for file in (tree / "var/lib/dpkg/info").glob("*.list"))
    return {re.sub(r"^/(bin|sbin|lib)/", r"/usr/\1/", path) for text in lists for path in text.splitlines()}


def _is_leaf(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir() or not any(path.iterdir())

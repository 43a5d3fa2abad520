"""The package, through apt and dpkg. Decides nothing; what comes back is what they say.

Only what apt can verify is taken: options of this node that would loosen that do not hold here. A source that an operator has
marked ``[trusted=yes]`` is one that apt trusts.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import pwd
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edged.helper.commands import Ended, run
from edged.helper.protocol import Refusal, Why, is_version

log = logging.getLogger(__name__)

PACKAGE = "edged"
QUICK_S = 60.0
UPDATE_S = 300.0
FETCH_S = 900.0
INSTALL_S = 1800.0
LOCK_S = 300
MOST_DEB_BYTES = 256 * 1024 * 1024
FLOCK = "hhqqi0q"
"""``struct flock`` with 64 bit offsets: type, whence, start, length, process."""

OPTIONS = (
    "-q",
    "-o", f"DPkg::Lock::Timeout={LOCK_S}",
    "-o", "Dpkg::Use-Pty=0",
    "-o", "Dpkg::Options::=--force-confdef",
    "-o", "Dpkg::Options::=--force-confold",
    "-o", "Acquire::Retries=2",
    "-o", "Acquire::http::Timeout=30",
    "-o", "Acquire::https::Timeout=30",
    "-o", "Acquire::AllowInsecureRepositories=false",
    "-o", "Acquire::AllowWeakRepositories=false",
    "-o", "Acquire::AllowDowngradeToInsecureRepositories=false",
    "-o", "APT::Get::AllowUnauthenticated=false",
    # a list that says until when it holds; others stay as they are
    "-o", "Acquire::Check-Date=true",
    "-o", "Acquire::Check-Valid-Until=true",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Installed:
    """``state``: dpkg's three letters, ``ii`` where the package is whole. Both are empty where it knows none."""

    state: str
    version: str

    @property
    def whole(self) -> bool:
        return len(self.state) >= 2 and self.state[1] == "i" and self.state[2:].strip() == ""


class Apt:
    """apt and dpkg of the system below ``root``. ``options`` are for all calls of apt, ``dpkg_options`` for those of dpkg.

    Methods that change something return how the program ended; those that look raise :class:`Refusal`.
    """

    def __init__(
        self,
        folder: str = "/usr/bin",
        *,
        root: str = "/",
        options: Sequence[str] = (),
        dpkg_options: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._root = f"--root={root}"
        self._admin = Path(root) / "var/lib/dpkg"
        self._options = (*options, *OPTIONS)
        self._dpkg_options = tuple(dpkg_options)

    async def installed(self) -> Installed:
        """What dpkg says about the package now."""
        argv = [
            f"{self._folder}/dpkg-query",
            self._root,
            "-W",
            "-f",
            "${db:Status-Abbrev}|${Version}\n",
            PACKAGE,
        ]
        ended = await run(argv, timeout_s=QUICK_S, quiet=True)
        state, _, version = ended.text.partition("|") if ended.ok else ("", "", "")
        return Installed(state.strip(), version.strip())

    async def is_newer(self, version: str, than: str) -> bool:
        """Whether dpkg orders ``version`` after ``than``."""
        argv = [f"{self._folder}/dpkg", "--compare-versions", version, "gt", than]
        return (await run(argv, timeout_s=QUICK_S, quiet=True)).ok

    async def update(self) -> Ended:
        """Read the repositories' indexes anew."""
        return await run(
            [*self._apt("apt-get"), "-o", "APT::Update::Error-Mode=any", "update"], timeout_s=UPDATE_S
        )

    async def sha256(self, version: str) -> str:
        """The digest of that version's file, hexadecimal, from a repository's signed index; empty: no repository has it."""
        argv = [*self._apt("apt-cache"), "show", f"{PACKAGE}={version}"]
        ended = await run(argv, timeout_s=QUICK_S, quiet=True)
        found = [line[8:].strip() for line in ended.text.splitlines() if line.startswith("SHA256: ")]
        return found[0] if ended.ok and found else ""

    async def fetch(self, version: str, sha256: str) -> bytes:
        """The file of ``version``, verified by apt and against ``sha256``.

        Raises :class:`Refusal`: ``signature_invalid``, ``hash_mismatch``, ``disk_full``, ``fetch_failed``.
        """
        with _folder_for_apt() as folder:
            argv = [*self._apt("apt-get"), "download", f"{PACKAGE}={version}"]
            ended = await run(argv, timeout_s=FETCH_S, cwd=folder)
            if not ended.ok:
                raise Refusal(why_not_fetched(ended), f"{PACKAGE} {version}: {ended.gist}")
            data = _only_file(folder)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Refusal(Why.HASH_MISMATCH, f"{PACKAGE} {version} is not the file that the index names")
        return data

    async def simulate(self, version: str) -> Ended:
        """Say whether ``version`` could be installed and nothing would be removed for it."""
        return await run([*self._install(), "--simulate", f"{PACKAGE}={version}"], timeout_s=QUICK_S)

    async def configure(self) -> Ended:
        """Finish what was unpacked and not set up."""
        argv = [*self._dpkg(), "--configure", "-a"]
        return await run(argv, timeout_s=INSTALL_S)

    async def install(self, version: str) -> Ended:
        """Install ``version`` from a repository."""
        return await run([*self._install(), f"{PACKAGE}={version}"], timeout_s=INSTALL_S)

    async def put_back(self, deb: Path) -> Ended:
        """Install a file that was kept, older or not."""
        return await run(
            [*self._install(), "--allow-downgrades", "--reinstall", str(deb)], timeout_s=INSTALL_S
        )

    async def put_back_without_apt(self, deb: Path) -> Ended:
        """The same where apt will not. Does not wait for a lock."""
        argv = [*self._dpkg(), "--force-downgrade", "--install", str(deb)]
        return await run(argv, timeout_s=INSTALL_S)

    def locked(self) -> bool:
        """Whether somebody's apt or dpkg holds one of dpkg's locks. Takes none, which others would meet. Blocks."""
        return any(_is_locked(self._admin / name) for name in ("lock-frontend", "lock"))

    async def version_of(self, deb: Path) -> str:
        """The version of the package in ``deb``; empty where it is none of ours, or damaged."""
        argv = [f"{self._folder}/dpkg-deb", "--show", "--showformat=${Package}|${Version}\n", str(deb)]
        ended = await run(argv, timeout_s=QUICK_S, quiet=True)
        name, _, version = ended.text.partition("|")
        return version.strip() if ended.ok and name == PACKAGE and is_version(version.strip()) else ""

    def _apt(self, program: str) -> list[str]:
        return [f"{self._folder}/{program}", *self._options]

    def _dpkg(self) -> list[str]:
        keep_conffiles = ("--force-confdef", "--force-confold")
        return [f"{self._folder}/dpkg", self._root, *keep_conffiles, *self._dpkg_options]

    def _install(self) -> list[str]:
        return [*self._apt("apt-get"), "install", "--yes", "--no-remove", "--no-install-recommends"]


def why_not_fetched(ended: Ended) -> Why:
    """Why apt did not fetch a file or an index; apt has one exit code for all of it."""
    for words, why in (
        ("is not signed", Why.SIGNATURE_INVALID),
        ("NO_PUBKEY", Why.SIGNATURE_INVALID),
        ("signatures were invalid", Why.SIGNATURE_INVALID),
        ("no longer signed", Why.SIGNATURE_INVALID),
        ("could not be authenticated", Why.SIGNATURE_INVALID),
        ("unauthenticated", Why.SIGNATURE_INVALID),
        ("Hash Sum mismatch", Why.HASH_MISMATCH),
        ("unexpected size", Why.HASH_MISMATCH),
        ("No space left", Why.DISK_FULL),
        ("enough free space", Why.DISK_FULL),
    ):
        if words in ended.text:
            return why
    return Why.FETCH_FAILED


def _is_locked(path: Path) -> bool:
    """Whether another process holds a lock on ``path`` (F_GETLK, fcntl(2))."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        return bool(struct.unpack(FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


@contextmanager
def _folder_for_apt() -> Iterator[Path]:
    """A folder that apt's own unprivileged user can write to, and nobody else but root."""
    folder = Path(tempfile.mkdtemp(prefix="edged-helper-"))
    try:
        try:
            os.chown(folder, pwd.getpwnam("_apt").pw_uid, -1)
        except (KeyError, PermissionError):
            log.info("the folder cannot be given to the user _apt; apt downloads as this one")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _only_file(folder: Path) -> bytes:
    """The content of the one .deb in ``folder``. Raises Refusal(fetch_failed) where there is not exactly one that is a file."""
    names = [entry for entry in os.scandir(folder) if entry.name.endswith(".deb")]
    if len(names) != 1 or not names[0].is_file(follow_symlinks=False):
        raise Refusal(Why.FETCH_FAILED, f"apt left {len(names)} files, expected one")
    fd = os.open(names[0].path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        data = file.read(MOST_DEB_BYTES + 1)
    if len(data) > MOST_DEB_BYTES:
        raise Refusal(Why.FETCH_FAILED, f"the file is larger than {MOST_DEB_BYTES} bytes")
    return data

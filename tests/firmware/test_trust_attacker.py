"""An attacker owns the server, and now and then the keys of timestamp and snapshot; the client is not fooled.

He drops, replays, swaps, flips, cuts and forges files; the publisher publishes, withdraws, renews and rotates
meanwhile; time passes and the client's cache is lost. Whatever comes in which order, the client accepts only
sets of releases that the publisher signed, never an older set than before, and never an expired one. The client
looks after every step.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from securesystemslib.signer import Signature
from trust_kit import NOW, Client, Publisher, signed_bytes
from tuf.api.metadata import Metadata, Snapshot, TargetFile, Timestamp
from tuf.api.serialization.json import JSONSerializer

from edged_firmware import release
from edged_firmware.errors import EdgedError
from edged_firmware.repository import ROLES, describe

GRACE = timedelta(days=3)
Releases = frozenset[tuple[str, str]]


def forged_bytes(metadata: Metadata[Any], keyids: Iterable[str]) -> bytes:
    """Metadata with signatures that name the given keys and are made with another."""
    stranger = Ed25519PrivateKey.generate()
    metadata.signatures.clear()
    for keyid in keyids:
        metadata.signatures[keyid] = Signature(keyid, stranger.sign(metadata.signed_bytes).hex())
    return metadata.to_bytes(JSONSerializer(compact=True))


class Attacker(RuleBasedStateMachine):
    """``history``: all metadata ever signed; ``honest``: what each version of targets lists."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp())
        self.served = self.base / "served" / "metadata"
        self.served.mkdir(parents=True)
        self.history: list[tuple[str, bytes]] = []
        self.honest: dict[int, Releases] = {}
        self.count = 0

    def teardown(self) -> None:
        shutil.rmtree(self.base)

    @initialize()
    def start(self) -> None:
        self.publisher = Publisher(self.base, write=self.record).init()
        self.client = Client(
            self.base / "cache", self.publisher.root, str(self.served.parent), grace=GRACE, now=NOW
        )
        self.note()
        self.serve_everything()

    def record(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        if path.parent.name == "metadata":
            self.history.append((path.name, data))

    def note(self) -> None:
        """Remember what the publisher says now."""
        targets = self.publisher.state().targets.signed
        self.honest[targets.version] = frozenset(
            (path, target.hashes["sha256"])
            for path, target in targets.targets.items()
            if path.endswith("/image")
        )

    # The publisher

    def keep_root_alive(self) -> None:
        if self.publisher.state().root.signed.is_expired(self.publisher.now + timedelta(days=1)):
            self.publisher.rotate()

    @rule(served=st.booleans())
    def publish(self, served: bool) -> None:
        self.count += 1
        self.keep_root_alive()
        self.publisher.publish(f"blink@{self.count}")
        self.note()
        if served:
            self.serve_everything()

    @rule()
    def withdraw(self) -> None:
        self.keep_root_alive()
        listed = release.list_releases(self.publisher.repo)
        if listed:
            release.remove(self.publisher.repo, listed[0].ref, write=self.record)
            self.publisher.publish()
            self.note()
            self.serve_everything()

    @rule()
    def renew_with_online_keys_alone(self) -> None:
        """Targets come nearer to their expiry under a fresh timestamp."""
        self.keep_root_alive()
        online = self.base / "online"
        online.mkdir(exist_ok=True)
        for path in online.iterdir():
            path.unlink()
        for pattern in ("timestamp-*.pem", "snapshot-*.pem", "trusted-root.json"):
            for path in self.publisher.keys.glob(pattern):
                shutil.copy(path, online)
        release.publish(self.publisher.repo, [online], self.publisher.now, write=self.record)
        self.serve_everything()
        self.look()

    @rule(role=st.sampled_from(ROLES))
    def rotate(self, role: str) -> None:
        self.publisher.rotate(role)
        self.note()

    @rule(days=st.sampled_from([1, 2, 6, 9, 85]))
    def time_passes(self, days: int) -> None:
        self.publisher.now += timedelta(days=days)
        self.client.now = self.publisher.now
        self.look()

    @rule()
    def the_clock_goes_back(self) -> None:
        """Until time passes again; what counts is then the signed time that was seen."""
        self.client.now = NOW

    # The attacker

    @rule()
    def serve_everything(self) -> None:
        for name, data in self.history:
            (self.served / name).write_bytes(data)
        self.look()

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        (self.served / self.choose_name(data)).unlink(missing_ok=True)
        self.look()

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        """Any content that was ever signed, under its own name or any other."""
        name, content = self.history[data.draw(st.integers(0, len(self.history) - 1))]
        if data.draw(st.booleans()):
            name = self.choose_name(data)
        (self.served / name).write_bytes(content)
        self.look()

    @rule(back=st.integers(1, 6), lost=st.booleans())
    def replay_an_old_timestamp(self, back: int, lost: bool) -> None:
        """A freeze: the files of an older version are all still there."""
        self.lose_cache(lost)
        old = [content for name, content in self.history if name == "timestamp.json"]
        for name, data in self.history:
            (self.served / name).write_bytes(data)
        (self.served / "timestamp.json").write_bytes(old[-min(back, len(old))])
        self.look()

    @rule(data=st.data())
    def flip(self, data: st.DataObject) -> None:
        path = self.served / self.choose_name(data)
        if path.exists() and path.stat().st_size:
            content = bytearray(path.read_bytes())
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(content)
            self.look()

    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        path = self.served / self.choose_name(data)
        if path.exists():
            content = path.read_bytes()
            path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
            self.look()

    @rule(lost=st.booleans())
    def forge_signatures(self, lost: bool) -> None:
        """A whole next state with an image of his own; the signatures bear the right key ids."""
        self.lose_cache(lost)
        state = self.publisher.state()
        evil = TargetFile.from_data("blink/6/image", b"evil", ["sha256"])
        state.targets.signed.targets[evil.path] = evil
        roles = state.root.signed.roles
        for metadata in (state.targets, state.snapshot, state.timestamp):
            metadata.signed.version += 1
        targets, snapshot = state.targets.signed.version, state.snapshot.signed.version
        raw = forged_bytes(state.targets, roles["targets"].keyids)
        (self.served / f"{targets}.targets.json").write_bytes(raw)
        state.snapshot.signed.meta["targets.json"] = describe(targets, raw)
        raw = forged_bytes(state.snapshot, roles["snapshot"].keyids)
        (self.served / f"{snapshot}.snapshot.json").write_bytes(raw)
        state.timestamp.signed.snapshot_meta = describe(snapshot, raw)
        raw = forged_bytes(state.timestamp, roles["timestamp"].keyids)
        (self.served / "timestamp.json").write_bytes(raw)
        self.look()

    @rule(data=st.data(), ahead=st.integers(1, 3), lost=st.booleans())
    def forge_with_stolen_online_keys(self, data: st.DataObject, ahead: int, lost: bool) -> None:
        """A timestamp and a snapshot that name any targets that were ever signed."""
        self.lose_cache(lost)
        state = self.publisher.state()
        targets = [(n, content) for n, content in self.history if n.endswith(".targets.json")]
        name, content = targets[data.draw(st.integers(0, len(targets) - 1))]
        snapshot, timestamp = state.snapshot.signed, state.timestamp.signed
        for signed in (snapshot, timestamp):
            signed.version += ahead
            signed.expires = self.publisher.now + timedelta(days=300)
        snapshot.meta["targets.json"] = describe(int(name.partition(".")[0]), content)
        raw = signed_bytes(Metadata[Snapshot](snapshot), self.publisher.signers_of("snapshot"))
        timestamp.snapshot_meta = describe(snapshot.version, raw)
        (self.served / name).write_bytes(content)
        (self.served / f"{snapshot.version}.snapshot.json").write_bytes(raw)
        (self.served / "timestamp.json").write_bytes(
            signed_bytes(Metadata[Timestamp](timestamp), self.publisher.signers_of("timestamp"))
        )
        self.look()

    def lose_cache(self, lost: bool) -> None:
        if lost:
            self.client.lose_cache()

    def choose_name(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted({name for name, _ in self.history})))

    # The client

    def look(self) -> None:
        before = {role: item.version for role, item in self.client.seen.items()}
        floor = self.client.time_floor
        try:
            report = self.client.verify()
        except EdgedError:
            return
        versions = {status.role: status.version for status in report.roles}
        found = frozenset((item.image.path, item.image.sha256) for item in report.releases)
        assert found == self.honest[versions["targets"]]
        assert not report.rejected
        for role in ("root", "targets"):
            assert versions[role] >= before.get(role, 0)
        assert report.now >= max(self.client.now, floor or self.client.now)
        assert floor is None or report.time_floor >= floor
        assert all(
            status.expires > report.now for status in report.roles if status.role in ("root", "targets")
        )
        assert report.stale_seconds <= GRACE.total_seconds()

    @rule()
    def an_honest_server_is_always_accepted(self) -> None:
        """Refusing everything would be safe as well: after an attack the truth must get through."""
        self.client.now = self.publisher.now
        self.publisher.rotate("timestamp", "snapshot")
        self.publisher.publish()
        self.note()
        for path in self.served.iterdir():
            path.unlink()
        for name, data in self.history:
            (self.served / name).write_bytes(data)
        report = self.client.verify()
        assert report.online
        found = frozenset((item.image.path, item.image.sha256) for item in report.releases)
        assert found == self.honest[max(self.honest)]


TestAttacker = Attacker.TestCase
TestAttacker.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)

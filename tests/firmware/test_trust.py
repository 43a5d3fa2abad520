"""The client refuses what the publisher did not sign, what is old, and what is mixed; and says why."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from trust_kit import DAY, NOW, Client, Publisher, digest, foreign_signer, forge, refs, versions
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, Targets
from tuf.ngclient import Updater
from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher
from web import AUTHORIZATION, Guarded, serving

from edged_firmware.errors import EdgedError, Reason, Refused, Transient
from edged_firmware.repository import Folder, describe, sign_role
from edged_firmware.trust import SeenRole, TrustReport, TrustRequest, verify_in_child
from edged_firmware.trust_client import DurableUpdater, SourceFetcher, base_url, translated


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path).init()
    made.publish("blink@1.0")
    return made


@pytest.fixture
def client(publisher: Publisher, tmp_path: Path) -> Client:
    return Client(tmp_path / "cache", publisher.root, str(publisher.repo))


def refused(client: Client, reason: Reason, **changes: object) -> Refused:
    with pytest.raises(Refused) as refusal:
        client.verify(**changes)
    assert refusal.value.reason is reason, refusal.value
    assert refusal.value.detail
    return refusal.value


def metadata_file(publisher: Publisher, role: str) -> Path:
    state = publisher.state()
    folder = Folder(publisher.repo)
    if role == "timestamp":
        return folder.timestamp
    return folder.role(role, {"snapshot": state.snapshot, "targets": state.targets}[role].signed.version)


# Sources


@pytest.fixture(params=["folder", "file-url", "http"])
def source(request: pytest.FixtureRequest, publisher: Publisher) -> Iterator[str]:
    if request.param == "http":
        with serving(publisher.repo) as url:
            yield url
    else:
        yield str(publisher.repo) if request.param == "folder" else publisher.repo.as_uri()


def test_a_release_is_verified_from_every_source(publisher: Publisher, client: Client, source: str) -> None:
    client.source = source
    report = client.verify()
    assert refs(report) == ["blink@1.0"]
    assert report.online
    assert report.stale_seconds == 0
    assert report.releases[0].image.sha256 == publisher.image("blink@1.0")
    assert versions(report) == {"root": 1, "timestamp": 2, "snapshot": 2, "targets": 2}
    image = publisher.repo / "targets" / report.releases[0].image.url_path
    assert digest(image.read_bytes()) == report.releases[0].image.sha256
    assert (publisher.repo / "targets" / report.releases[0].index.url_path).is_file()
    publisher.publish("blink@1.1")
    assert refs(client.verify()) == ["blink@1.0", "blink@1.1"]
    publisher.rotate("root", "timestamp")
    assert versions(client.verify())["root"] == 3


def test_a_folder_with_a_strange_name_is_a_source(
    publisher: Publisher, client: Client, tmp_path: Path
) -> None:
    strange = tmp_path / "usb stick #1 100% é"
    shutil.copytree(publisher.repo, strange)
    assert refs(client.verify(source=str(strange))) == ["blink@1.0"]
    assert refs(client.verify(source=strange.as_uri() + "/")) == ["blink@1.0"]


def test_request_and_report_survive_json(client: Client) -> None:
    report = client.verify()
    assert TrustReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    request = client.request()
    assert request.time_floor is not None
    assert TrustRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


# Root


@pytest.mark.parametrize("root", [b"", b"{}", b"\xff", b"[]", b'{"signed": {}, "signatures": []}'])
def test_without_a_root_nothing_is_trusted(client: Client, root: bytes) -> None:
    refused(client, Reason.TRUST_MISSING, root=root)


def test_a_root_that_does_not_sign_itself_is_no_root(publisher: Publisher, client: Client) -> None:
    root = json.loads(publisher.root)
    root["signatures"] = root["signatures"][:1]
    refused(client, Reason.TRUST_MISSING, root=json.dumps(root).encode())


def test_another_publisher_is_refused(client: Client, tmp_path: Path) -> None:
    other = Publisher(tmp_path / "other").init()
    other.publish("blink@6.6")
    refused(client, Reason.SIGNATURE_INVALID, source=str(other.repo))


def test_a_chain_of_rotations_is_followed_from_the_first_root(publisher: Publisher, client: Client) -> None:
    client.verify()
    for number in range(1, 4):
        publisher.rotate("root")
        publisher.publish(f"blink@2.{number}")
    assert versions(client.verify())["root"] == 4
    fresh = Client(client.folder.with_name("fresh"), client.root, client.source)
    report = fresh.verify()
    assert versions(report)["root"] == 4
    assert refs(report) == ["blink@1.0", "blink@2.1", "blink@2.2", "blink@2.3"]


def test_a_gap_in_the_chain_ends_it(publisher: Publisher, client: Client) -> None:
    publisher.rotate("root")
    publisher.rotate("root", "timestamp")
    publisher.publish()
    (publisher.repo / "metadata" / "2.root.json").unlink()
    refused(client, Reason.SIGNATURE_INVALID)


@pytest.mark.parametrize("signed_by", ["old", "new"])
def test_a_new_root_needs_both_thresholds(publisher: Publisher, client: Client, signed_by: str) -> None:
    before = dict(publisher.signers)
    old_root = publisher.state().root.signed
    publisher.rotate("root")
    path = publisher.repo / "metadata" / "2.root.json"
    root = Metadata[Root].from_bytes(path.read_bytes())
    mine = {keyid: s for keyid, s in publisher.signers.items() if (keyid in before) == (signed_by == "old")}
    path.write_bytes(sign_role(root, [old_root if signed_by == "old" else root.signed], mine))
    refused(client, Reason.SIGNATURE_INVALID)


def test_a_root_that_was_seen_cannot_be_hidden(publisher: Publisher, client: Client) -> None:
    before = shutil.copytree(publisher.repo, publisher.base / "before")
    publisher.rotate("root")
    client.verify()
    client.lose_cache()
    refused(client, Reason.METADATA_ROLLBACK, source=str(before))


# Signatures and content


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
@pytest.mark.parametrize("where", [0.3, 0.5, 0.7, 0.95])
def test_no_changed_byte_is_accepted(publisher: Publisher, client: Client, role: str, where: float) -> None:
    path = metadata_file(publisher, role)
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(Refused) as refusal:
        client.verify()
    assert refusal.value.reason in (Reason.SIGNATURE_INVALID, Reason.METADATA_INVALID)


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_a_foreign_key_signs_nothing(publisher: Publisher, client: Client, role: str, tmp_path: Path) -> None:
    stranger = [foreign_signer(tmp_path / "foreign")] * 2
    forge(publisher, **{f"{role}_by": stranger})  # type: ignore[arg-type]
    refused(client, Reason.SIGNATURE_INVALID)


def test_one_of_two_signatures_is_too_few(publisher: Publisher, client: Client) -> None:
    forge(publisher, targets_by=publisher.signers_of("targets")[:1])
    refused(client, Reason.SIGNATURE_INVALID)


def test_the_same_signature_twice_counts_once(publisher: Publisher, client: Client) -> None:
    def twice(data: bytes) -> bytes:
        targets = json.loads(data)
        targets["signatures"] *= 2
        return json.dumps(targets).encode()

    forge(publisher, targets_by=publisher.signers_of("targets")[:1], mangle_targets=twice)
    refused(client, Reason.METADATA_INVALID)


def test_the_key_of_one_role_does_not_sign_another(publisher: Publisher, client: Client) -> None:
    forge(publisher, targets_by=publisher.signers_of("timestamp") + publisher.signers_of("snapshot"))
    refused(client, Reason.SIGNATURE_INVALID)


def test_an_honest_forgery_is_accepted_so_the_others_failed_for_their_reason(
    publisher: Publisher, client: Client
) -> None:
    forge(publisher)
    assert versions(client.verify())["targets"] == 3


def test_a_file_of_another_role_is_refused(publisher: Publisher, client: Client) -> None:
    shutil.copy(metadata_file(publisher, "snapshot"), metadata_file(publisher, "timestamp"))
    with pytest.raises(Refused):
        client.verify()


def test_a_new_timestamp_with_an_old_snapshot_is_refused(publisher: Publisher, client: Client) -> None:
    old = metadata_file(publisher, "snapshot").read_bytes()
    publisher.publish("blink@1.1")
    metadata_file(publisher, "snapshot").write_bytes(old)
    refused(client, Reason.METADATA_INVALID)


def test_a_new_snapshot_with_old_targets_is_refused(publisher: Publisher, client: Client) -> None:
    old = metadata_file(publisher, "targets").read_bytes()
    publisher.publish("blink@1.1")
    metadata_file(publisher, "targets").write_bytes(old)
    refused(client, Reason.METADATA_INVALID)


def test_endless_data_is_cut_off(publisher: Publisher, client: Client) -> None:
    metadata_file(publisher, "timestamp").write_bytes(b" " * 20000)
    refused(client, Reason.METADATA_INVALID)


@pytest.mark.parametrize("data", [b"", b"null", b"<html>log in here</html>", b"[" * 9000, b"\xff\xfe"])
def test_what_is_no_metadata_is_refused(publisher: Publisher, client: Client, data: bytes) -> None:
    metadata_file(publisher, "timestamp").write_bytes(data)
    refused(client, Reason.METADATA_INVALID)


def test_a_repository_without_consistent_snapshots_is_refused(publisher: Publisher, client: Client) -> None:
    state = publisher.state()
    old = Root.from_dict(json.loads(publisher.root)["signed"])
    state.root.signed.consistent_snapshot = False
    state.root.signed.version = 2
    folder = Folder(publisher.repo)
    folder.role("root", 2).write_bytes(sign_role(state.root, [old], publisher.signers))
    for role in ("snapshot", "targets"):
        shutil.copy(metadata_file(publisher, role), publisher.repo / "metadata" / f"{role}.json")
    refused(client, Reason.METADATA_INVALID)


# Rollback, fast-forward


def test_an_old_repository_is_refused_by_the_cache(publisher: Publisher, client: Client) -> None:
    before = shutil.copytree(publisher.repo, publisher.base / "before")
    publisher.publish("blink@1.1")
    client.verify()
    refused(client, Reason.METADATA_ROLLBACK, source=str(before), seen={})


@pytest.mark.parametrize("loss", ["removed", "emptied"])
def test_an_old_repository_is_refused_by_the_floors_when_the_cache_is_lost(
    publisher: Publisher, client: Client, loss: str
) -> None:
    before = shutil.copytree(publisher.repo, publisher.base / "before")
    publisher.publish("blink@1.1")
    client.verify()
    if loss == "removed":
        client.lose_cache()
    else:
        for path in client.folder.rglob("*.json"):
            path.write_bytes(b"")
    refused(client, Reason.METADATA_ROLLBACK, source=str(before))
    assert refs(client.verify()) == ["blink@1.0", "blink@1.1"]


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_each_role_has_a_floor_of_its_own(client: Client, role: str) -> None:
    report = client.verify()
    seen = dict(report.seen)
    seen[role] = SeenRole(seen[role].version + 1, seen[role].keyids)
    assert role in refused(client, Reason.METADATA_ROLLBACK, seen=seen).detail


def test_a_snapshot_may_not_forget_targets(publisher: Publisher, client: Client) -> None:
    client.verify()

    def older(targets: Targets, snapshot: object, timestamp: object) -> None:
        targets.version -= 2

    forge(publisher, older)
    refused(client, Reason.METADATA_ROLLBACK)


def test_stolen_online_keys_cannot_bring_back_old_targets_even_with_a_lost_cache(
    publisher: Publisher, client: Client
) -> None:
    old = metadata_file(publisher, "targets").read_bytes()
    publisher.publish("blink@1.1")
    client.verify()
    client.lose_cache()
    forge(
        publisher,
        lambda targets, snapshot, timestamp: snapshot.meta.update({"targets.json": describe(2, old)}),
        describe_targets=False,
    )
    (publisher.repo / "metadata" / "2.targets.json").write_bytes(old)
    assert "targets" in refused(client, Reason.METADATA_ROLLBACK).detail


@pytest.mark.parametrize("lost", [False, True])
def test_after_a_fast_forward_new_keys_let_clients_come_back(
    publisher: Publisher, client: Client, lost: bool
) -> None:
    honest = shutil.copytree(publisher.repo, publisher.base / "honest")

    def far_ahead(targets: object, snapshot: object, timestamp: object) -> None:
        for signed in (snapshot, timestamp):
            signed.version = 10**6  # type: ignore[attr-defined]

    forge(publisher, far_ahead)
    assert versions(client.verify())["timestamp"] == 10**6
    shutil.rmtree(publisher.repo)
    honest.rename(publisher.repo)
    publisher.publish("blink@1.1")
    publisher.publish()
    refused(client, Reason.METADATA_ROLLBACK)
    publisher.rotate("timestamp", "snapshot")
    if lost:
        client.lose_cache()
    report = client.verify()
    assert refs(report) == ["blink@1.0", "blink@1.1"]
    assert report.seen["timestamp"].version == versions(report)["timestamp"] < 100


def test_new_keys_of_targets_do_not_lower_the_floor_of_root(publisher: Publisher, client: Client) -> None:
    client.verify()
    publisher.rotate("root", "targets", "snapshot", "timestamp")
    report = client.verify()
    seen = dict(report.seen)
    seen["root"] = SeenRole(99, ("gone",))
    refused(client, Reason.METADATA_ROLLBACK, seen=seen)


# Expiry, time, grace


def days(report_or_now: datetime, count: float) -> datetime:
    return report_or_now + timedelta(days=count)


def test_an_expired_timestamp_is_refused(client: Client) -> None:
    client.now = days(NOW, 7.01)
    assert "timestamp" in refused(client, Reason.METADATA_EXPIRED).detail


def test_an_expired_snapshot_is_refused(publisher: Publisher, client: Client) -> None:
    def long(targets: object, snapshot: object, timestamp: object) -> None:
        timestamp.expires = days(NOW, 30)  # type: ignore[attr-defined]

    forge(publisher, long)
    client.now = days(NOW, 8)
    assert "snapshot" in refused(client, Reason.METADATA_EXPIRED).detail


def test_expired_targets_are_refused_whatever_the_grace(publisher: Publisher, client: Client) -> None:
    for path in publisher.keys.glob("targets-*.pem"):
        path.unlink()
    publisher.now = days(NOW, 89)
    assert "targets" not in publisher.publish().signed_roles
    client.now = days(NOW, 89)
    client.verify()
    client.now, client.grace = days(NOW, 91), 30 * DAY
    assert "targets" in refused(client, Reason.METADATA_EXPIRED).detail


def test_an_expired_root_is_refused_whatever_the_grace(publisher: Publisher, client: Client) -> None:
    publisher.now = days(NOW, 364)
    publisher.publish()
    client.now = days(NOW, 364)
    client.verify()
    client.now, client.grace = days(NOW, 366), 30 * DAY
    assert "root" in refused(client, Reason.METADATA_EXPIRED).detail
    publisher.now = client.now
    with pytest.raises(Refused, match="renew-root"):
        publisher.publish()
    publisher.rotate()
    publisher.publish()
    assert versions(client.verify())["root"] == 2


@pytest.mark.parametrize("how", ["no source", "nobody listens", "folder gone", "status 500"])
def test_off_line_the_last_good_metadata_holds_within_the_grace(
    publisher: Publisher, client: Client, how: str
) -> None:
    client.verify()
    publisher.publish("blink@1.1")
    client.source = {
        "no source": None,
        "nobody listens": "http://127.0.0.1:9",
        "folder gone": str(publisher.base / "unplugged"),
    }.get(how)
    client.grace = 30 * DAY
    with serving(publisher.repo, _Broken) as url:
        client.source = url if how == "status 500" else client.source
        report = client.verify(now=days(NOW, 3))
        assert (report.offline, report.stale_seconds, refs(report)) == (True, 0.0, ["blink@1.0"])
        report = client.verify(now=days(NOW, 10))
        assert report.offline
        assert report.stale_seconds == 3 * 86400
        assert "timestamp" in refused(client, Reason.METADATA_EXPIRED, now=days(NOW, 37.1)).detail
        assert (
            "timestamp"
            in refused(client, Reason.METADATA_EXPIRED, now=days(NOW, 8), offline_grace_s=0).detail
        )


class _Broken(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500)

    def log_message(self, *args: object) -> None:
        """No lines on standard error."""


def test_a_stale_source_is_marked(client: Client) -> None:
    report = client.verify(now=days(NOW, 8), offline_grace_s=30 * 86400)
    assert report.online
    assert report.stale_seconds == 86400


def test_off_line_without_a_cache_is_to_be_tried_again(client: Client) -> None:
    with pytest.raises(Transient) as error:
        client.verify(source="http://127.0.0.1:9")
    assert error.value.reason is Reason.FETCH_FAILED
    # urllib3 says all there is to say, and tuf's own error around it nothing
    assert error.value.detail.startswith("HTTPConnectionPool(")
    with pytest.raises(Transient, match="no release repository is named: set trust.repository"):
        client.verify(source=None)


def test_off_line_nothing_is_written(client: Client) -> None:
    client.verify()
    before = {path: path.stat().st_mtime_ns for path in client.folder.rglob("*")}
    client.verify(source=None)
    assert {path: path.stat().st_mtime_ns for path in client.folder.rglob("*")} == before


def test_an_unchanged_repository_costs_no_write(client: Client) -> None:
    client.verify()
    before = {path: path.stat().st_ino for path in client.folder.rglob("*") if path.is_file()}
    client.verify()
    assert {path: path.stat().st_ino for path in client.folder.rglob("*") if path.is_file()} == before


def test_a_refresh_that_is_cut_between_two_roles_leaves_the_last_good(
    publisher: Publisher, client: Client
) -> None:
    client.verify()
    publisher.publish("blink@1.1")
    metadata_file(publisher, "snapshot").unlink()
    report = client.verify()
    assert (report.offline, refs(report)) == (True, ["blink@1.0"])
    assert json.loads((client.folder / "timestamp.json").read_bytes())["signed"]["version"] == 3
    assert refs(client.verify(source=None)) == ["blink@1.0"]


def test_off_line_the_floors_hold(client: Client) -> None:
    report = client.verify()
    seen = {**report.seen, "targets": SeenRole(9, report.seen["targets"].keyids)}
    refused(client, Reason.METADATA_ROLLBACK, source=None, seen=seen)


def test_off_line_after_the_keys_were_revoked_nothing_is_trusted(
    publisher: Publisher, client: Client
) -> None:
    client.verify()
    good = (client.folder / "last_good.json").read_bytes()
    publisher.rotate("timestamp")
    client.verify()
    (client.folder / "last_good.json").write_bytes(good)
    with pytest.raises(Transient) as error:
        client.verify(source=None)
    assert error.value.reason is Reason.FETCH_FAILED


# Time


def test_the_clock_may_be_wrong_but_not_before_the_build(publisher: Publisher, client: Client) -> None:
    report = client.verify(now=datetime.fromisoformat("1970-01-01T00:00:00+00:00"))
    assert report.now == NOW
    assert report.time_floor == NOW
    refused(client, Reason.METADATA_EXPIRED, now=NOW - 9999 * DAY, build_time=days(NOW, 8))


def test_a_clock_that_goes_back_does_not_revive_what_expired(publisher: Publisher, client: Client) -> None:
    old = shutil.copytree(publisher.repo, publisher.base / "old")
    publisher.now = days(NOW, 20)
    publisher.publish()
    client.verify(now=NOW)
    assert client.time_floor == days(NOW, 20)
    client.lose_cache()
    refused(client, Reason.METADATA_EXPIRED, source=str(old), now=NOW, seen={})


def test_a_clock_that_jumped_ahead_is_not_kept(client: Client) -> None:
    report = client.verify(now=days(NOW, 6))
    assert (report.now, report.time_floor) == (days(NOW, 6), NOW)


def test_a_signed_time_ahead_of_the_clock_counts_at_once(publisher: Publisher, client: Client) -> None:
    for path in publisher.keys.glob("targets-*.pem"):
        path.unlink()
    publisher.now = days(NOW, 100)
    publisher.publish()
    assert "targets" in refused(client, Reason.METADATA_EXPIRED, now=NOW).detail


@pytest.mark.parametrize("issued", ["tomorrow", 5, None, "2026-03-01T12:00:00", "2036-01-01T00:00:00+00:00"])
def test_a_signed_time_that_is_none_is_refused(publisher: Publisher, client: Client, issued: object) -> None:
    def change(targets: object, snapshot: object, timestamp: object) -> None:
        timestamp.unrecognized_fields["edged_issued"] = issued  # type: ignore[attr-defined]

    forge(publisher, change)
    if issued is None:
        assert client.verify().time_floor == NOW - 30 * DAY
    else:
        refused(client, Reason.METADATA_INVALID)


# The cache


CACHE = [
    "timestamp.json",
    "snapshot.json",
    "targets.json",
    "root.json",
    "root_history/1.root.json",
    "last_good.json",
]


@pytest.mark.parametrize("name", CACHE)
@pytest.mark.parametrize("damage", ["empty", "half", "garbage", "gone", "folder"])
def test_a_damaged_cache_is_no_cache(publisher: Publisher, client: Client, name: str, damage: str) -> None:
    client.verify()
    publisher.rotate("root")
    publisher.publish("blink@1.1")
    path = client.folder / name
    data = path.read_bytes()
    path.unlink()
    if damage == "folder" and name in ("timestamp.json", "snapshot.json", "targets.json"):
        path.mkdir()
        with pytest.raises(Transient):
            client.verify()
        path.rmdir()
    elif damage in ("empty", "half", "garbage"):
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "garbage": b"\0" * 512}[damage])
    assert refs(client.verify()) == ["blink@1.0", "blink@1.1"]
    assert refs(client.verify(source=None)) == ["blink@1.0", "blink@1.1"]


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[]", b"nonsense", b'{"timestamp": 1, "snapshot": 2, "targets": 3}']
)
def test_off_line_with_damaged_last_good_metadata_is_to_be_tried_again(client: Client, damage: bytes) -> None:
    client.verify()
    (client.folder / "last_good.json").write_bytes(damage)
    with pytest.raises(Transient) as error:
        client.verify(source=None)
    assert error.value.reason is Reason.FETCH_FAILED


def test_two_runs_on_one_cache_come_one_after_another(publisher: Publisher, client: Client) -> None:
    reports: list[TrustReport] = []
    threads = [threading.Thread(target=lambda: reports.append(client.verify())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 6
    assert len({str(refs(report)) for report in reports}) == 1


def test_a_cache_that_cannot_be_written_is_transient(
    publisher: Publisher, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Transient) as error:
        client.verify(metadata_dir=tmp_path / "file" / "cache")
    assert error.value.reason is Reason.STORAGE_FAILED


# Facts


def test_bad_facts_are_set_apart_and_the_others_still_work(publisher: Publisher, client: Client) -> None:
    publisher.add("good@1.0")
    publisher.publish("moved@1.0", "noindex@1.0", "counter@1.0", "later@1.0", "nothing@1.0")

    def spoil(targets: Targets, snapshot: object, timestamp: object) -> None:
        def custom(name: str) -> dict[str, object]:
            found: dict[str, object] = targets.targets[f"{name}/1.0/image"].unrecognized_fields["custom"][
                "edged"
            ]
            return found

        custom("moved")["name"] = "good"
        custom("noindex")["chunk_index"] = "noindex/1.0/none"
        custom("counter")["release_counter"] = 0
        custom("later")["facts_version"] = 2
        targets.targets["nothing/1.0/image"].unrecognized_fields["custom"] = ["not", "an", "object"]

    forge(publisher, spoil)
    report = client.verify()
    assert refs(report) == ["blink@1.0", "good@1.0"]
    assert {item.path: item.reason for item in report.rejected} == {
        "moved/1.0/image": Reason.FACTS_INVALID,
        "noindex/1.0/image": Reason.INDEX_MISMATCH,
        "counter/1.0/image": Reason.FACTS_INVALID,
        "later/1.0/image": Reason.FACTS_INVALID,
    }


def test_a_withdrawn_release_is_gone(publisher: Publisher, client: Client) -> None:
    from edged_firmware import release
    from edged_firmware.facts import ReleaseRef

    publisher.publish("blink@1.1")
    client.verify()
    release.remove(publisher.repo, ReleaseRef("blink", "1.1"))
    publisher.publish()
    assert refs(client.verify()) == ["blink@1.0"]


# Delegations


def test_a_role_that_two_parents_delegate_is_refused(publisher: Publisher, client: Client) -> None:
    folder = Folder(publisher.repo)
    signer = publisher.signers_of("targets")[0]
    key = signer.public_key

    def to(*names: str) -> Delegations:
        roles = {name: DelegatedRole(name, [key.keyid], 1, False, paths=["*/*"]) for name in names}
        return Delegations({key.keyid: key}, roles)

    def delegate(targets: Targets, snapshot: object, timestamp: object) -> None:
        targets.delegations = to("left", "right")
        for name, below in (("left", ["shared"]), ("right", ["shared"]), ("shared", [])):
            role = Targets(expires=days(NOW, 9))
            role.delegations = to(*below) if below else None
            data = sign_delegated(Metadata(role), signer)
            folder.role(name, 1).write_bytes(data)
            snapshot.meta[f"{name}.json"] = describe(1, data)  # type: ignore[attr-defined]

    forge(publisher, delegate)
    client.folder.mkdir()
    updater = DurableUpdater(
        client.folder,
        base_url(str(publisher.repo), "metadata"),
        SourceFetcher(2.0),
        root=client.root,
        now=NOW,
    )
    with pytest.raises(Refused) as refusal, translated():
        updater.get_targetinfo("a/b")
        updater._load_targets("shared", "left")
        updater._load_targets("shared", "right")
    assert refusal.value.reason is Reason.METADATA_INVALID
    assert "delegated by both" in refusal.value.detail


def sign_delegated(metadata: Metadata[Targets], signer: object) -> bytes:
    metadata.sign(signer)  # type: ignore[arg-type]
    return metadata.to_bytes()


def test_the_private_members_of_tuf_that_are_used_are_there(publisher: Publisher, tmp_path: Path) -> None:
    updater = Updater(str(tmp_path), "http://127.0.0.1:9", bootstrap=publisher.root)
    assert isinstance(updater._trusted_set.reference_time, datetime)
    for name in (
        "_persist_file",
        "_persist_root",
        "_update_root_symlink",
        "_load_local_metadata",
        "_download_metadata",
        "_load_targets",
    ):
        assert callable(getattr(updater, name)), name
    assert Urllib3Fetcher()._proxy_env._kw_args["headers"].keys() == {"User-Agent"}


def test_a_guarded_repository_is_sent_the_credential_and_nobody_is_shown_it(
    publisher: Publisher, client: Client
) -> None:
    with serving(publisher.repo, Guarded) as client.source:
        report = asyncio.run(verify_in_child(client.request(authorization=AUTHORIZATION)))
        assert report.online
        client.lose_cache()
        with pytest.raises(Transient) as failure:
            client.verify(authorization="Bearer wrong")
    assert "401" in failure.value.detail
    assert "wrong" not in failure.value.detail
    assert "wrong" not in repr(client.request(authorization="Bearer wrong"))


# Servers


class _Slow(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"{")
        self.wfile.flush()
        time.sleep(1.0)

    def log_message(self, *args: object) -> None:
        """No lines on standard error."""


class _Short(_Slow):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"{")


@pytest.mark.parametrize("handler", [_Slow, _Short])
def test_a_server_that_stops_in_the_middle_is_to_be_tried_again(
    client: Client, handler: type[SimpleHTTPRequestHandler]
) -> None:
    with serving(client.folder.parent, handler) as url, pytest.raises(Transient) as error:
        client.verify(source=url, socket_timeout_s=0.3)
    assert error.value.reason is Reason.FETCH_FAILED


def test_an_error_keeps_its_cause(client: Client) -> None:
    with pytest.raises(EdgedError) as error:
        client.verify(now=days(NOW, 8))
    assert error.value.__cause__ is not None


def test_importing_trust_does_not_load_tuf() -> None:
    code = (
        "import sys, edged_firmware.trust\n"
        "heavy = ('tuf', 'securesystemslib', 'cryptography', 'urllib3')\n"
        "sys.exit(any(name.split('.')[0] in heavy for name in sys.modules))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0

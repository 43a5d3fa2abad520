"""The publisher's side: what is signed, what is refused, and what a power cut leaves."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from trust_kit import DAY, NOW, Client, Publisher, digest, foreign_signer, forge, refs, versions
from tuf.api.metadata import Metadata, Root

from edged_firmware import release
from edged_firmware.chunks import ChunkIndex
from edged_firmware.durable import write_durably
from edged_firmware.errors import EdgedError, Permanent, Reason, Refused
from edged_firmware.facts import ReleaseRef, Requirement
from edged_firmware.release import DEFAULT_KEYS, RoleKeys
from edged_firmware.repository import Folder, sign_role


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path).init()


def client_of(publisher: Publisher, name: str = "cache", **options: object) -> Client:
    return Client(publisher.base / name, publisher.root, str(publisher.repo), now=publisher.now, **options)


def fails(reason: Reason, action: Callable[[], object], kind: type[EdgedError] = Refused) -> str:
    with pytest.raises(kind) as error:
        action()
    assert error.value.reason is reason, error.value
    return error.value.detail


# init


def test_a_new_repository_is_valid_and_empty(publisher: Publisher) -> None:
    report = client_of(publisher).verify()
    assert versions(report) == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}
    assert report.releases == ()
    root = Metadata[Root].from_bytes(publisher.root).signed
    assert {name: (len(role.keyids), role.threshold) for name, role in root.roles.items()} == {
        name: (want.keys, want.threshold) for name, want in DEFAULT_KEYS.items()
    }
    assert len(root.keys) == 7
    assert (root.expires - NOW).days == 365


def test_private_keys_are_for_their_owner_only(publisher: Publisher) -> None:
    keys = list(publisher.keys.glob("*.pem"))
    assert len(keys) == 7
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE(publisher.keys.stat().st_mode) == 0o700
    served = b"".join(path.read_bytes() for path in publisher.repo.rglob("*") if path.is_file())
    assert b"PRIVATE" not in served


def test_keys_with_a_password_need_it(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path).init(password=b"secret")
    assert all(b"ENCRYPTED" in path.read_bytes() for path in publisher.keys.glob("*.pem"))
    fails(Reason.TRUST_MISSING, publisher.publish)
    fails(Reason.TRUST_MISSING, lambda: publisher.publish(password=b"wrong"))
    assert publisher.publish(password=b"secret").versions["timestamp"] == 2


def test_init_refuses_what_would_harm(publisher: Publisher, tmp_path: Path) -> None:
    fails(Reason.CONFIG_INVALID, publisher.init, Permanent)
    other = tmp_path / "other"
    fails(Reason.CONFIG_INVALID, lambda: release.init(other, other / "keys", NOW), Permanent)
    few = {**DEFAULT_KEYS, "root": RoleKeys(1, 2)}
    fails(Reason.CONFIG_INVALID, lambda: release.init(other, tmp_path / "k", NOW, role_keys=few), Permanent)
    assert not other.exists()


# add


def test_an_added_file_is_served_only_after_it_is_signed(publisher: Publisher) -> None:
    before = {path: path.read_bytes() for path in (publisher.repo / "metadata").iterdir()}
    listed = publisher.add(
        "blink@1.0",
        b"vendor's file",
        hardware_ids=("1e950f",),
        requires=(Requirement("radio", 2),),
        protocol="stk500v1",
        params={"baud": 115200},
        identifies_as="v1",
    )
    assert (listed.status, listed.release_counter, listed.sha256) == ("staged", 1, digest(b"vendor's file"))
    assert {path: path.read_bytes() for path in (publisher.repo / "metadata").iterdir()} == before
    client = client_of(publisher)
    assert refs(client.verify()) == []
    done = publisher.publish()
    assert done.added == (ReleaseRef("blink", "1.0"),)
    (found,) = client.verify().releases
    assert found.facts.requires == (Requirement("radio", 2),)
    assert (found.facts.flash.protocol, found.facts.flash.params) == ("stk500v1", {"baud": 115200})
    assert (found.facts.identifies_as, found.facts.format) == ("v1", "opaque")
    assert found.facts.source_sha256 == found.image.sha256
    assert not list((publisher.repo / ".staged").iterdir())


@pytest.mark.parametrize(("size", "chunk"), [(1, 4096), (5000, 4096), (1 << 20, 65536)])
def test_the_index_covers_the_image(publisher: Publisher, size: int, chunk: int) -> None:
    content = os.urandom(size)
    publisher.add("blink@1.0", content)
    publisher.publish()
    (found,) = client_of(publisher).verify().releases
    data = (publisher.repo / "targets" / found.index.url_path).read_bytes()
    assert (len(data), digest(data)) == (found.index.length, found.index.sha256)
    assert ChunkIndex.decode(data) == ChunkIndex.build(content, chunk)


def test_an_empty_file_is_no_image(publisher: Publisher) -> None:
    fails(Reason.IMAGE_INVALID, lambda: publisher.add("blink@1.0", b""))


def test_the_same_again_is_the_same(publisher: Publisher) -> None:
    publisher.add("blink@1.0", b"one")
    assert publisher.add("blink@1.0", b"one").status == "staged"
    publisher.publish()
    assert publisher.add("blink@1.0", b"one").status == "published"
    assert not list((publisher.repo / ".staged").iterdir())
    assert publisher.publish().added == ()


@pytest.mark.parametrize("published", [False, True])
def test_a_version_never_gets_other_content(publisher: Publisher, published: bool) -> None:
    publisher.add("blink@1.0", b"one")
    if published:
        publisher.publish()
    assert "another version" in fails(Reason.FACTS_INVALID, lambda: publisher.add("blink@1.0", b"two"))
    fails(Reason.FACTS_INVALID, lambda: publisher.add("blink@1.0", b"one", models=("nano",)))


def test_counters_go_up_by_model(publisher: Publisher) -> None:
    assert publisher.add("blink@1.0").release_counter == 1
    assert publisher.add("blink@1.1").release_counter == 2
    publisher.publish()
    assert publisher.add("other@1.0", models=("nano",)).release_counter == 1
    assert publisher.add("both@1.0", models=("nano", "uno")).release_counter == 3
    assert publisher.add("same@1.0", release_counter=3).release_counter == 3
    fails(Reason.COUNTER_LOWER, lambda: publisher.add("low@1.0", release_counter=2))
    assert publisher.add("low@1.0", release_counter=2, allow_lower_counter=True).release_counter == 2


def test_facts_are_checked_before_anything_is_written(publisher: Publisher) -> None:
    for facts in ({"models": ()}, {"models": ("a b",)}, {"identifies_as": "\n"}, {"params": {"x": 1.5}}):
        fails(Reason.FACTS_INVALID, lambda facts=facts: publisher.add("blink@1.0", **facts))
    assert not (publisher.repo / "targets").exists()
    draft = release.Draft("blink", "1.0", ("uno",), format="opaque")
    fails(
        Reason.CONFIG_INVALID,
        lambda: release.add(publisher.repo, publisher.base / "none.hex", draft),
        Permanent,
    )
    fails(Reason.TRUST_MISSING, lambda: release.add(publisher.base / "nowhere", publisher.base / "x", draft))


# remove, list


def test_a_staged_release_is_undone(publisher: Publisher) -> None:
    publisher.add("blink@1.0", b"one")
    ref = ReleaseRef("blink", "1.0")
    assert release.remove(publisher.repo, ref) is None
    assert release.list_releases(publisher.repo) == ()
    assert not list((publisher.repo / "targets").rglob("*.image"))
    assert publisher.add("blink@1.0", b"two").release_counter == 1
    fails(Reason.RELEASE_UNKNOWN, lambda: release.remove(publisher.repo, ReleaseRef("blink", "9")))


def test_a_withdrawn_release_is_not_forgotten(publisher: Publisher) -> None:
    publisher.add("blink@1.0", b"one")
    publisher.publish()
    assert release.remove(publisher.repo, ReleaseRef("blink", "1.0")) == "withdrawing"
    assert [line.status for line in release.list_releases(publisher.repo)] == ["withdrawing"]
    assert publisher.publish().withdrawn == (ReleaseRef("blink", "1.0"),)
    assert release.list_releases(publisher.repo) == ()
    assert not list((publisher.repo / "targets").rglob("*.image"))
    assert refs(client_of(publisher).verify()) == []
    fails(Reason.FACTS_INVALID, lambda: publisher.add("blink@1.0", b"two"))
    assert publisher.add("blink@1.1", b"two").release_counter == 2


def test_a_removal_is_undone_by_adding_again(publisher: Publisher) -> None:
    publisher.add("blink@1.0", b"one")
    publisher.publish()
    release.remove(publisher.repo, ReleaseRef("blink", "1.0"))
    publisher.add("blink@1.0", b"one")
    assert publisher.publish().withdrawn == ()
    assert refs(client_of(publisher).verify()) == ["blink@1.0"]


def test_releases_are_listed_by_name_and_version(publisher: Publisher) -> None:
    publisher.publish("b@1", "a@2")
    publisher.add("a@1")
    assert [(str(line.ref), line.status) for line in release.list_releases(publisher.repo)] == [
        ("a@1", "staged"),
        ("a@2", "published"),
        ("b@1", "published"),
    ]
    assert json.dumps([line.to_json() for line in release.list_releases(publisher.repo)])


# publish


def test_publish_renews_what_expires(publisher: Publisher) -> None:
    publisher.publish("blink@1.0")
    publisher.now = NOW + 5 * DAY
    done = publisher.publish()
    assert done.signed_roles == ("targets", "snapshot", "timestamp")
    assert done.versions == {"root": 1, "targets": 3, "snapshot": 3, "timestamp": 3}
    left = {role: done.expires[role] - publisher.now for role in ("targets", "snapshot", "timestamp")}
    assert left == {"targets": 90 * DAY, "snapshot": 7 * DAY, "timestamp": 7 * DAY}
    assert json.dumps(done.to_json())
    assert refs(client_of(publisher).verify()) == ["blink@1.0"]


def test_a_machine_with_online_keys_only_keeps_a_repository_fresh(publisher: Publisher) -> None:
    publisher.publish("blink@1.0")
    for path in (*publisher.keys.glob("targets-*.pem"), *publisher.keys.glob("root-*.pem")):
        path.unlink()
    publisher.now = NOW + 6 * DAY
    assert publisher.publish().signed_roles == ("snapshot", "timestamp")
    assert refs(client_of(publisher).verify()) == ["blink@1.0"]
    publisher.add("blink@1.1")
    assert "targets needs 2" in fails(Reason.TRUST_MISSING, publisher.publish)
    assert refs(client_of(publisher).verify()) == ["blink@1.0"]


def test_keys_may_lie_in_several_folders(publisher: Publisher) -> None:
    publisher.add("blink@1.0")
    stick = publisher.base / "stick"
    stick.mkdir()
    moved = next(publisher.keys.glob("targets-*.pem"))
    moved.rename(stick / moved.name)
    fails(Reason.TRUST_MISSING, publisher.publish)
    done = release.publish(publisher.repo, [publisher.keys, stick], publisher.now)
    assert done.added == (ReleaseRef("blink", "1.0"),)


def test_without_the_trusted_root_nothing_is_signed(publisher: Publisher) -> None:
    (publisher.keys / "trusted-root.json").unlink()
    fails(Reason.TRUST_MISSING, publisher.publish)


def test_a_key_file_that_is_none_is_refused(publisher: Publisher) -> None:
    (publisher.keys / "other.pem").write_bytes(b"-----BEGIN NOTHING-----")
    assert "other.pem" in fails(Reason.TRUST_MISSING, publisher.publish)


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_what_others_wrote_into_the_folder_is_not_signed(publisher: Publisher, role: str) -> None:
    stranger = [foreign_signer(publisher.base / "foreign")] * 2
    forge(publisher, **{f"{role}_by": stranger})  # type: ignore[arg-type]
    fails(Reason.SIGNATURE_INVALID, publisher.publish)


def test_a_root_that_others_wrote_is_not_followed(publisher: Publisher) -> None:
    """With it an attacker would have his targets signed with the publisher's keys."""
    stranger = foreign_signer(publisher.base / "foreign")
    root = publisher.state().root
    root.signed.version = 2
    root.signed.add_key(stranger.public_key, "targets")
    root.signed.roles["targets"].threshold = 1
    own = {stranger.public_key.keyid: stranger}
    root.signed.add_key(stranger.public_key, "root")
    root.signed.roles["root"].threshold = 1
    Folder(publisher.repo).role("root", 2).write_bytes(sign_role(root, [root.signed], own))
    fails(Reason.SIGNATURE_INVALID, publisher.publish)


def test_a_root_that_does_not_sign_itself_is_not_followed(publisher: Publisher) -> None:
    old = publisher.state().root.signed
    signers = publisher.signers
    publisher.rotate("root")
    path = Folder(publisher.repo).role("root", 2)
    path.write_bytes(sign_role(Metadata[Root].from_bytes(path.read_bytes()), [old], signers))
    (publisher.keys / "trusted-root.json").write_bytes(publisher.root)
    fails(Reason.SIGNATURE_INVALID, publisher.publish)


def test_a_staged_file_that_changed_is_not_signed(publisher: Publisher) -> None:
    listed = publisher.add("blink@1.0")
    (image,) = (publisher.repo / "targets").rglob("*.image")
    assert image.name == f"{listed.sha256}.image"
    image.write_bytes(b"other")
    fails(Reason.HASH_MISMATCH, publisher.publish)
    image.unlink()
    fails(Reason.CONFIG_INVALID, publisher.publish, Permanent)


# root


def test_a_root_is_renewed_with_its_own_keys(publisher: Publisher) -> None:
    publisher.now = NOW + 300 * DAY
    done = publisher.rotate()
    assert (done.versions["root"], done.signed_roles) == (2, ("root",))
    assert done.expires["root"] == publisher.now + 365 * DAY


def test_an_unknown_role_is_no_role(publisher: Publisher) -> None:
    fails(Reason.CONFIG_INVALID, lambda: publisher.rotate("mirror"), Permanent)
    assert len(list(publisher.keys.glob("*.pem"))) == 7


def test_rotation_without_the_old_keys_makes_no_new_ones(publisher: Publisher) -> None:
    for path in list(publisher.keys.glob("root-*.pem"))[:2]:
        path.unlink()
    fails(Reason.TRUST_MISSING, lambda: publisher.rotate("root"))
    fails(Reason.TRUST_MISSING, lambda: publisher.rotate("timestamp"))
    assert len(list(publisher.keys.glob("*.pem"))) == 5


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_after_a_rotation_the_old_keys_sign_nothing(publisher: Publisher, role: str) -> None:
    publisher.publish("blink@1.0")
    client = client_of(publisher)
    client.verify()
    old = publisher.signers_of(role)
    old_ids = {signer.public_key.keyid for signer in old}
    publisher.rotate(role)
    assert refs(client.verify()) == ["blink@1.0"]
    assert old_ids.isdisjoint(publisher.state().root.signed.roles[role].keyids)
    assert len(publisher.state().root.signed.keys) == 7
    if role != "root":
        forge(publisher, **{f"{role}_by": old})  # type: ignore[arg-type]
        with pytest.raises(Refused) as refusal:
            client.verify()
        assert refusal.value.reason is Reason.SIGNATURE_INVALID


# Power cuts


class PowerCutError(Exception):
    """The line is dead."""


class CuttingWriter:
    """Writes durably until the write number ``at``, and cuts before, after or in the middle of it."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.count = at, how, 0

    def __call__(self, path: Path, data: bytes) -> None:
        self.count += 1
        if self.count != self.at:
            write_durably(path, data)
            return
        if self.how == "after":
            write_durably(path, data)
        if self.how == "torn":
            path.with_name(f".{path.name}.tmp").write_bytes(data[: len(data) // 2])
        raise PowerCutError


def publish_one(publisher: Publisher) -> object:
    return publisher.publish()


def publish_a_withdrawal(publisher: Publisher) -> object:
    ref = ReleaseRef("blink", "1.0")
    if any(line.ref == ref for line in release.list_releases(publisher.repo)):
        release.remove(publisher.repo, ref, write=publisher.write)
    return publisher.publish()


def rotate_everything(publisher: Publisher) -> object:
    return publisher.rotate("root", "targets", "snapshot", "timestamp")


def renew_only(publisher: Publisher) -> object:
    publisher.now = NOW + 5 * DAY
    return publisher.publish()


#: The action, how often it writes, and which sets of releases a client may see during and after it.
ACTIONS = {
    "publish": (publish_one, 3, [["blink@1.0"], ["blink@1.0", "blink@1.1"]]),
    "withdraw": (publish_a_withdrawal, 4, [["blink@1.0"], ["blink@1.0", "blink@1.1"], ["blink@1.1"]]),
    "rotate": (rotate_everything, 5, [["blink@1.0"]]),
    "renew": (renew_only, 3, [["blink@1.0"], ["blink@1.0", "blink@1.1"]]),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one release published and one staged, and a client that knows it."""
    publisher = Publisher(tmp_path_factory.mktemp("template")).init()
    publisher.publish("blink@1.0")
    publisher.add("blink@1.1")
    client_of(publisher).verify()
    return publisher.base


@pytest.mark.parametrize("name", ACTIONS)
def test_no_cut_leaves_a_client_without_a_valid_state(name: str, template: Path, tmp_path: Path) -> None:
    action, writes, allowed = ACTIONS[name]
    seen = client_of(Publisher(template)).verify().seen
    for at in range(1, writes + 1):
        for how in ("before", "torn", "after"):
            publisher = Publisher(shutil.copytree(template, tmp_path / f"{at}-{how}"))
            publisher.write = CuttingWriter(at, how)
            with pytest.raises(PowerCutError):
                action(publisher)
            known = client_of(publisher, seen=seen)
            assert refs(known.verify()) in allowed
            assert refs(client_of(publisher, "fresh").verify()) in allowed
            publisher.write = write_durably
            action(publisher)
            publisher.publish()
            assert refs(known.verify()) == (
                ["blink@1.1"] if name == "withdraw" else ["blink@1.0", "blink@1.1"]
            )
            assert not list((publisher.repo / ".staged").glob("*.json"))
            kept = [line.sha256 for line in release.list_releases(publisher.repo)]
            images = [path.stem for path in (publisher.repo / "targets").rglob("*.image")]
            assert sorted(images) == sorted(kept)


@pytest.mark.parametrize("name", ACTIONS)
def test_the_sweep_covers_every_write(name: str, template: Path, tmp_path: Path) -> None:
    action, writes, _ = ACTIONS[name]
    counter = CuttingWriter(0, "none")
    action(Publisher(shutil.copytree(template, tmp_path / "copy"), write=counter))
    assert counter.count == writes


def test_every_state_between_two_writes_of_add_is_harmless(template: Path, tmp_path: Path) -> None:
    for at in range(1, 4):
        for how in ("before", "torn", "after"):
            publisher = Publisher(shutil.copytree(template, tmp_path / f"{at}-{how}"))
            publisher.write = CuttingWriter(at, how)
            with pytest.raises(PowerCutError):
                publisher.add("blink@1.2")
            assert refs(client_of(publisher, "fresh").verify()) == ["blink@1.0"]
            publisher.write = write_durably
            publisher.add("blink@1.2")
            publisher.publish()
            assert refs(client_of(publisher).verify()) == ["blink@1.0", "blink@1.1", "blink@1.2"]


def test_an_init_that_was_cut_is_done_again(tmp_path: Path) -> None:
    for at in range(1, 5):
        publisher = Publisher(tmp_path / str(at), write=CuttingWriter(at, "before"))
        with pytest.raises(PowerCutError):
            publisher.init()
        publisher.write = write_durably
        publisher.init().publish("blink@1.0")
        assert refs(client_of(publisher).verify()) == ["blink@1.0"]


def test_a_client_that_reads_while_it_is_published_sees_old_or_new(template: Path, tmp_path: Path) -> None:
    publisher = Publisher(shutil.copytree(template, tmp_path / "copy"))
    client = client_of(publisher)
    found: list[list[str]] = []

    def write_and_look(path: Path, data: bytes) -> None:
        write_durably(path, data)
        found.append(refs(client.verify()))

    publisher.write = write_and_look
    publisher.publish()
    assert found == [["blink@1.0"], ["blink@1.0"], ["blink@1.0", "blink@1.1"]]


def test_expiry_is_the_publishers_choice(tmp_path: Path) -> None:
    week = {**release.DEFAULT_EXPIRY, "targets": timedelta(days=2)}
    publisher = Publisher(tmp_path).init(expiry=week)
    client = client_of(publisher)
    client.now = NOW + 3 * DAY
    fails(Reason.METADATA_EXPIRED, client.verify)
    assert replace(client.request(), now=NOW).now == NOW

"""What is taken away from a node before it is deleted: the audit trail, and all that makes it this node."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_kit import Place
from engine_kit import Publisher, published


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return published(tmp_path_factory.mktemp("publisher"))


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory, publisher: Publisher) -> Place:
    """A node that updated a device, and is off."""
    place = Place(tmp_path_factory.mktemp("node"), publisher).write()
    with place.daemon():
        assert place.run("deploy", "app@2.0.0", "--to", "one", "--wait").code == 0
        assert place.run("audit", "verify").code == 0
    return place


@pytest.fixture
def exported(used: Place, tmp_path: Path) -> Path:
    file = tmp_path / "trail.jsonl"
    answer = used.run("audit", "export", str(file))
    assert answer.code == 0, answer.err
    assert f"check it with: edged audit verify --file {file}" in answer.out
    return file


def test_an_exported_trail_is_whole_and_checked_without_the_node(
    used: Place, exported: Path, tmp_path: Path
) -> None:
    inside = used.run("audit", "verify", "--offline", "--json").json
    assert inside["rows"] > 5
    assert inside["signed_heads"] > 0
    elsewhere = Place(tmp_path / "elsewhere")
    found = elsewhere.run("audit", "verify", "--file", str(exported), "--json")
    assert (found.code, found.json) == (0, inside)
    with_key = elsewhere.run("audit", "verify", "--file", str(exported), "--key", inside["key"])
    assert with_key.out.startswith(f"Intact: {inside['rows']} rows; ")
    assert stat.S_IMODE(exported.stat().st_mode) == 0o600


def test_a_living_node_is_exported_as_well(tmp_path: Path, publisher: Publisher) -> None:
    place, file = Place(tmp_path, publisher).write(), tmp_path / "trail.jsonl"
    with place.daemon():
        assert place.run("deploy", "app@2.0.0", "--to", "one", "--wait").code == 0
        rows = place.run("audit", "export", str(file), "--json").json["rows"]
        assert place.run("audit", "verify", "--json").json["rows"] >= rows > 5
    assert place.run("audit", "verify", "--file", str(file)).code == 0


def change_a_row(lines: list[str]) -> None:
    row = json.loads(lines[3])
    lines[3] = json.dumps(row | {"actor": "nobody"})


def lose_a_row(lines: list[str]) -> None:
    del lines[3]


def lose_the_tail(lines: list[str]) -> None:
    kept = [line for line in lines if "signed_head" not in line]
    lines[:] = kept[:-1]


def lose_the_signed_rows(lines: list[str]) -> None:
    lines[:] = [lines[0], *(line for line in lines if "signed_head" in line)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_a_row, "NOT INTACT at row 3: row 3 is not what was written"),
        (lose_a_row, "NOT INTACT at row 3: row 3 is missing"),
        (lose_the_tail, "the file says "),
        (lose_the_signed_rows, "NOT INTACT at row 1: the rows after 0 are missing: the head "),
    ],
)
def test_a_changed_export_is_found(
    used: Place, exported: Path, change: Callable[[list[str]], None], says: str
) -> None:
    lines = exported.read_text().splitlines()
    change(lines)
    exported.write_text("\n".join(lines))
    answer = used.run("audit", "verify", "--file", str(exported))
    assert answer.code == 1
    assert says in answer.err


def test_an_export_of_another_node_is_told_by_its_key(used: Place, exported: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    other = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    answer = used.run("audit", "verify", "--file", str(exported), "--key", other)
    assert answer.code == 1
    assert "is not this node's" in answer.err


@pytest.mark.parametrize(
    ("words", "text", "code", "says"),
    [
        ([], "no json", 1, "is not a file of `edged audit export`"),
        ([], "", 1, "is not a file of `edged audit export`"),
        ([], '{"edged_audit_export": 2}\n', 1, "format 2 is not known"),
        ([], '{"edged_audit_export": 1, "key": null, "rows": 1}\n{"seq": 1}\n', 1, "is not a file of"),
        (["--key", "abc"], '{"edged_audit_export": 1, "rows": 0}\n', 2, "is no public key"),
    ],
)
def test_what_is_no_export_is_said(
    used: Place, tmp_path: Path, words: list[str], text: str, code: int, says: str
) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    answer = used.run("audit", "verify", "--file", str(file), *words)
    assert answer.code == code
    assert says in answer.err


def test_nothing_is_written_over(used: Place, tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("my thesis")
    for words in (["audit", "export", str(file)], ["doctor", "--backup", str(file)]):
        answer = used.run(*words)
        assert answer.code == 2
        assert "is there already" in answer.err
    assert file.read_text() == "my thesis"


def test_a_key_without_a_file_is_a_usage_error(used: Place) -> None:
    answer = used.run("audit", "verify", "--key", "00")
    assert answer.code == 2
    assert "--key goes with --file" in answer.err


def test_a_node_comes_back_from_its_backup(used: Place, publisher: Publisher, tmp_path: Path) -> None:
    (used.base / "credentials").mkdir(exist_ok=True)
    (used.base / "credentials" / "repository").write_text("Bearer abc")
    file = tmp_path / "node.tar"
    answer = used.run("doctor", "--backup", str(file), "--json")
    assert answer.code == 0, answer.err
    assert answer.json["members"] == [
        "state/edged.db",
        "state/node-key.pem",
        "config/edged.toml",
        "config/credentials/repository",
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = Place(tmp_path / "again", publisher).write()
    again.state.mkdir()
    subprocess.run(
        ["tar", "-C", str(again.state), "-xf", str(file), "--strip-components=1", "state"], check=True
    )
    with again.daemon():
        assert again.run("audit", "verify").code == 0
        assert again.client.get("devices", "one")["floor"] == used_floor(used)
        assert again.run("deploy", "app@1.0.0", "--to", "one", "--wait").code == 3
    before = used.run("audit", "verify", "--offline", "--json").json
    after = again.run("audit", "verify", "--offline", "--json").json
    assert after["key"] == before["key"]
    assert after["rows"] > before["rows"]


def used_floor(place: Place) -> object:
    with place.daemon():
        return place.client.get("devices", "one")["floor"]


def test_a_backup_of_a_living_node_says_what_is_in_it(tmp_path: Path, publisher: Publisher) -> None:
    place, file = Place(tmp_path, publisher).write(), tmp_path / "node.tar"
    with place.daemon():
        answer = place.run("doctor", "--backup", str(file))
        assert answer.code == 0, answer.err
    assert "state/edged.db" in answer.out
    assert "whoever has it can sign as this node" in answer.out


def make_link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "says"), [(make_link, "it is a link"), (make_pipe, "is not a regular file")]
)
def test_a_backup_follows_no_link_of_the_daemons(
    tmp_path: Path, publisher: Publisher, make: Callable[[Path], None], says: str
) -> None:
    """Root makes it, in a folder that the daemon writes to."""
    place = Place(tmp_path, publisher).write()
    with place.daemon():
        pass
    (place.state / "node-key.pem").unlink()
    make(place.state / "node-key.pem")
    answer = place.run("doctor", "--backup", str(tmp_path / "node.tar"))
    assert answer.code == 1
    assert says in answer.err
    assert not (tmp_path / "node.tar").exists()


@pytest.mark.parametrize("words", [["doctor", "--backup"], ["audit", "export"]])
def test_a_node_without_a_state_has_nothing_to_keep(tmp_path: Path, words: list[str]) -> None:
    answer = Place(tmp_path, extra="").write().run(*words, str(tmp_path / "file"))
    assert answer.code == 1
    assert "edged.db: unable to open database file" in answer.err
    assert not (tmp_path / "file").exists()


def test_a_damaged_database_is_not_taken_for_a_backup(tmp_path: Path, publisher: Publisher) -> None:
    place = Place(tmp_path, publisher).write()
    with place.daemon():
        pass
    data = bytearray((place.state / "edged.db").read_bytes())
    data[4096 * 2 : 4096 * 2 + 64] = b"\xa5" * 64
    (place.state / "edged.db").write_bytes(data)
    answer = place.run("doctor", "--backup", str(tmp_path / "node.tar"))
    assert answer.code == 1
    assert "edged.db" in answer.err
    assert not (tmp_path / "node.tar").exists()

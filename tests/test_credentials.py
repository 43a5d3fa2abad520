"""Secrets from the service manager: read once, sent to the repository's server, shown to nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_kit import Place, eventually
from engine_kit import published
from web import AUTHORIZATION, Guarded, serving

from edged.credentials import read
from edged.errors import Permanent, Reason


def test_reads_the_file_that_systemd_made_of_it(tmp_path: Path) -> None:
    (tmp_path / "edged_repository").write_text("Bearer abc\n")
    assert read({"CREDENTIALS_DIRECTORY": str(tmp_path)}, "repository") == "Bearer abc"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "/edged_repository: No such file or directory; put it into /etc/edged/credentials"),
        (b"", "is not one line of text"),
        (b"Bearer abc\nX-Other: header", "is not one line of text"),
        (b"Bearer \xff", "is not text in UTF-8"),
        (b"Bearer " + b"a" * 65536, "is not one line of text"),
    ],
)
def test_a_credential_that_cannot_be_used_is_said_but_not_shown(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "edged_repository").write_bytes(content)
    with pytest.raises(Permanent) as caught:
        read({"CREDENTIALS_DIRECTORY": str(tmp_path)}, "repository")
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert says in caught.value.detail
    assert "Bearer" not in caught.value.detail


def test_without_a_service_manager_there_are_none() -> None:
    with pytest.raises(
        Permanent, match="set CREDENTIALS_DIRECTORY to a folder with the file edged_repository"
    ):
        read({}, "repository")


def named(place: Place) -> Place:
    text = place.write().config.read_text()
    place.config.write_text(text.replace("[trust]\n", '[trust]\ncredential = "repository"\n'))
    return place


def test_metadata_and_image_are_fetched_with_it(tmp_path: Path) -> None:
    publisher = published(tmp_path / "publisher")
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "edged_repository").write_text(AUTHORIZATION)
    with serving(publisher.repo, Guarded) as url:
        place = named(Place(tmp_path / "node", publisher, repository=url))
        with place.daemon(CREDENTIALS_DIRECTORY=str(folder)) as process:
            assert place.run("deploy", "app@2.0.0", "--to", "one", "--wait").code == 0
            assert place.client.get("status")["problems"] == []
            process.terminate()
            process.wait(30)
            assert process.stderr is not None
            assert "let-me-in" not in process.stderr.read()


def test_without_it_the_daemon_goes_on_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    publisher = published(tmp_path / "publisher")
    with serving(publisher.repo, Guarded) as url:
        place = named(Place(tmp_path / "node", publisher, repository=url))
        with place.daemon():
            problems = eventually(lambda: place.client.get("status")["problems"])
            details = {problem["part"]: problem["detail"] for problem in problems}
            assert "credential 'repository': there are none" in details["credential"]
            trust = eventually(lambda: place.client.get("trust")["failure"])
            assert trust["reason"] == "fetch_failed"
            assert "401" in trust["detail"]


def test_a_secret_is_not_sent_in_the_clear(tmp_path: Path) -> None:
    place = named(Place(tmp_path, repository="http://firmware.example.org", extra=""))
    answer = place.run("check-config")
    assert answer.code == 2
    assert (
        "trust.repository: found 'http://firmware.example.org'; allowed: with trust.credential: https://"
        in answer.err
    )

"""Creating objects once on S3-compatible storage: credentials, lost answers, storage that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from audit.conditional import ConditionalObjects, profile_credentials
from audit.errors import WorkspaceError
from audit.files import Files


def test_keys_of_a_profile_are_used_where_the_environment_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "credentials"
    path.write_text("[default]\naws_access_key_id = A\naws_secret_access_key = %S\n[work]\naws_session_token = T\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    assert profile_credentials() == {"access_key_id": "A", "secret_access_key": "%S"}
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert profile_credentials() == {"session_token": "T"}
    monkeypatch.setenv("AWS_PROFILE", "none")
    assert profile_credentials() == {}
    path.write_bytes(b"\xff\xfe no ini")
    assert profile_credentials() == {}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "B")
    path.write_text("[none]\naws_access_key_id = A\n")
    assert profile_credentials() == {}


def test_an_object_whose_answer_is_lost_counts_as_made(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(f"s3://bucket/lost?{s3}")
    real = ConditionalObjects.create

    def lost(self: ConditionalObjects, key: str, content: bytes) -> bool:
        real(self, key, content)
        return real(self, key, content)  # tried again, as the first answer did not arrive

    monkeypatch.setattr(ConditionalObjects, "create", lost)
    assert files.create("m/1.json", b"mine")
    assert not files.create("m/1.json", b"yours")
    assert files.read("m/1.json") == b"mine"


def test_storage_that_is_away_is_said(s3: str) -> None:
    files = Files(f"s3://no-such-bucket/x?{s3}")
    with pytest.raises(WorkspaceError, match="cannot be created"):
        files.create("m/1.json", b"x")

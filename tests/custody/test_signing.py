"""Signatures: only a key that is trusted makes one count, and nothing of a private key gets out."""

from __future__ import annotations

import base64
import json
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from audit.custody import signing
from audit.custody.keep import Custody, sign_one_of_many, sign_page
from audit.custody.signing import PasswordNeededError, load_key, read_envelope
from audit.errors import CustodyError
from audit.states import Agreement
from audit.tokens import SIGNING_PASSWORD
from tests.custody.conftest import OPERATOR, Keys, Report, keys_made

P256 = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")


def signed(made: Report, keys: Keys) -> Report:
    assert sign_page(made.workspace, made.page, load_key(keys.private))
    return made


@pytest.mark.parametrize("options", [("-algorithm", "ed25519"), P256, (*P256[:3], "ec_paramgen_curve:P-384")])
def test_a_signature_is_checked_with_the_public_key_alone(
    made: Report, tmp_path: Path, options: tuple[str, ...]
) -> None:
    keys = keys_made(tmp_path, "key", *options)
    signed(made, keys)
    keys.private.unlink()
    found = made.verify(public_key=keys.public)
    assert found.agrees
    assert [one.said for one in found.of(Agreement.agrees) if one.part == "signature"] == [
        "signed with the key of key.pub"
    ]


def test_without_a_trusted_key_nothing_is_called_signed(made: Report, keys: Keys) -> None:
    found = signed(made, keys).verify()
    [said] = [one for page in found.pages for one in page.findings if one.part == "signature"]
    assert said.state is Agreement.unchecked
    assert found.pages[0].signed_by[0] in said.said
    assert "--public-key" in said.said


def test_no_signature_is_a_difference_where_one_is_asked_for(made: Report, keys: Keys) -> None:
    assert [one.said for one in made.differing(public_key=keys.public)] == ["there is no signature"]


def test_the_signature_of_another_key_is_named(made: Report, keys: Keys, tmp_path: Path) -> None:
    other = keys_made(tmp_path, "other", "-algorithm", "ed25519")
    [found] = signed(made, other).differing(public_key=keys.public)
    assert found.part.endswith(".dsse.json")
    assert "not by" in found.said
    document = json.loads(made.envelope.read_bytes())
    document["signatures"][0]["keyid"] = signing.key_id_of(keys.public)
    made.envelope.write_text(json.dumps(document))
    [found] = made.differing(public_key=keys.public)
    assert "was changed after it was signed" in found.said


def test_who_changes_page_rows_and_manifest_alike_is_found_out_by_the_signature(made: Report, keys: Keys) -> None:
    signed(made, keys)
    envelope = made.envelope.read_bytes()
    made.rewrite("extractions", lambda row: row | {"size": 4})
    made.write(Custody("somebody"))
    assert made.verify().agrees  # nothing can tell without the signature, which was taken away
    assert [one.said for one in made.differing(public_key=keys.public)] == ["there is no signature"]
    made.envelope.write_bytes(envelope)
    named = {one.part for one in made.differing(public_key=keys.public)}
    assert f"reports/{made.manifest.name}" in named
    assert "extractions 1" in named or f"reports/{made.rows.name}" in named


def test_a_changed_byte_of_the_payload_is_found(made: Report, keys: Keys) -> None:
    signed(made, keys)
    document = json.loads(made.envelope.read_bytes())
    payload = base64.b64decode(document["payload"]).replace(b"Desk 4", b"Desk 5")
    document["payload"] = base64.b64encode(payload).decode()
    made.envelope.write_text(json.dumps(document))
    made.manifest.write_bytes(payload)
    [found] = made.differing(public_key=keys.public)
    assert "changed after it was signed" in found.said


def test_a_payload_of_another_type_is_no_statement(made: Report, keys: Keys) -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    key = load_key(keys.private)
    assert isinstance(key._signer, CryptoSigner)
    envelope = Envelope(made.manifest.read_bytes(), "application/vnd.something+json", {})
    envelope.sign(key._signer)
    made.envelope.write_text(json.dumps(envelope.to_dict()))
    [found] = made.differing(public_key=keys.public)
    assert "application/vnd.something+json" in found.said
    renamed = envelope.to_dict() | {"payloadType": signing.PAYLOAD}
    made.envelope.write_text(json.dumps(renamed))
    [found] = made.differing(public_key=keys.public)
    assert "changed after it was signed" in found.said


def test_a_signed_statement_of_another_kind_is_none(made: Report, keys: Keys) -> None:
    content = json.loads(made.manifest.read_bytes()) | {"predicateType": "https://slsa.dev/provenance/v1"}
    made.envelope.write_bytes(load_key(keys.private).sign(json.dumps(content).encode()))
    assert any("says nothing of a report" in one.said for one in made.differing(public_key=keys.public))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"[" * 100_000, b" " * (17 << 20),
     b'{"payload": 5, "payloadType": "application/vnd.in-toto+json", "signatures": []}',
     b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": [{"keyid": 1}]}',
     b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": {"a": 1}}',
     b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": [{"keyid": "a", "sig": "?"}]}',
     b'{"payload": "*", "payloadType": "application/vnd.in-toto+json", "signatures": []}'],
)  # fmt: skip
def test_a_hostile_envelope_is_a_difference_in_words(made: Report, keys: Keys, content: bytes) -> None:
    made.envelope.write_bytes(content)
    found = made.differing(public_key=keys.public)
    assert found
    assert all(len(one.said) < 500 for one in found)


def test_writing_the_same_report_again_keeps_its_signature(made: Report, keys: Keys) -> None:
    before = signed(made, keys).envelope.read_bytes()
    made.write(Custody("another"))
    assert made.envelope.read_bytes() == before
    assert not sign_page(made.workspace, made.page, load_key(keys.private))
    assert made.verify(public_key=keys.public).agrees


def test_a_report_that_says_something_else_loses_its_signature_with_a_word(
    made: Report, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    signed(made, keys)
    made.rewrite("extractions", lambda row: row | {"size": 4})
    with caplog.at_level(logging.WARNING):
        made.write(OPERATOR)
    assert not made.envelope.exists()
    assert "sign it again" in caplog.text


def test_a_page_that_is_not_that_of_its_manifest_is_not_signed(made: Report, keys: Keys) -> None:
    made.path(made.page).write_text("<html>")
    with pytest.raises(CustodyError, match="not the page of its manifest"):
        sign_page(made.workspace, made.page, load_key(keys.private))
    made.manifest.write_text("{}")
    with pytest.raises(CustodyError, match="cannot be signed"):
        sign_page(made.workspace, made.page, load_key(keys.private))
    made.manifest.unlink()
    with pytest.raises(CustodyError, match="has no manifest"):
        sign_page(made.workspace, made.page, load_key(keys.private))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(keys: Keys, mode: int) -> None:
    keys.private.chmod(mode)
    with pytest.raises(CustodyError, match=r"can be read by others.*chmod 600"):
        load_key(keys.private)


def test_an_encrypted_key_takes_its_password_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_made(tmp_path, "locked", "-algorithm", "ed25519", "-aes256", "-pass", "pass:secret")
    with pytest.raises(PasswordNeededError, match=SIGNING_PASSWORD):
        load_key(keys.private)
    monkeypatch.setenv(SIGNING_PASSWORD, "wrong")
    with pytest.raises(CustodyError, match="password is wrong") as caught:
        load_key(keys.private)
    assert caught.value.__cause__ is None
    monkeypatch.setenv(SIGNING_PASSWORD, "secret")
    assert load_key(keys.private).key_id == signing.key_id_of(keys.public)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no PEM private key"), (b"-----BEGIN PUBLIC KEY-----\n", "no PEM private key"),
     (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "no PEM private key")],
)  # fmt: skip
def test_what_is_no_key_is_refused_without_its_content(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "key.pem"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(CustodyError, match=said):
        load_key(file)
    with pytest.raises(CustodyError, match="no public key"):
        signing.key_id_of(file)


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for name, options in (("rsa", ("-algorithm", "RSA")), ("x", ("-algorithm", "X25519"))):
        keys = keys_made(tmp_path, name, *options)
        with pytest.raises(CustodyError, match="only Ed25519"):
            load_key(keys.private)
        with pytest.raises(CustodyError, match="only Ed25519"):
            signing.key_id_of(keys.public)
    odd = keys_made(tmp_path, "k1", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1")
    with pytest.raises(CustodyError, match="only Ed25519"):
        load_key(odd.private)


def test_nothing_of_the_private_key_is_shown_or_travels(made: Report, keys: Keys) -> None:
    key = load_key(keys.private)
    secret = "".join(keys.private.read_text().splitlines()[1:-1])
    custody = Custody("Desk 4", OPERATOR.command, key)
    assert secret not in repr(custody)
    assert "Signer" not in repr(custody)
    assert pickle.loads(pickle.dumps(custody.without_key())) == OPERATOR
    assert custody.without_key().key is None
    signed(made, keys)
    assert not any(secret in path.read_text() for path in (made.workspace.root / "reports").rglob("*.json"))


def test_without_the_library_the_extra_is_named(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "securesystemslib.signer", None)
    with pytest.raises(CustodyError, match=r"lora-audit\[signing\]"):
        load_key(keys.private)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("options", [("-algorithm", "ed25519"), P256])
def test_an_expert_checks_it_with_openssl_alone(made: Report, tmp_path: Path, options: tuple[str, ...]) -> None:
    """The commands of docs/custody.md."""
    keys = keys_made(tmp_path, "key", *options)
    signed(made, keys)
    shutil.copy(made.envelope, tmp_path / "report.dsse.json")
    page = Path(__file__).parents[2] / "docs/custody.md"
    blocks = [block.partition("```")[0] for block in page.read_text().split("```sh\n")[1:]]
    [script] = [block for block in blocks if "DSSEv1" in block]
    lines = [
        line
        for line in script.splitlines()
        if ("pkeyutl" in line) == (options[1] == "ed25519") or "openssl" not in line
    ]
    script = "\n".join(lines).replace("key.pub", str(keys.public))
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Verified" in done.stdout
    assert (tmp_path / "statement.json").read_bytes() == made.manifest.read_bytes()
    (tmp_path / "report.dsse.json").write_bytes(made.envelope.read_bytes().replace(b'"payload": "e', b'"payload": "f'))
    assert subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True).returncode != 0


def test_an_expert_checks_it_with_securesystemslib_alone(made: Report, keys: Keys, tmp_path: Path) -> None:
    """The program of docs/custody.md."""
    signed(made, keys)
    shutil.copy(made.envelope, tmp_path / "report.dsse.json")
    page = Path(__file__).parents[2] / "docs/custody.md"
    [program] = [block.partition("```")[0] for block in page.read_text().split("```python\n")[1:]]
    program = program.replace("key.pub", str(keys.public))
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert made.page.rpartition("/")[2] in done.stdout
    assert read_envelope(made.envelope.read_bytes()).key_ids == [signing.key_id_of(keys.public)]
    other = keys_made(tmp_path, "other", "-algorithm", "ed25519")
    program = program.replace(str(keys.public), str(other.public))
    assert subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True).returncode != 0


def test_a_page_of_many_that_cannot_be_signed_stops_nothing(
    made: Report, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    made.path(made.page).write_text("<html>")
    custody = Custody(key=load_key(keys.private))
    with caplog.at_level(logging.WARNING):
        sign_one_of_many(made.workspace, f"somewhere/{made.page}", custody)
    assert "not the page of its manifest" in caplog.text
    made.write(custody)
    sign_one_of_many(made.workspace, f"somewhere/{made.page}", custody)
    assert made.verify(public_key=keys.public).agrees

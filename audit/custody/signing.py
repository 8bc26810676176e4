"""Manifests in signed envelopes (DSSE), with keys in PEM files: Ed25519, or ECDSA on P-256, P-384 and P-521.

securesystemslib makes and checks the signatures. The private key is read from a file that its owner alone can read, and
stays in the process that was started: workers get none of it.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from audit.errors import CustodyError
from audit.tokens import SIGNING_PASSWORD
from audit.untrusted.documents import parse_json

PAYLOAD = "application/vnd.in-toto+json"
MOST_KEY_BYTES = 64 << 10
MOST_ENVELOPE_BYTES = 16 << 20
MOST_SIGNATURES = 16


class PasswordNeededError(CustodyError):
    """A private key that is encrypted, and no password to it."""


@dataclass(frozen=True)
class SigningKey:
    """A private key. ``key_id`` is securesystemslib's id of its public half, 64 hex digits."""

    key_id: str
    _signer: Any = field(repr=False)

    def sign(self, payload: bytes) -> bytes:
        """The envelope of a statement, as JSON."""
        from securesystemslib.dsse import Envelope

        envelope = Envelope(payload, PAYLOAD, {})
        envelope.sign(self._signer)
        return json.dumps(envelope.to_dict(), indent=1).encode()


def _library() -> None:
    """Raise CustodyError where what signs is not installed."""
    try:
        import cryptography  # noqa: F401
        import securesystemslib.signer  # noqa: F401
    except ImportError as error:
        raise CustodyError(
            "signatures are made and checked by securesystemslib, which is not installed: "
            "pip install 'lora-audit[signing]'"
        ) from error


def load_key(file: str | Path, password: str | None = None) -> SigningKey:
    """The private key in the PEM file ``file``; ``password`` opens an encrypted one, else the environment's does.

    Raises CustodyError where others than its owner can read it, or it is no key that signs here, and
    PasswordNeededError where it is encrypted and there is no password.
    """
    _library()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    content = _private(Path(file))
    secret = (password or os.environ.get(SIGNING_PASSWORD) or "").encode() or None
    try:
        private = load_pem_private_key(content, secret if b"ENCRYPTED" in content else None)
    except TypeError:
        raise PasswordNeededError(f"the key {file} is encrypted: give its password in {SIGNING_PASSWORD}") from None
    except Exception:  # of many kinds; what it says may be of the content
        what = "the password is wrong, or it is damaged" if b"ENCRYPTED" in content else "it is no PEM private key"
        raise CustodyError(f"the key {file} cannot be read: {what}") from None
    try:
        _check_kind(private.public_key())
        signer = CryptoSigner(private)
    except ValueError:
        raise CustodyError(f"{file}: {_KINDS}") from None
    return SigningKey(signer.public_key.keyid, signer)


_KINDS = "only Ed25519 keys, and ECDSA keys on P-256, P-384 or P-521, sign here: openssl genpkey -algorithm ed25519"


def _check_kind(public: Any) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not isinstance(public, Ed25519PublicKey | EllipticCurvePublicKey):
        raise ValueError("another kind of key")


def _private(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            if mode & 0o077:
                raise CustodyError(f"{file} can be read by others (mode {mode:04o}): run 'chmod 600 {file}'")
            return opened.read(MOST_KEY_BYTES)
    except OSError as error:
        raise CustodyError(f"the key {file} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Signed:
    """An envelope: the statement in it, as bytes, and the ids of the keys that are said to have signed it."""

    payload: bytes
    key_ids: list[str]
    _document: dict[str, Any] = field(repr=False)

    def problem(self, public_key: Path) -> str | None:
        """Why none of its signatures is of the key in the PEM file; None where one is.

        Raises CustodyError where the file holds no public key.
        """
        _library()
        from securesystemslib.dsse import Envelope
        from securesystemslib.exceptions import VerificationError

        key = _public(public_key)
        try:
            envelope = Envelope.from_dict(json.loads(json.dumps(self._document)))
            envelope.verify([key], 1)
        except VerificationError:
            if key.keyid in self.key_ids:
                return "the signature is not of this content: it was changed after it was signed, or the signature was"
            said = ", ".join(self.key_ids) or "nobody"
            return f"it is signed by the key {said}, not by {key.keyid}, that of {public_key.name}"
        except Exception as error:  # securesystemslib's errors for malformed signatures share no base class
            return f"its signatures cannot be read: {type(error).__name__}"
        return None


def key_id_of(public_key: Path) -> str:
    """The id of the public key in a PEM file. Raises CustodyError."""
    _library()
    return str(_public(public_key).keyid)


def _public(file: Path) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    try:
        with file.open("rb") as opened:
            found = load_pem_public_key(opened.read(MOST_KEY_BYTES))
        _check_kind(found)
        return SSlibKey.from_crypto(found)
    except OSError as error:
        raise CustodyError(f"the public key {file} cannot be read: {error.strerror}") from error
    except Exception:
        raise CustodyError(f"{file} is no public key in PEM that is known here: {_KINDS}") from None


def read_envelope(content: bytes) -> Signed:
    """The envelope in ``content``, a stranger's. Raises CustodyError for what is none of a statement."""
    if len(content) > MOST_ENVELOPE_BYTES:
        raise CustodyError(f"it has {len(content)} bytes, more than any envelope of ours: it is none")
    try:
        document = parse_json(content)
        kind, signatures = document["payloadType"], document["signatures"]
        if kind != PAYLOAD:
            raise CustodyError(f"its payload is of the type {str(kind)[:100]!r}, not {PAYLOAD}: it is no statement's")
        if not isinstance(signatures, list) or len(signatures) > MOST_SIGNATURES:
            raise ValueError("no list of signatures")
        ids = [one["keyid"] for one in signatures]
        if not all(isinstance(one, str) and len(one) <= 200 for one in ids):
            raise ValueError("a signature without the id of its key")
        payload = base64.b64decode(document["payload"], validate=True)
    except (ValueError, TypeError, KeyError) as error:
        raise CustodyError(f"it is no envelope that can be read: {str(error)[:200]}") from error
    return Signed(payload, ids, document)

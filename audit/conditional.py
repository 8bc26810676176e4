"""Conditional puts on S3-compatible storage: an object is created only where there is none. Arrow has no such call."""

from __future__ import annotations

import configparser
import os
import secrets
from pathlib import Path
from typing import Any

from audit.errors import WorkspaceError
from audit.locations import parse_s3

FROM_PROFILE = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}


def profile_credentials() -> dict[str, str]:
    """The keys of the AWS profile in force, none where the environment has keys or the profile states none."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path)
        section = dict(parser[os.environ.get("AWS_PROFILE", "default")])
    except (configparser.Error, KeyError, OSError, UnicodeDecodeError):
        return {}
    return {ours: section[theirs] for theirs, ours in FROM_PROFILE.items() if theirs in section}


class ConditionalObjects:
    """Objects below ``s3://bucket/prefix?endpoint_override=...``; the location's options are those of Files.

    Credentials are those of the URL, the environment, the profile's keys, or the machine's role.
    """

    def __init__(self, location: str, region: str) -> None:
        from obstore.store import S3Store

        parts = parse_s3(location)
        options = parts.options
        arguments: dict[str, Any] = {"region": region, **profile_credentials()}
        if parts.key:
            arguments |= {"access_key_id": parts.key, "secret_access_key": parts.secret}
        scheme = options.get("scheme", "https")
        if "endpoint_override" in options:
            endpoint = options["endpoint_override"]
            arguments["endpoint"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
        self.store = S3Store(
            parts.bucket,
            prefix=parts.prefix.strip("/") or None,
            client_options={"allow_http": scheme == "http", "timeout": "60s", "connect_timeout": "10s"},
            **arguments,
        )

    def create(self, key: str, content: bytes) -> bool:
        """Create the object ``key`` unless it is there; whether this call did. Raises OSError where it cannot tell."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            obstore.put(self.store, key, content, mode="create")
        except AlreadyExistsError:
            return False
        except BaseError as error:
            raise OSError(str(error)) from error
        return True


def require_conditional_puts(create: Any, remove: Any, where: str) -> None:
    """Raise WorkspaceError where ``create`` makes an object twice: such storage cannot keep two writers apart."""
    key = f"probe-{secrets.token_hex(8)}"
    try:
        if not create(key, b"1") or create(key, b"2"):
            raise WorkspaceError(
                f"the storage of {where} overwrites objects that it was asked to create only once (If-None-Match), so "
                "two writers could lose rows: use storage that knows conditional puts, or a folder"
            )
    finally:
        remove(key)

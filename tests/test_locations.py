"""Locations: what is a bucket, what is a secret, and that no secret is ever shown."""

from __future__ import annotations

import pytest

from audit.errors import CrawlError, WorkspaceError
from audit.files import Files, is_remote, shown
from audit.locations import S3Location, parse_s3
from crawlers.places import open_location


@pytest.mark.parametrize(
    ("location", "bucket", "prefix", "key", "secret"),
    [
        ("s3://bucket", "bucket", "", None, None),
        ("S3://bucket/a/b?region=x", "bucket", "/a/b", None, None),
        ("s3://bucket/a@b", "bucket", "/a@b", None, None),
        ("s3://bucket/a:b@c", "bucket", "/a:b@c", None, None),
        ("s3://KEY:SECRET@bucket/p", "bucket", "/p", "KEY", "SECRET"),
        ("s3://KEY:ab/cd@bucket/p", "bucket", "/p", "KEY", "ab/cd"),
        ("s3://KEY:/ab//cd/@bucket/p/q@r", "bucket", "/p/q@r", "KEY", "/ab//cd/"),
        ("s3://KEY:a+b%2Fc%40d?e#f@bucket/p", "bucket", "/p", "KEY", "a+b/c@d?e#f"),
        ("s3://bucket?endpoint_override=host:1&scheme=http", "bucket", "", None, None),
        ("s3://bucket/p?endpoint_override=http://a@host:1", "bucket", "/p", None, None),
        ("s3://KEY@bucket/p", "bucket", "/p", "KEY", ""),
        ("s3://KEY:ab/cd", "", "", "KEY", "ab/cd"),
        ("s3://", "", "", None, None),
    ],
)  # fmt: skip
def test_the_parts_of_a_location(location: str, bucket: str, prefix: str, key: str | None, secret: str | None) -> None:
    found = parse_s3(location)
    assert (found.bucket, found.prefix, found.key, found.secret) == (bucket, prefix, key, secret)
    assert shown(location) == f"s3://{bucket}{prefix}"
    assert "ab/cd" not in repr(found)
    assert is_remote(location)


SECRET = "wJalr/UtnFEMI/K7MDENG+bPxRfi"


@pytest.mark.parametrize("end", ["", "@", "@b?x=1", "@[b/p", "@b/p?scheme=http&y=2"])
def test_what_is_not_understood_is_refused_without_its_secret(end: str) -> None:
    location = f"S3://AKIA:{SECRET}{end}"
    for opened in (Files, open_location):
        with pytest.raises((WorkspaceError, CrawlError), match=r"is not understood|cannot be opened") as caught:
            opened(location)
        error: BaseException | None = caught.value
        while error is not None:
            assert all(part not in str(error) for part in SECRET.split("/"))
            error = error.__cause__


def test_secrets_are_not_printed() -> None:
    assert "SECRET" not in repr(S3Location("b", "", "KEY", "SECRET"))

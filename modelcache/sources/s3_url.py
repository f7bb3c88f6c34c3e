"""Addresses of buckets: ``s3://bucket/prefix``, access points included.

Which keys are looked at below the prefix is told by ``keys``.
"""

import re
import urllib.parse

import attrs

from modelcache.errors import ConfigError

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", re.ASCII)
_ARN = re.compile(
    r"(arn:aws[a-z-]*:s3[a-z-]*:[a-z0-9-]*:[0-9]{12}:(?:outpost[/:][a-z0-9-]+[/:])?accesspoint[/:][A-Za-z0-9.-]+)(?:/(.*))?",
    re.ASCII | re.DOTALL,
)
_FORM = "an address is 's3://bucket' or 's3://bucket/prefix'"


@attrs.frozen
class Address:
    """A bucket and a prefix in it.

    Attributes:
        bucket: its name, or an access point's ARN.
        prefix: empty, or ending in ``/``.
    """

    bucket: str
    prefix: str

    def key(self, key: str) -> str:
        """Return the whole key of one that is relative to the prefix."""
        return self.prefix + key

    def url(self, key: str | None = None) -> str:
        """Return the URL of a key, or of the whole."""
        return f"s3://{self.bucket}/{self.prefix}{key or ''}".removesuffix("" if key else "/")

    @property
    def is_directory_bucket(self) -> bool:
        """Whether it is an S3 Express bucket, whose ETags are no MD5."""
        return self.bucket.endswith("--x-s3")


def parse_s3_url(url: object) -> Address:
    """Return what an ``s3://`` URL names. Nothing is decoded: ``%``, ``#`` and ``?`` are part of a key.

    Raises:
        ConfigError: anything else; the message says what to write instead, and shows no credentials.
    """
    if not isinstance(url, str):
        raise ConfigError(f"an S3 URL must be a str, not {type(url).__name__}; {_FORM}", setting="url")
    scheme, separator, rest = url.partition("://")
    if scheme.lower() in ("http", "https"):
        host = urllib.parse.urlsplit(url).hostname
        raise ConfigError(
            f"a URL of {host} names no bucket for sure; {_FORM}, and endpoint_url= names the server", setting="url"
        )
    if not separator or scheme.lower() != "s3":
        shown = repr(scheme) if separator else "no scheme"
        raise ConfigError(f"an S3 URL begins with s3://, this one has {shown}; {_FORM}", setting="url")
    arn = _ARN.fullmatch(rest)
    bucket, prefix = (arn[1], arn[2] or "") if arn else (rest.partition("/")[0], rest.partition("/")[2])
    prefix = prefix.removesuffix("/")
    if "@" in bucket:
        raise ConfigError(f"this S3 URL holds credentials; give a session= or client=; {_FORM}", setting="url")
    problem = _problem(bucket, prefix, is_arn=arn is not None)
    if problem:
        raise ConfigError(f"this S3 URL {problem}; {_FORM}", setting="url")
    return Address(bucket, f"{prefix}/" if prefix else "")


def _problem(bucket: str, prefix: str, *, is_arn: bool) -> str | None:
    if bucket.startswith("arn:") and not is_arn:
        return "has an ARN that is no access point's (arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME)"
    if not is_arn and not _BUCKET.fullmatch(bucket):
        return f"has no valid bucket name ({bucket!r:.100})"
    if "?versionid=" in prefix.lower():
        return "names a version; give version=, a function from model id to VersionId"
    if (prefix and "" in prefix.split("/")) or any(ord(character) < 32 for character in prefix):  # noqa: PLR2004 - C0
        return f"has an empty part or a control character in its prefix ({prefix!r:.100})"
    return None

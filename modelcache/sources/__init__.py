"""Where artifacts come from: ``S3Source``, ``LocalSource``, or anything that is a ``Source``."""

import os
import re

from modelcache.errors import ConfigError
from modelcache.sources.base import Artifact, RemoteFile, Source, Stream
from modelcache.sources.local import LocalSource
from modelcache.sources.s3 import S3Source

__all__ = ["Artifact", "LocalSource", "RemoteFile", "S3Source", "Source", "Stream", "source_from"]

_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


def source_from(value: object) -> Source:
    """Return the source that a user's ``source`` argument means.

    Args:
        value: an ``s3://`` URL, a ``file://`` URL, a path of a folder, or a :class:`Source`, returned as it is.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, str) and _ONE_SLASH.match(value):
        raise ConfigError(
            f"source={value!r:.200}: a URL has two slashes after its colon", setting="source", value=value
        )
    if isinstance(value, str):
        return S3Source(value) if value.lower().startswith(("s3://", "http://", "https://")) else LocalSource(value)
    if isinstance(value, os.PathLike):
        return LocalSource(value)
    if isinstance(value, Source) and not isinstance(value, type):
        return value
    raise ConfigError(
        f"source={value!r:.200} is no source: give an s3:// or file:// URL, a folder, or a Source",
        setting="source",
        value=value,
    )

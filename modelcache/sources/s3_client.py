"""The S3 client of one source: the user's own, or one that is made on first use and anew in each process.

What is asked of it is ``s3``'s business. boto3 is imported on first use: a server whose models are all on disk
never pays for it.
"""

import logging
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from modelcache.errors import AccessDenied, ConfigError, ModelCacheError
from modelcache.sources.s3_errors import CREDENTIAL_CODES
from modelcache.sources.s3_listing import take_entries

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5
"""Seconds to wait for a connection, where the client is ours."""
READ_TIMEOUT = 20
"""Seconds to wait for the next bytes of an answer, where the client is ours."""
CONNECTIONS = 32
"""Connections that our client keeps open."""

OPERATIONS = {"HeadObject": "head_object", "GetObject": "get_object", "ListObjectsV2": "list_objects_v2"}
"""What is asked of S3: name in the service's model to method of the client."""

_OURS = frozenset(
    {
        "Bucket",
        "ChecksumMode",
        "ContinuationToken",
        "Delimiter",
        "EncodingType",
        "IfMatch",
        "IfModifiedSince",
        "IfNoneMatch",
        "IfUnmodifiedSince",
        "Key",
        "MaxKeys",
        "PartNumber",
        "Prefix",
        "Range",
        "StartAfter",
        "VersionId",
    }
)


class Process:
    """What belongs to one process; a forked child gets a new one.

    Attributes:
        lock: held while one of it is made.
        cleaned: clients of the user's whose inherited connections were closed.
    """

    def __init__(self) -> None:
        # Guards the making of clients: sessions are not thread-safe, and a race inside boto3 raises KeyErrors
        # that look like missing credentials. Credentials may be looked up over the network under it (by
        # boto3), as whoever waits here needs just this. No request to S3 and no code of the user's under it. It
        # also guards what else there is one of in a process: patterns of requests, bounds of connections.
        self.lock = threading.Lock()
        self.cleaned: weakref.WeakSet[Any] = weakref.WeakSet()


_process = Process()


def _forked() -> None:
    global _process  # noqa: PLW0603 - this is its purpose
    _process = Process()


os.register_at_fork(after_in_child=_forked)


class Clients:
    """Hands out the client.

    Concurrency: may be called from all threads, and in a forked child. There a client of ours is made anew; of
    a user's client the inherited connections are closed, never used. A session of the user's is used as given.

    Args:
        client, session, endpoint_url, config: as ``S3Source`` documents them.

    Raises:
        ConfigError: they contradict one another, or are not what they should be.
    """

    def __init__(self, client: Any, session: Any, endpoint_url: str | None, config: Any) -> None:
        _check(client, session, endpoint_url, config)
        self._given = client
        self._session = session
        self._endpoint_url = endpoint_url
        self._config = config
        self._born = _process
        self._made: tuple[Process, Any] | None = None

    @property
    def process(self) -> Process:
        """What belongs to this process."""
        return _process

    def get(self) -> Any:
        """Return the client of this process."""
        process = _process
        if self._given is not None:
            if process is not self._born:
                _drop_inherited(process, self._given)
            return self._given
        made = self._made
        if made is None or made[0] is not process:
            with process.lock:
                made = self._made
                if made is None or made[0] is not process:
                    made = self._made = (process, self._make())
        return made[1]

    def heed(self, error: ModelCacheError) -> None:
        """Forget a client of ours whose credentials were refused, so that the next call looks for new ones."""
        if isinstance(error, AccessDenied) and error.code in CREDENTIAL_CODES:
            self._made = None

    def _make(self) -> Any:
        import boto3.session  # noqa: PLC0415 - late: slow to import
        import botocore.session  # noqa: PLC0415 - the same
        from botocore.config import Config  # noqa: PLC0415 - the same

        ours: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT,
            "read_timeout": READ_TIMEOUT,
            "max_pool_connections": CONNECTIONS,
            "tcp_keepalive": True,
            "response_checksum_validation": "when_required",  # the stream compares them itself, resumed ones too
        }
        session = self._session
        if session is None:
            below = botocore.session.Session()
            session = boto3.session.Session(botocore_session=below)
            if "AWS_RETRY_MODE" not in os.environ and "retry_mode" not in below.get_scoped_config():
                ours["retries"] = {"mode": "standard"}
        config = Config(**ours)
        client = session.client(
            "s3",
            endpoint_url=self._endpoint_url,
            config=config.merge(self._config) if self._config is not None else config,
        )
        client.meta.events.register_last("before-parse.s3.ListObjectsV2", take_entries)
        return client


def _drop_inherited(process: Process, client: Any) -> None:
    """Close the connections that a user's client brought over a fork, once in each process.

    Two processes that read from one socket get one another's bytes. Closing it in the child leaves the parent's
    connection as it is, and the client opens new ones. Best effort: a thread of the parent that was inside the
    connection pool's own lock at the fork leaves it locked in the child.
    """
    if client in process.cleaned:
        return
    with process.lock:
        if client in process.cleaned:
            return
        close = getattr(client, "close", None)
        if close is not None:
            close()  # botocore: drops the pool
        process.cleaned.add(client)
    if close is None:
        _log.warning("connections of %r may be shared with the parent process: make it after the fork", client)


def _check(client: Any, session: Any, endpoint_url: object, config: Any) -> None:
    if client is not None:
        for setting, value in (("session", session), ("endpoint_url", endpoint_url), ("config", config)):
            if value is not None:
                raise ConfigError(
                    f"client= and {setting}= were both given; a client is used as it is, so give it its {setting}",
                    setting=setting,
                )
        if not all(callable(getattr(client, method, None)) for method in OPERATIONS.values()):
            raise ConfigError(
                f"client={client!r:.200} is no S3 client; give boto3.client('s3'), or none", setting="client"
            )
    if session is not None and not callable(getattr(session, "client", None)):
        raise ConfigError(f"session={session!r:.200} is no boto3.session.Session", setting="session")
    if config is not None and not callable(getattr(config, "merge", None)):
        raise ConfigError(f"config={config!r:.200} is no botocore.config.Config", setting="config")
    if endpoint_url is None:
        return
    if not isinstance(endpoint_url, str) or not endpoint_url.lower().startswith(("http://", "https://")):
        raise ConfigError(
            "endpoint_url= must be a URL like 'http://127.0.0.1:9000' or 'https://s3.example.com'",
            setting="endpoint_url",
            value=endpoint_url,
        )
    if "@" in endpoint_url:
        raise ConfigError("endpoint_url= must not hold credentials; give a session or a client", setting="endpoint_url")


class Extra:
    """The user's arguments for every call, each handed to those operations that take it.

    Their values may be secrets (SSE-C keys) and are never shown.

    Args:
        extra: argument to value.

    Raises:
        ConfigError: no mapping of names, or an argument that the source sets itself.
    """

    def __init__(self, extra: Mapping[str, Any] | None) -> None:
        if extra is not None and not _names_arguments(extra):
            raise ConfigError("extra= must map argument names to values", setting="extra")
        self._extra = dict(extra or {})
        for name in self._extra:
            if name in _OURS:
                hint = "; see version=" if name == "VersionId" else ""
                raise ConfigError(f"extra={{{name!r}: ...}}: the source sets {name} itself{hint}", setting="extra")
        self._sorted: dict[str, dict[str, Any]] | None = None  # written once, equal whoever writes it

    def of(self, operation: str, client: Any) -> dict[str, Any]:
        """Return the arguments that ``operation`` takes.

        Raises:
            ConfigError: there is one that no operation takes.
        """
        if not self._extra:
            return {}
        if self._sorted is None:
            self._sorted = self._sort(client.meta.service_model)
        return self._sorted[operation]

    def _sort(self, model: Any) -> dict[str, dict[str, Any]]:
        takes = {operation: model.operation_model(operation).input_shape.members for operation in OPERATIONS}
        for name in self._extra:
            if not any(name in members for members in takes.values()):
                raise ConfigError(
                    f"extra={{{name!r}: ...}}: neither HeadObject, GetObject nor ListObjectsV2 takes {name}",
                    setting="extra",
                )
        return {
            operation: {name: value for name, value in self._extra.items() if name in members}
            for operation, members in takes.items()
        }


def _names_arguments(extra: object) -> bool:
    return isinstance(extra, Mapping) and all(isinstance(name, str) for name in extra)

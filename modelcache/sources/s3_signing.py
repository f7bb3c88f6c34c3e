"""Requests for objects, made and signed as the user's client would: one real request of it serves as the pattern.

botocore spends about 1 ms of Python on each request, most of it on what is the same for all objects of a bucket
(endpoint, addressing, headers). So one request is taken from it just before it would be sent, and others are made
after it, each signed by botocore's signer. Where that would leave something out, such as a handler of the
user's, there is no pattern, and the client itself sends all requests (``s3_get``).
"""

import io
import ssl
import threading
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from modelcache.sources.s3_connection import Host

if TYPE_CHECKING:
    from modelcache.sources.s3_signer import Signer

_SAFE = "/~"  # what botocore leaves as it is in a key
_STAGES = (
    "provide-client-params",
    "before-parameter-build",
    "before-endpoint-resolution",
    "before-call",
    "request-created",
    "choose-signer",
    "before-sign",
    "before-send",
    "response-received",
    "before-parse",
    "needs-retry",
    "after-call",
    "after-call-error",
)
_EACH_ANEW = frozenset(
    {
        "amz-sdk-invocation-id",
        "amz-sdk-request",
        "authorization",
        "expect",
        "host",
        "x-amz-checksum-mode",
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-security-token",
    }
)
_READ = ("_verify", "_cert_file", "_key_file")  # of the client's HTTP session
_SIGNED = "AWS4-HMAC-SHA256 Credential="
_SCOPE = 5  # parts of a credential's scope: key, date, region, service, aws4_request


@attrs.frozen
class Pattern:
    """How requests for the objects of one bucket look.

    Attributes:
        base: scheme and host.
        path: path above the key, ending in ``/``, quoted.
        headers: those that all of them have.
        signer: signs them; None: anonymous.
    """

    base: str
    path: str
    headers: dict[str, str]
    signer: "Signer | None"

    def request(self, key: str, pin: str | None, headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """Return target and headers of a GET, signed; ``pin`` is a VersionId.

        Raises:
            botocore.exceptions.BotoCoreError: the credentials could not be refreshed.
        """
        query = f"?versionId={urllib.parse.quote(pin, safe='-._~')}" if pin else ""
        target = f"{self.path}{urllib.parse.quote(key, safe=_SAFE)}{query}"
        return target, self._sign(target, {**self.headers, **headers})

    def _sign(self, target: str, headers: dict[str, str]) -> dict[str, str]:
        host = self.base.partition("://")[2]
        if self.signer is None:
            return {"Host": host, **headers}
        # The others, such as User-Agent and If-Match, need no signature.
        amz = {name: value for name, value in headers.items() if name.startswith("x-amz-")}
        return {**self.signer.sign(self.base, target, {"Host": host, **amz}), **headers}


def pattern_of(client: Any, arguments: Mapping[str, Any]) -> Pattern | None:
    """Return how this client's requests look; None where it has to send them itself.

    The caller sees to it that one thread at a time does this to one client.

    Args:
        client: a boto3 client.
        arguments: of a GetObject without range, version or condition; ``Key`` among them.

    Raises:
        Exception: what the client raises, as for any GetObject.
    """
    if not _is_plain(client):
        return None
    request = _taken(client, arguments)
    if request is None:
        return None
    headers = {name.lower(): _text(value) for name, value in request.headers.items()}
    url = urllib.parse.urlsplit(request.url)
    key = urllib.parse.quote(arguments["Key"], safe=_SAFE)
    if url.query or not url.path.endswith(f"/{key}") or _has_proxy(client, request.url):
        return None
    signer = None
    if "authorization" in headers:
        signer = _signer(client, headers["authorization"])
        if signer is None:
            return None
    kept = {name: value for name, value in headers.items() if name not in _EACH_ANEW}
    base = f"{url.scheme}://{_netloc(url)}"
    return Pattern(base, url.path.removesuffix(key), kept, signer)


def _signer(client: Any, authorization: str) -> "Signer | None":
    """Return what signs as this header was signed; None where that is another kind of signature."""
    from modelcache.sources.s3_signer import Signer  # noqa: PLC0415 - late: botocore is slow to import

    scope = authorization.removeprefix(_SIGNED).partition(",")[0].split("/")
    credentials = getattr(getattr(client, "_request_signer", None), "_credentials", None)
    if not authorization.startswith(_SIGNED) or len(scope) != _SCOPE or credentials is None:
        return None
    access_key, _, region, service, _ = scope
    if access_key != credentials.get_frozen_credentials().access_key:
        return None  # of a session of its own, as in directory buckets
    return Signer(credentials, service, region)


def host_of(client: Any, pattern: Pattern, most: int) -> Host:
    """Return where a pattern's requests go, with the client's own timeouts and TLS settings."""
    url = urllib.parse.urlsplit(pattern.base)
    config = client.meta.config
    secure = url.scheme == "https"
    return Host(
        name=url.hostname or "",
        port=url.port or (443 if secure else 80),
        tls=_tls(client) if secure else None,
        connect=config.connect_timeout,
        read=config.read_timeout,
        keepalive=bool(config.tcp_keepalive),
        most=most,
    )


def _tls(client: Any) -> ssl.SSLContext:
    from botocore.httpsession import get_cert_path  # noqa: PLC0415 - late: slow to import

    session = client._endpoint.http_session  # noqa: SLF001 - told nowhere else
    verify = session._verify  # noqa: SLF001 - the same
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    if verify:
        path = get_cert_path(verify)
        context.load_verify_locations(**{"capath" if Path(path).is_dir() else "cafile": path})
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if session._cert_file:  # noqa: SLF001 - the same
        context.load_cert_chain(session._cert_file, session._key_file)  # noqa: SLF001 - the same
    return context


def _is_plain(client: Any) -> bool:
    """Whether nothing but boto3 itself has a hand in this client's requests, as far as can be seen."""
    from botocore.httpsession import URLLib3Session  # noqa: PLC0415 - late: slow to import

    try:
        session = client._endpoint.http_session  # noqa: SLF001 - told nowhere else
        if type(session) is not URLLib3Session or not all(hasattr(session, name) for name in _READ):
            return False
        handlers = client.meta.events._emitter._handlers  # noqa: SLF001 - the same
        found = [handler for stage in _STAGES for handler in handlers.prefix_search(f"{stage}.s3.GetObject")]
    except AttributeError:  # another kind of client, or of botocore
        return False
    return all(_is_botocores(handler) for handler in found)


def _is_botocores(handler: Any) -> bool:
    module = str(getattr(handler, "__module__", None) or type(handler).__module__)
    return module.partition(".")[0] in ("botocore", "boto3") and module != "botocore.stub"


def _taken(client: Any, arguments: Mapping[str, Any]) -> Any:
    """Have the client make a request, and take it away before it is sent; None where it was sent after all."""
    from botocore.awsrequest import AWSResponse  # noqa: PLC0415 - late: slow to import

    taken: list[Any] = []

    def take(request: Any, **_: Any) -> Any:
        if taken or threading.get_ident() != here:  # another thread's request is none of ours
            return None
        taken.append(request)
        return AWSResponse(request.url, 200, {}, io.BytesIO())

    here = threading.get_ident()
    events = client.meta.events
    events.register_first("before-send.s3.GetObject", take, unique_id="modelcache")
    try:
        client.get_object(**arguments)["Body"].close()
    finally:
        events.unregister("before-send.s3.GetObject", take, unique_id="modelcache")
    return taken[0] if taken else None


def _has_proxy(client: Any, url: str) -> bool:
    from botocore.utils import get_environ_proxies  # noqa: PLC0415 - late: slow to import

    return bool(client.meta.config.proxies or get_environ_proxies(url))


def _netloc(url: urllib.parse.SplitResult) -> str:
    """Return host and port as they are signed: without the port that the scheme has anyway."""
    usual = {"http": 80, "https": 443}.get(url.scheme)
    host = url.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return host if url.port in (None, usual) else f"{host}:{url.port}"


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)

"""GETs signed by botocore's signer for S3; imported late, as botocore is slow to import.

Which requests are signed, and with whose credentials, is ``s3_signing``'s business.
"""

from collections.abc import Mapping
from typing import Any

import attrs
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest

_DERIVED = 16  # keys kept: four for each day and each secret


class _Get(AWSRequest):  # type: ignore[misc] # untyped
    """A request that has no body; botocore's own prepares the whole request again to find that out."""

    body = None

    def __init__(self, base: str, target: str) -> None:
        super().__init__("GET", base + target)
        self.path, _, self.query = target.partition("?")


class _Headers(dict[str, str]):
    """Headers of different names, with what the signer asks of botocore's own kind, which is that of e-mail."""

    def get_all(self, name: str) -> list[str]:
        return [self[name]]


class _Auth(S3SigV4Auth):  # type: ignore[misc] # untyped
    """A signer that signs all headers there are.

    Args:
        signer: whose keys these are.
    """

    def __init__(self, signer: "Signer") -> None:
        super().__init__(signer.credentials.get_frozen_credentials(), signer.service, signer.region)
        self._derived = signer.derived

    def _sign(self, key: bytes, msg: str, hex: bool = False) -> Any:  # noqa: FBT001, FBT002 - botocore's
        """Compute an HMAC; four of five are the same for all requests of a day."""
        if hex:
            return super()._sign(key, msg, hex)
        found = self._derived.get((key, msg))
        if found is None:
            if len(self._derived) >= _DERIVED:
                self._derived.clear()
            found = self._derived[key, msg] = super()._sign(key, msg)
        return found

    def canonical_request(self, request: _Get) -> str:
        """Put together what is signed, as botocore does, which would take the URL apart to find path and query."""
        headers = self.headers_to_sign(request)
        named, names = self.canonical_headers(headers), self.signed_headers(headers)
        body = request.headers["X-Amz-Content-SHA256"]  # set just before
        return f"{request.method}\n{request.path}\n{request.query}\n{named}\n\n{names}\n{body}"

    def headers_to_sign(self, request: AWSRequest) -> _Headers:
        return _Headers((name.lower(), value) for name, value in request.headers.items())


@attrs.frozen
class Signer:
    """Signs for one region.

    Concurrency: may be used by all threads.

    Attributes:
        credentials: botocore's, refreshed by itself.
        service, region: that the signature is for.
        derived: keys derived from the secret for a day, region and service.
    """

    credentials: Any
    service: str
    region: str
    derived: dict[tuple[bytes, str], bytes] = attrs.field(factory=dict, repr=False, eq=False)

    def sign(self, base: str, target: str, headers: Mapping[str, str]) -> dict[str, str]:
        """Return these headers and those that sign them.

        Args:
            base: scheme and host.
            target: path and query, quoted; no more than one argument.
            headers: all that are to be signed, ``Host`` among them; no name twice, in whichever case.

        Raises:
            botocore.exceptions.BotoCoreError: the credentials could not be refreshed.
        """
        request = _Get(base, target)
        request.headers = _Headers(headers)
        _Auth(self).add_auth(request)
        return dict(request.headers)

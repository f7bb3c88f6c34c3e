"""What errors of botocore, urllib3 and sockets mean: the one place where they become ours.

Which of them are tried again, and how often, is decided by ``s3_stream``; errors of the user's own functions
and hooks are not touched.
"""

import http.client
from typing import Any

import attrs

from modelcache.errors import (
    AccessDenied,
    ArtifactChanged,
    ArtifactCorrupt,
    ConfigError,
    ModelCacheError,
    ModelNotFound,
    SourceUnavailable,
)


@attrs.frozen
class Place:
    """What a request is about, for messages.

    Attributes:
        model: id.
        source: URL of the source.
        url: URL of the object or prefix.
    """

    model: str
    source: str
    url: str

    def __str__(self) -> str:
        return f"model {self.model!r}: {self.url}"


@attrs.frozen
class Verdict:
    """What an error means.

    Attributes:
        error: ours, to be raised from the foreign one.
        retry: whether the same request may succeed a little later.
        after: seconds that the store asks to wait before.
    """

    error: ModelCacheError
    retry: bool = False
    after: float = 0.0


CREDENTIAL_CODES = frozenset(
    {
        "AuthFailure",
        "CredentialRetrievalError",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidIdentityToken",
        "InvalidToken",
        "NoAuthTokenError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "RefreshWithMFAUnsupportedError",
        "RequestExpired",
        "SSOTokenLoadError",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
        "UnrecognizedClientException",
    }
)
"""Codes of S3 and STS, and classes of botocore, that say: other credentials are needed."""

_SETTINGS = {
    "InvalidConfigError",
    "InvalidEndpointConfigurationError",
    "InvalidProxiesConfigError",
    "InvalidRegionError",
    "InvalidRetryConfigurationError",
    "InvalidRetryModeError",
    "InvalidS3AddressingStyleError",
    "MissingDependencyException",
    "NoRegionError",
    "ParamValidationError",
    "UnknownSignatureVersionError",
    "UnsupportedS3ArnError",
    "UnsupportedS3ConfigurationError",
}
_CONNECTION = {
    "ConnectionError",
    "HTTPClientError",
    "IncompleteReadError",
}  # their subclasses too: timeouts, resets, TLS, DNS
_BUSY = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout", "InternalError"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307"}
_MISSING = {"NoSuchKey", "NoSuchVersion", "404"}
_GONE = _MISSING | {"PreconditionFailed", "InvalidRange"}
_LONGEST_TEXT = 300  # characters of a store's own message that are shown


def answer_of(error: BaseException) -> tuple[str, int] | None:
    """Return code and HTTP status of an answer that botocore raised as ClientError; None for other errors."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(response.get("Error", {}).get("Code", "")) or str(status)
    return code, int(status) or (int(code) if code.isdecimal() else 0)


def judge(error: Exception, place: Place, *, pinned: str | None = None) -> Verdict | None:
    """Return what a foreign error means; None for one that is no business of ours.

    Args:
        error: what the client raised.
        place: what was asked for.
        pinned: the version that is being read; None while it is looked for.
    """
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - late: boto3 is slow to import
    from urllib3.exceptions import HTTPError  # noqa: PLC0415 - the same

    if isinstance(error, ModelCacheError):
        return None
    if isinstance(error, ClientError):
        return _answered(error, place, pinned)
    if isinstance(error, BotoCoreError):
        return _not_asked(error, place, pinned)
    if isinstance(error, HTTPError | OSError | http.client.HTTPException):
        return _no_answer(error, place)
    return None


def _not_asked(error: Exception, place: Place, pinned: str | None) -> Verdict:
    """Judge what botocore itself raised: no answer of the store, or none that could be read."""
    names = {kind.__name__ for kind in type(error).__mro__}
    code = type(error).__name__
    if "FlexibleChecksumError" in names:
        text = f"{place}: {_cut(str(error))}"
        return Verdict(ArtifactCorrupt(text, model=place.model, source=place.source, version=pinned))
    if names & CREDENTIAL_CODES:
        return _denied(place, code, _cut(str(error)), "check the credentials of this process")
    if names & _SETTINGS:
        text = f"{place}: the S3 client refuses its settings ({code}: {_cut(str(error))})"
        return Verdict(ConfigError(text, model=place.model, setting="client"))
    if names & _CONNECTION:
        return _no_answer(error, place)
    text = f"{place}: the S3 client failed ({code}: {_cut(str(error))})"
    return Verdict(SourceUnavailable(text, model=place.model, source=place.source, code=code))


def _no_answer(error: BaseException, place: Place) -> Verdict:
    text = f"{place}: no (whole) answer: {_root(error)}; check endpoint, network and proxy settings"
    return Verdict(SourceUnavailable(text, model=place.model, source=place.source), retry=True)


def _root(error: BaseException) -> str:
    """Return what went wrong at the bottom; the texts above it may hold signed URLs."""
    seen: set[int] = set()
    first = type(error).__name__
    while id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__ or error.__context__ or error
    text = error.strerror if isinstance(error, OSError) else None
    return f"{first} ({text})" if text else first


def _answered(error: Any, place: Place, pinned: str | None) -> Verdict:
    """Judge an error that the store answered."""
    code, status = answer_of(error) or ("", 0)
    if code == "NoSuchBucket":
        return _unavailable(place, code, f"there is no such bucket at this endpoint ({code}); check name and endpoint")
    if pinned is not None and (code in _GONE or status in (404, 412, 416)):
        text = f"{place}: was replaced or deleted while it was read ({code}); version {pinned} is gone"
        return Verdict(ArtifactChanged(text, model=place.model, source=place.source, version=pinned))
    if code in _MISSING or status in (404, 405):  # 405: the version is a delete marker
        text = f"{place}: there is no such object ({code})"
        return Verdict(ModelNotFound(text, model=place.model, source=place.source, tried=(place.url,)))
    said = _cut(str(error.response.get("Error", {}).get("Message", "")))
    if code != "InvalidObjectState" and (code in CREDENTIAL_CODES or status in (401, 403)):
        return _denied(place, code, said, _denial_hint(code))
    if code in _BUSY or status == 429 or status >= 500:  # noqa: PLR2004 - HTTP
        verdict = _unavailable(place, code, f"the store is too busy, or broken ({code} {said})")
        return attrs.evolve(verdict, retry=True, after=_wait_told(error))
    return _unavailable(place, code, _refusal(code, said))


def _denial_hint(code: str) -> str:
    if code in CREDENTIAL_CODES:
        return "new credentials are needed; the next call looks for them"
    if code == "RequestTimeTooSkewed":
        return "set this machine's clock"
    return "allow s3:GetObject (and s3:ListBucket: without it a missing key looks the same)"


def _refusal(code: str, said: str) -> str:
    if code == "InvalidObjectState":
        return "lies in an archive storage class (Glacier); restore it first"
    if code in _REGION:
        return f"is in another region ({code} {said}); set the client's region or endpoint"
    return f"the store refuses the request ({code} {said})"


def _unavailable(place: Place, code: str, text: str) -> Verdict:
    return Verdict(SourceUnavailable(f"{place}: {text}", model=place.model, source=place.source, code=code))


def _denied(place: Place, code: str, said: str, hint: str) -> Verdict:
    text = f"{place}: access denied ({f'{code}: {said}' if said else code}); {hint}"
    return Verdict(AccessDenied(text, model=place.model, source=place.url, code=code))


def _wait_told(error: Any) -> float:
    """Return the seconds of a ``Retry-After`` header; 0 where there is none."""
    told = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    return float(told) if str(told).isdecimal() else 0.0


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."

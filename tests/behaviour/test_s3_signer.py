"""The signer of requests that the library makes itself: to the letter what botocore's own makes."""

import urllib.parse

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from modelcache.sources.s3_signer import Signer


@pytest.mark.parametrize("token", [None, "session"])
@pytest.mark.parametrize("base", ["http://127.0.0.1:9000", "https://bucket.s3.amazonaws.com"])
@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/bucket/a/b.tar.gz",
        "/bucket/../a//b",
        f"/{urllib.parse.quote('é ü/x+y~;=&#?', safe='/~')}",
        "/a?versionId=3.L4kq-t_J~x",
    ],
)
def test_signature_is_botocores(target: str, base: str, token: str | None) -> None:
    """Date, token and signature of any path are those of botocore's own signer, given the same headers."""
    credentials = Credentials("AKIDEXAMPLE", "secret", token)
    headers = {"Host": base.partition("://")[2], "x-amz-checksum-mode": "ENABLED", "x-amz-request-payer": "requester"}
    signer = Signer(credentials, "s3", "eu-central-1")
    ours, theirs = dict[str, str](), AWSRequest("GET", base + target, headers=headers)
    while ours.get("X-Amz-Date") != theirs.headers.get("X-Amz-Date") or not ours:  # a second may end between
        ours = signer.sign(base, target, headers)
        theirs = AWSRequest("GET", base + target, headers=headers)
        S3SigV4Auth(credentials.get_frozen_credentials(), "s3", "eu-central-1").add_auth(theirs)
    assert ours == dict(theirs.headers)

"""GETs signed by botocore's signer for S3; imported late, as botocore is slow to import.

Which requests are signed, and with whose credentials, is ``s3_signing``'s business.
"""

from collections.abc import Mapping
from typing import Any

import attrs
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest


class _Get(AWSRequest):  # type: ignore[misc] # untyped
    """A request that has no body; botocore's own prepares the whole request again to find that out."""

    body = None


@attrs.frozen
class Signer:
    """Signs for one region.

    Concurrency: may be used by all threads.

    Attributes:
        credentials: botocore's, refreshed by itself.
        service, region: that the signature is for.
    """

    credentials: Any
    service: str
    region: str

    def sign(self, url: str, headers: Mapping[str, str]) -> dict[str, str]:
        """Return these headers and those that sign them.

        Args:
            url: the whole.
            headers: with ``Host``: without it the signer parses the URL for it, twice, a third of its time.

        Raises:
            botocore.exceptions.BotoCoreError: the credentials could not be refreshed.
        """
        request = _Get("GET", url, headers=headers)
        S3SigV4Auth(self.credentials.get_frozen_credentials(), self.service, self.region).add_auth(request)
        return dict(request.headers.raw_items())

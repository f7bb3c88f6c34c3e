"""S3 stores as tests see them: a client, buckets, objects."""

import functools
import io
import itertools
import random
import tarfile
import threading
from typing import Any

import attrs
import boto3.session
from botocore.config import Config

_numbers = itertools.count(1)
_making = threading.Lock()  # guards the shared sessions, which are not thread-safe


@functools.cache
def _session(access_key: str, secret_key: str) -> boto3.session.Session:
    """Return a session that clients share: a second client then takes 10 ms, not 100."""
    return boto3.session.Session(access_key, secret_key, region_name="us-east-1")


def noise(size: int, seed: int = 0) -> bytes:
    """Return bytes that look random and are the same for the same seed."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - no secret


def tar_gz(files: dict[str, bytes]) -> bytes:
    """Return a ``.tar.gz`` of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@attrs.frozen
class Store:
    """One S3 store that runs now.

    Attributes:
        name: ``"moto"`` or ``"ceph"``.
        endpoint: its URL.
        access_key, secret_key: credentials that may do all.
    """

    name: str
    endpoint: str
    access_key: str
    secret_key: str

    def at(self, endpoint: str) -> "Store":
        """Return the same store behind another URL, such as a proxy's."""
        return attrs.evolve(self, endpoint=endpoint)

    def session(self) -> boto3.session.Session:
        """Return a new session with the store's credentials."""
        return _session.__wrapped__(self.access_key, self.secret_key)

    def client(self, **config: Any) -> Any:
        """Return a new client, without retries unless told otherwise."""
        settings = {"retries": {"total_max_attempts": 1}, "s3": {"addressing_style": "path"}, **config}
        with _making:
            return _session(self.access_key, self.secret_key).client(
                "s3", endpoint_url=self.endpoint, config=Config(**settings)
            )

    def bucket(self) -> "Bucket":
        """Return a new, empty bucket."""
        client = self.client()
        name = f"models-{next(_numbers)}-{random.randrange(10**9)}"  # noqa: S311 - no secret
        client.create_bucket(Bucket=name)
        return Bucket(self, name, client)


@attrs.frozen
class Bucket:
    """One bucket.

    Attributes:
        store: where it is.
        name: its name.
        client: a client to fill it with.
    """

    store: Store
    name: str
    client: Any

    @property
    def url(self) -> str:
        """Its ``s3://`` URL."""
        return f"s3://{self.name}"

    def put(self, key: str, body: bytes, **arguments: Any) -> dict[str, Any]:
        """Put one object and return the answer."""
        answer: dict[str, Any] = self.client.put_object(Bucket=self.name, Key=key, Body=body, **arguments)
        return answer

    def put_parts(self, key: str, *parts: bytes, **arguments: Any) -> dict[str, Any]:
        """Put one object as a multipart upload; all parts but the last have 5 MiB at least."""
        where = {"Bucket": self.name, "Key": key}
        algorithm = arguments.get("ChecksumAlgorithm")
        told = {"ChecksumAlgorithm": algorithm} if algorithm else {}
        upload = self.client.create_multipart_upload(**where, **arguments)["UploadId"]
        done = []
        for number, part in enumerate(parts, start=1):
            answer = self.client.upload_part(**where, UploadId=upload, PartNumber=number, Body=part, **told)
            sums = {
                name: value for name, value in answer.items() if name.startswith("Checksum") and name[-4:] != "Type"
            }
            done.append({"PartNumber": number, "ETag": answer["ETag"], **sums})
        answer = self.client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": done})
        return dict(answer)

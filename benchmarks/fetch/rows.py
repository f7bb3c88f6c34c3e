"""The rows: each takes an endpoint and an empty folder, and leaves a usable file or folder there.

A row whose library is not installed says so by ImportError. All but the limits speak S3 with dummy credentials.
"""

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

from benchmarks.fetch.data import ARCHIVE, FILE, FOLDER, MIB
from benchmarks.fetch.server import BUCKET

KEYS = {"file": FILE, "archive": ARCHIVE, "folder": f"{FOLDER}/"}
_READ = 8 * MIB


@attrs.frozen
class Job:
    """One thing to fetch.

    Attributes:
        case: ``"file"``, ``"archive"`` or ``"folder"``.
        endpoint: where the server is.
        target: an empty folder.
        source: the served object or folder on this machine's disk, for the limits.
    """

    case: str
    endpoint: str
    target: Path
    source: Path

    @property
    def key(self) -> str:
        """Key or prefix."""
        return KEYS[self.case]


@attrs.frozen
class _Staged:
    target: Path
    spool: Path


def _session() -> Any:
    import boto3.session  # noqa: PLC0415 - the row's own

    return boto3.session.Session("dummy", "dummy", region_name="us-east-1")


def _client(job: Job) -> Any:
    from botocore.config import Config  # noqa: PLC0415 - the row's own

    config = Config(s3={"addressing_style": "path"}, max_pool_connections=32)
    return _session().client("s3", endpoint_url=job.endpoint, config=config)


def _unpack(job: Job, path: Path) -> None:
    if job.case == "archive":
        with tarfile.open(path) as archive:
            archive.extractall(job.target, filter="data")
        path.unlink()


def ours(job: Job) -> Callable[[], None]:
    """Return what fetches as the cache does, without its final sync."""
    from botocore.config import Config  # noqa: PLC0415 - the row's own

    from modelcache.fetch import fetch  # noqa: PLC0415 - the row's own
    from modelcache.sources import S3Source  # noqa: PLC0415 - the row's own

    config = Config(s3={"addressing_style": "path"})
    source = S3Source(
        f"s3://{BUCKET}", key=lambda _: job.key, session=_session(), endpoint_url=job.endpoint, config=config
    )
    staged = _Staged(job.target, job.target.parent / "spool")
    source.find("m")  # the other rows have their clients made before, too

    def run() -> None:
        fetch(source, source.find("m"), staged, grow=lambda _: None, check=lambda: None, mode=0o700)

    return run


def boto3_download(job: Job, transfer: str = "classic") -> Callable[[], None]:
    """Return ``download_file``, then ``tarfile``."""
    from boto3.s3.transfer import TransferConfig  # noqa: PLC0415 - the row's own

    if transfer == "crt":
        import awscrt  # noqa: F401, PLC0415 - is it there?
    client = _client(job)
    config = TransferConfig(preferred_transfer_client=transfer)

    def one(key: str) -> None:
        path = job.target / key.rpartition("/")[2]
        client.download_file(BUCKET, key, str(path), Config=config)

    def run() -> None:
        if job.case == "folder":
            with ThreadPoolExecutor(8) as pool:
                for _ in pool.map(one, _listed(client, job.key)):
                    pass
            return
        one(job.key)
        _unpack(job, job.target / job.key)

    return run


def boto3_crt(_job: Job) -> Callable[[], None]:
    """Return the same with boto3's CRT client, which drops the endpoint and so can't be measured here."""
    raise ImportError("boto3's CRT path drops endpoint_url and Config, so it can't reach this server")


def boto3_get(job: Job) -> Callable[[], None]:
    """Return ``get_object``: streamed into ``tarfile`` or a file; for a folder four threads."""
    client = _client(job)

    def one(key: str) -> None:
        with (job.target / key.rpartition("/")[2]).open("wb") as out:
            shutil.copyfileobj(client.get_object(Bucket=BUCKET, Key=key)["Body"], out, MIB)

    def run() -> None:
        if job.case == "folder":
            with ThreadPoolExecutor(4) as pool:
                for _ in pool.map(one, _listed(client, job.key)):
                    pass
        elif job.case == "archive":
            body = client.get_object(Bucket=BUCKET, Key=job.key)["Body"]
            with tarfile.open(fileobj=body, mode="r|gz") as archive:
                archive.extractall(job.target, filter="data")
        else:
            one(job.key)

    return run


def _listed(client: Any, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page["Contents"]]


def aws_cp(job: Job) -> Callable[[], None]:
    """Return ``aws s3 cp``, then ``tarfile``."""
    program = shutil.which("aws", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        raise ImportError("aws is not installed")
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": "dummy",
        "AWS_SECRET_ACCESS_KEY": "dummy",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    target = str(job.target) if job.case == "folder" else str(job.target / job.key)
    more = ["--recursive"] if job.case == "folder" else []
    url = f"s3://{BUCKET}/{job.key}"
    command = [program, "s3", "cp", "--quiet", "--endpoint-url", job.endpoint, url, target, *more]

    def run() -> None:
        subprocess.run(command, check=True, env=environment)
        _unpack(job, job.target / job.key)

    return run


def obstore(job: Job) -> Callable[[], None]:
    """Return obstore: streamed to a file; for a folder sixteen threads."""
    from obstore.store import S3Store  # noqa: PLC0415 - the row's own

    store = S3Store(
        BUCKET,
        endpoint=job.endpoint,
        access_key_id="dummy",
        secret_access_key="dummy",  # noqa: S106 - no secret
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )

    def one(key: str) -> None:
        with (job.target / key.rpartition("/")[2]).open("wb") as out:
            for chunk in store.get(key).stream(min_chunk_size=MIB):
                out.write(chunk)

    def run() -> None:
        if job.case == "folder":
            keys = [entry["path"] for page in store.list(job.key) for entry in page]
            with ThreadPoolExecutor(16) as pool:
                for _ in pool.map(one, keys):
                    pass
            return
        one(job.key)
        _unpack(job, job.target / job.key)

    return run


def s3fs(job: Job) -> Callable[[], None]:
    """Return s3fs' ``get``, then ``tarfile``."""
    from s3fs import S3FileSystem  # noqa: PLC0415 - the row's own

    system = S3FileSystem(
        key="dummy",
        secret="dummy",  # noqa: S106 - no secret
        client_kwargs={"endpoint_url": job.endpoint, "region_name": "us-east-1"},
        config_kwargs={"s3": {"addressing_style": "path"}},
        skip_instance_cache=True,
    )

    def run() -> None:
        if job.case == "folder":
            keys = [entry for entry in system.find(f"{BUCKET}/{job.key}") if not entry.endswith("/")]
            system.get(keys, [str(job.target / entry.rpartition("/")[2]) for entry in keys])
            return
        system.get_file(f"{BUCKET}/{job.key}", str(job.target / job.key))
        _unpack(job, job.target / job.key)

    return run


def raw_sockets(job: Job) -> Callable[[], None]:
    """Return the limit of the network path: four sockets, ``recv_into`` and ``pwrite``, nothing checked."""
    if job.case != "file":
        raise ImportError("only for one file")
    size = job.source.stat().st_size
    url = urlsplit(job.endpoint)

    def part(descriptor: int, start: int, end: int) -> None:
        with socket.create_connection((url.hostname, url.port)) as link:
            text = f"GET /{BUCKET}/{job.key} HTTP/1.1\r\nHost: x\r\nRange: bytes={start}-{end - 1}\r\n\r\n"
            link.sendall(text.encode())
            buffer = bytearray(256 * 1024)
            view = memoryview(buffer)
            got = link.recv_into(view)
            at = start
            begin = buffer.index(b"\r\n\r\n") + 4
            while True:
                os.pwrite(descriptor, view[begin:got], at)
                at += got - begin
                if at >= end:
                    return
                begin, got = 0, link.recv_into(view)

    def run() -> None:
        descriptor = os.open(job.target / job.key, os.O_WRONLY | os.O_CREAT)
        step = -(-size // 4)
        bounds = [(start, min(start + step, size)) for start in range(0, size, step)]
        threads = [threading.Thread(target=part, args=(descriptor, *bound)) for bound in bounds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.close(descriptor)

    return run


def decode_zlib(job: Job) -> Callable[[], None]:
    """Return the limit of unpacking with the standard library: gzip decoded from memory, kept nowhere."""
    return _decode_alone(job, zlib.decompressobj)


def decode_isal(job: Job) -> Callable[[], None]:
    """Return the same with isal."""
    from isal import isal_zlib  # noqa: PLC0415 - the row's own

    return _decode_alone(job, isal_zlib.decompressobj)


def _decode_alone(job: Job, make: Callable[[int], Any]) -> Callable[[], None]:
    if job.case != "archive":
        raise ImportError("only for the archive")

    def run() -> None:
        decoder = make(31)
        with job.source.open("rb", buffering=0) as stored:
            data = stored.read(256 * 1024)
            while data:
                decoder.decompress(data, MIB)
                data = decoder.unconsumed_tail or stored.read(256 * 1024)

    return run


def write_alone(job: Job) -> Callable[[], None]:
    """Return the limit of the disk: the same bytes from memory, to as many files."""
    files = [job.source] if job.case != "folder" else sorted(job.source.iterdir())
    if job.case == "archive":
        raise ImportError("the decoder is the limit there")
    blocks = [path.read_bytes() for path in files[:1]]

    def run() -> None:
        for path in files:
            with (job.target / path.name).open("wb", buffering=0) as out:
                view = memoryview(blocks[0])
                while view:
                    view = view[out.write(view[: 4 * MIB]) :]

    return run


ROWS: dict[str, Callable[[Job], Callable[[], None]]] = {
    "modelcache": ours,
    "boto3 download_file": boto3_download,
    "boto3 get_object": boto3_get,
    "boto3 with CRT": boto3_crt,
    "aws s3 cp": aws_cp,
    "obstore": obstore,
    "s3fs": s3fs,
    "limit: raw sockets": raw_sockets,
    "limit: zlib alone": decode_zlib,
    "limit: isal alone": decode_isal,
    "limit: write alone": write_alone,
}

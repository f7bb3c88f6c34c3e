"""The rows: each takes an endpoint and an empty folder, and leaves a usable file or folder there.

A row whose library is not installed says so by ImportError. All but the limits speak S3 with dummy credentials.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs

from benchmarks.fetch.data import MIB
from benchmarks.fetch.job import Job, NotThisCase
from benchmarks.fetch.limits import decode_isal, decode_zlib, decode_zlib_ng, raw_sockets, write_alone
from benchmarks.fetch.server import BUCKET


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


def ours(job: Job, decoder: Any = None) -> Callable[[], None]:
    """Return what fetches as the cache does, without its final sync; ``decoder``: by this zlib."""
    from botocore.config import Config  # noqa: PLC0415 - the row's own

    from modelcache.archives import codecs  # noqa: PLC0415 - the row's own
    from modelcache.fetch import fetch  # noqa: PLC0415 - the row's own
    from modelcache.sources import S3Source  # noqa: PLC0415 - the row's own

    config = Config(s3={"addressing_style": "path"})
    source = S3Source(
        f"s3://{BUCKET}", key=lambda _: job.key, session=_session(), endpoint_url=job.endpoint, config=config
    )
    staged = _Staged(job.target, job.target.parent / "spool")
    source.find("m")  # the other rows have their clients made before, too
    if decoder is not None:
        codecs.zlib_module = lambda: decoder

    def run() -> None:
        quiet = {"grow": lambda _: None, "check": lambda: None, "count": lambda _: None}
        fetch(source, source.find("m"), staged, **quiet, mode=0o700)

    return run


def ours_standard(job: Job) -> Callable[[], None]:
    """Return the same without the extra: gzip decoded by the standard library."""
    if job.case != "archive":
        raise NotThisCase
    return ours(job, zlib)


def boto3_download(job: Job) -> Callable[[], None]:
    """Return ``download_file``, then ``tarfile``."""
    from boto3.s3.transfer import TransferConfig  # noqa: PLC0415 - the row's own

    client = _client(job)
    config = TransferConfig(preferred_transfer_client="classic")

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
    """Return the same with boto3's CRT client, which can't be measured against nginx."""
    raise ImportError("boto3's CRT path drops the endpoint; given one by hand, awscrt waits for ever at nginx's ETags")


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
    more = ["--recursive"] if job.case == "folder" else []
    return _program(job, "aws", ["s3", "cp", "--quiet", "--endpoint-url", job.endpoint], more)


def s5cmd(job: Job) -> Callable[[], None]:
    """Return ``s5cmd cp``, then ``tarfile``."""
    return _program(job, "s5cmd", ["--log", "error", "--endpoint-url", job.endpoint, "cp"], [], "*")


def _program(job: Job, name: str, before: list[str], after: list[str], every: str = "") -> Callable[[], None]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which(name, path=path)
    if program is None:
        raise ImportError(f"{name} is not installed")
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": "dummy",
        "AWS_SECRET_ACCESS_KEY": "dummy",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    folder = job.case == "folder"
    target = f"{job.target}/" if folder else str(job.target / job.key)
    url = f"s3://{BUCKET}/{job.key}{every if folder else ''}"

    def run() -> None:
        subprocess.run([program, *before, url, target, *after], check=True, env=environment)
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


ROWS: dict[str, Callable[[Job], Callable[[], None]]] = {
    "modelcache": ours,
    "modelcache, standard zlib": ours_standard,
    "boto3 download_file": boto3_download,
    "boto3 get_object": boto3_get,
    "boto3 with CRT": boto3_crt,
    "aws s3 cp": aws_cp,
    "s5cmd": s5cmd,
    "obstore": obstore,
    "s3fs": s3fs,
    "limit: raw sockets": raw_sockets,
    "limit: zlib alone": decode_zlib,
    "limit: zlib-ng alone": decode_zlib_ng,
    "limit: isal alone": decode_isal,
    "limit: write alone": write_alone,
}

"""The two servers of the demo, each a process of its own on 127.0.0.1: an S3 store (moto) and gunicorn with Flask.

Both end with the ``with`` block that started them, and where ``setpriv`` is installed also with this process.
"""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

HERE = Path(__file__).resolve().parent
BUCKET = "models"
REQUEST_THREADS = 16
_KEYS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_DEFAULT_REGION": "us-east-1"}
_ENDS_IN = 15.0  # seconds


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    """Return whether a server answers, whatever it says; gunicorn listens long before its worker is there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


@contextlib.contextmanager
def _running(module: str, arguments: list[str], port: int, log: Path, **environment: str) -> Iterator[int]:
    """Run a server on ``port`` until the block ends; yield the port once it answers.

    Raises:
        RuntimeError: it ended at once, or does not answer after a while; with the end of its log.
    """
    setpriv = shutil.which("setpriv")
    guard = [setpriv, "--pdeathsig", "TERM"] if setpriv else []
    process = None
    with log.open("wb") as output:
        try:
            # A session of its own: Ctrl-C is for this process, which then ends the servers in order.
            process = subprocess.Popen(
                [*guard, sys.executable, "-m", module, *arguments],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            deadline = time.monotonic() + 60
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{module} did not start:\n{log.read_text(errors='replace')[-2000:]}")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.05)
            yield port
        finally:
            if process is not None:
                process.terminate()
                try:
                    process.wait(timeout=_ENDS_IN)
                except subprocess.TimeoutExpired:
                    process.kill()


@contextlib.contextmanager
def s3_store(folder: Path) -> Iterator[tuple[str, Any]]:
    """Run an S3 store with one empty bucket; yield its URL and a client."""
    port = _free_port()
    with _running("moto.server", ["-H", "127.0.0.1", "-p", str(port)], port, folder / "s3.log"):
        url = f"http://127.0.0.1:{port}"
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id=_KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=_KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name=_KEYS["AWS_DEFAULT_REGION"],
            config=Config(s3={"addressing_style": "path"}),
        )
        client.create_bucket(Bucket=BUCKET)
        yield url, client


@contextlib.contextmanager
def flask_server(folder: Path, s3_url: str) -> Iterator[int]:
    """Run the Flask example under gunicorn, one worker with threads; yield its port."""
    port = _free_port()
    arguments = [
        *("--bind", f"127.0.0.1:{port}", "--worker-class", "gthread", "--workers", "1"),
        *("--threads", str(REQUEST_THREADS), "--keep-alive", "60", "--graceful-timeout", "5"),
        *("--pythonpath", f"{HERE.parent},{HERE}", "--no-control-socket", "--worker-tmp-dir", str(folder)),
        "wsgi:app",
    ]
    settings = {
        "MODELCACHE_SOURCE": f"s3://{BUCKET}",
        "MODELCACHE_DISK": str(folder / "disk"),
        "MODELCACHE_LOADERS": "2",
        "AWS_ENDPOINT_URL": s3_url,
        # glibc keeps what a thread's arena has free at its end, up to 64 MiB each; this makes it give that back.
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with _running("gunicorn", arguments, port, folder / "server.log", **settings, **_KEYS):
        yield port

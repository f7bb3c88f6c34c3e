"""moto's S3 server in a process of its own: the light stand-in, and the one that tells checksums.

It accepts any credentials and closes each connection after its answer.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import free_port, listens, running, wait_until
from tests.support.s3 import Store


@contextlib.contextmanager
def moto() -> Iterator[Store]:
    """Run a store until the block ends."""
    with tempfile.TemporaryDirectory(prefix="modelcache-moto-") as folder:
        log = Path(folder) / "out.log"
        port = free_port()
        command = (sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
        with running(command, log) as process:
            wait_until(lambda: listens(port), process, log)
            yield Store("moto", f"http://127.0.0.1:{port}", "testing-access", "testing-secret")

"""AWS Multi Model Server, running as ``docs/examples/mms`` sets it up but for ports and folders.

From the packages ``multi-model-server`` (PyPI) and ``openjdk-17-jre-headless`` (Debian), or any Java from 8 on.
"""

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import psutil

from tests.support.processes import listens, running, wait_until
from tests.support.waiting import eventually

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "mms"
PROGRAM = Path(sys.executable).with_name("multi-model-server")  # workers run in this environment, too
REQUEST = 20.0  # seconds that a request may take
PORTS = (20_000, 32_000)  # MMS takes none that could be a client's

# MMS finds Java under JAVA_HOME. Its launcher, once killed, would leave it behind.
_JAVA = """#!/bin/sh
exec {guard} {java} "$@"
"""


def missing() -> tuple[str, ...]:
    """Return what is not installed."""
    return tuple(
        name for name, there in (("multi-model-server", PROGRAM.exists()), ("java", shutil.which("java"))) if not there
    )


def runs(process: psutil.Process) -> bool:
    """Return whether a process has not ended. Hold on to it: a worker whose server was killed is nobody's child."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # what has ended, and nobody has asked how
    except psutil.NoSuchProcess:
        return False


@attrs.frozen
class Server:
    """MMS, running.

    Attributes:
        java: its front end; ends it all when it ends.
        port: of both its interfaces.
        folder: the model store, with ``logs/`` and ``limits.json``.
        disk: folder of the disk tier that all workers share.
    """

    java: psutil.Process
    port: int
    folder: Path
    disk: Path

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Send one request and return status and JSON; a body of bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST)
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body)
            kind = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, {**kind, **(headers or {})})
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, json.loads(content)

    def predict(self, model: str, *rows: Any, router: str = "router") -> tuple[int, Any]:
        """Ask the router for predictions of a model."""
        target = {"X-Amzn-SageMaker-Target-Model": model}
        return self.request("POST", f"/predictions/{router}", {"inputs": rows}, target)

    def register(self, name: str, **settings: Any) -> None:
        """Register the router under one more name."""
        query = urllib.parse.urlencode({"url": "router", "model_name": name, "synchronous": "true", **settings})
        status, answer = self.request("POST", f"/models?{query}")
        assert status == 200, answer

    def ready(self, count: int, router: str = "router") -> bool:
        """Return whether this many workers of the router take requests."""
        status, answer = self.request("GET", f"/models/{router}")
        loaded = self.log("model_log").count(f"Model {router} loaded")
        return status == 200 and [worker["status"] for worker in answer["workers"]].count("READY") == count <= loaded

    def processes(self) -> list[psutil.Process]:
        """Return the Python processes that run: for each model of MMS's its server, and its forked workers."""
        return [process for process in self.java.children(recursive=True) if runs(process)]

    def workers(self) -> set[int]:
        """Return the process ids of the workers that run: those whose parent is not Java."""
        return {process.pid for process in self.processes() if process.ppid() != self.java.pid}

    def log(self, name: str) -> str:
        """Return what is in one of its logs."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "logs" / f"{name}.log").read_text()
        return ""

    def limit(self, **limits: Any) -> None:
        """Give all workers other memory limits, by one rename."""
        written = self.folder / "limits.new"
        written.write_text(json.dumps(limits))
        written.replace(self.folder / "limits.json")

    def stop(self) -> None:
        """Ask all processes to end, as systemd does, and wait until they have; Java alone would leave some behind."""
        family = [self.java, *self.processes()]
        os.killpg(os.getpgid(self.java.pid), signal.SIGTERM)
        eventually(lambda: not any(map(runs, family)))


@contextlib.contextmanager
def mms(environment: Mapping[str, str]) -> Iterator[Server]:
    """Run MMS with the example's router until the block ends; ready within a few seconds, no process is left.

    Args:
        environment: more variables for it and its workers.
    """
    with tempfile.TemporaryDirectory(prefix="modelcache-mms-", ignore_cleanup_errors=True) as name:
        folder, port, log = Path(name), _free_port(), Path(name, "out.log")
        shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
        config = folder / "config.properties"
        config.write_text(re.sub(r"(?m)(_address=.*):\d+$", rf"\g<1>:{port}", config.read_text()))
        scratch, java = folder / "scratch", folder / "bin" / "java"
        scratch.mkdir()
        java.parent.mkdir()
        variables = {
            "JAVA_HOME": name,
            "TMPDIR": str(scratch),  # of the launcher, which keeps a process id there: one server a folder
            "TEMP": str(scratch),  # of Java
            "LOG_LOCATION": f"{name}/logs",
            "METRICS_LOCATION": f"{name}/logs",
            "MODELCACHE_DISK": f"{name}/disk",
            "MODELCACHE_LIMITS": f"{name}/limits.json",
            **environment,
        }
        setpriv = shutil.which("setpriv")
        guard = f"{setpriv} --pdeathsig KILL" if setpriv else ""
        java.write_text(_JAVA.format(guard=guard, java=shutil.which("java")))
        java.chmod(0o755)
        command = [
            *("env", f"--chdir={name}", *(f"{key}={value}" for key, value in variables.items())),
            *(str(PROGRAM), "--start", "--foreground", "--mms-config", "config.properties"),
        ]
        with running(command, log) as process, contextlib.ExitStack() as stack:
            stack.callback(lambda: sys.stdout.write(log.read_text()))  # for the report of a failure
            stack.callback(_kill_group, process.pid)
            launcher = psutil.Process(process.pid)
            front = wait_until(launcher.children, process, log, seconds=20)[0]
            server = Server(front, port, folder, folder / "disk")
            wait_until(lambda: _answers(server), process, log, seconds=30)
            yield server
            if runs(front):
                server.stop()
            left = [str(path) for path in (server.disk / "tmp").glob("*")]
            assert not left, f"left under tmp/: {left}"


def _free_port() -> int:
    while listens(port := random.randrange(*PORTS)):  # noqa: S311 - no secret
        pass
    return port


def _answers(server: Server) -> bool:
    try:
        return server.ready(2)
    except (OSError, http.client.HTTPException):
        return False


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)

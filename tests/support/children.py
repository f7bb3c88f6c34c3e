"""Python scripts in processes of their own, which see the same packages as this one."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

PRELUDE = """
import faulthandler, gc, os, signal, sys, threading, time
from pathlib import Path
faulthandler.register(signal.SIGALRM, chain=True)  # dump_traceback_later hangs after a fork
signal.alarm(int(os.environ["WATCHDOG"]))
signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell's background job has it ignored
from modelcache import *
from tests.support.fakes import DictSource, FakeGauge
from tests.support.racing import *
from tests.support.waiting import eventually
"""


def source(script: str) -> str:
    """Return what Python is given: ``PRELUDE`` and the script, which must do something.

    Raises:
        AssertionError: it ends in a class or function, of which the rest became a part by its indentation.
    """
    text = PRELUDE + textwrap.dedent(script)
    last = ast.parse(text).body[-1]
    assert not isinstance(last, ast.ClassDef | ast.FunctionDef), f"the script only defines {last.name}: it is indented"
    return text


def start(
    script: str, *arguments: Any, watchdog: int = 15, under: Sequence[str] = (), **settings: Any
) -> "subprocess.Popen[str]":
    """Start a script; it dumps all stacks and ends itself after ``watchdog`` seconds.

    Args:
        script: Python, after ``PRELUDE``.
        arguments: its ``sys.argv[1:]``.
        watchdog: seconds.
        under: a command that runs it, such as that of ``injecting``.
        settings: further arguments for ``Popen``; ``env`` is added to ours.
    """
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path, "WATCHDOG": str(watchdog), **settings.pop("env", {})}
    return subprocess.Popen(
        [*under, sys.executable, "-W", "ignore::DeprecationWarning", "-c", source(script)]
        + [str(argument) for argument in arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def injecting(*faults: str, path: Path | None = None) -> list[str]:
    """Return the command under which system calls of a script fail; skips the test where that can't be done.

    Args:
        faults: as strace wants them after ``inject=``, such as ``"flock:error=ENOLCK:when=2+"``.
        path: only calls that touch this path.
    """
    strace = shutil.which("strace")
    calls = ",".join(fault.partition(":")[0] for fault in faults)
    command = [str(strace), "-f", "-qq", "--seccomp-bpf", "-o", os.devnull, "-e", f"trace={calls}"]
    if strace is None or subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs strace, and leave to trace")
    command += [] if path is None else ["-P", str(path)]
    return command + [word for fault in faults for word in ("-e", f"inject={fault}")]


def finish(child: "subprocess.Popen[str]", *, code: int | None = 0, timeout: float = 18.0) -> str:
    """Wait for a script's end, check how it ended (None: however), and return what it printed."""
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out}\n{err}") from None
    if code is not None:
        assert child.returncode == code, f"ended with {child.returncode}, not {code}\n{out}\n{err}"
    return out


def run(script: str, *arguments: Any, code: int | None = 0, timeout: float = 18.0, **settings: Any) -> str:
    """Run a script to its end; see ``start`` and ``finish``."""
    return finish(start(script, *arguments, **settings), code=code, timeout=timeout)


KILLED = -signal.SIGKILL

"""Scripts in forks of a process that has imported all: each takes a tenth of the time of an interpreter of its own.

For scripts that are killed, or end by themselves. Those to which the start or the end of an interpreter matters, or
that talk to the test, are ``children``'s.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tests.support.children import source, start

_SERVER = """
import atexit, json, tempfile, traceback
with tempfile.TemporaryDirectory() as other, small_cache(Path(other), DictSource().add("a")) as cache:
    cache.get("a")
del other, cache
KNOWN = dict(globals())
def do(script, arguments, output):
    code = 1
    try:
        signal.alarm(20)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 1), os.dup2(file, 2), os.close(file)
        sys.argv = ["-c", *arguments]
        exec(compile(script, "<script>", "exec"), dict(KNOWN))
        atexit._run_exitfuncs()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
for line in sys.stdin:
    if not (pid := os.fork()): do(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Warm:
    """A process that runs scripts in forks, one after the other.

    Args:
        write: its standard input.
        read: its standard output.
        output: where the scripts' output goes.
    """

    def __init__(self, write: IO[str], read: IO[str], output: Path) -> None:
        self._write = write
        self._read = read
        self._output = output

    def run(self, script: str, *arguments: Any) -> tuple[int, str]:
        """Run a script as ``children.run`` does; return how it ended and what it printed."""
        self._output.write_text("")
        job = [source(script), [str(argument) for argument in arguments], str(self._output)]
        print(json.dumps(job), file=self._write, flush=True)
        return int(self._read.readline()), self._output.read_text()


@contextlib.contextmanager
def warm() -> Iterator[Warm]:
    """Give one until the end of the block."""
    with (
        tempfile.TemporaryDirectory(prefix="modelcache-warm-") as folder,
        start(_SERVER, watchdog=3600, stdin=-1) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        yield Warm(server.stdin, server.stdout, Path(folder) / "output")
        server.stdin.close()

"""One file that is being written: what is known of it, its bytes written at their place and read back.

Which of its parts come when is ``s3_saving``'s business.
"""

import os
from collections.abc import Callable, Mapping

import attrs

from modelcache.sources.base import Output, RemoteFile
from modelcache.sources.checksums import Digests, computable
from modelcache.sources.s3_effort import Effort, Requests
from modelcache.sources.s3_errors import Place
from modelcache.sources.s3_get import Span
from modelcache.sources.s3_parts import SinkBroken, spans_of


@attrs.define(eq=False)
class File:
    """One file on its way.

    Attributes:
        place, file: what it is.
        open: makes it, and opens it for writing.
        spans: its parts.
        digests: of the bytes so far; None until its checksums are known.
        output: where it is written to; None before and after.
        done: numbers of the parts that are written.
        checked: parts that the digests know.
        checking: whether a thread is about to read the next of them.
        ended: whether a thread has found all of them checked.
    """

    place: Place
    file: RemoteFile
    open: Callable[[], Output]
    spans: tuple[Span, ...]
    digests: Digests | None
    output: Output | None = None
    done: set[int] = attrs.field(factory=set)
    checked: int = 0
    checking: bool = False
    ended: bool = False

    @property
    def descriptor(self) -> int:
        """Of the output; -1 where there is none."""
        return -1 if self.output is None else self.output.descriptor


def prepared(place: Place, file: RemoteFile, put: Callable[[RemoteFile], Callable[[], Output]], effort: Effort) -> File:
    """Return a file that there is room for."""
    spans = spans_of(file.size)
    checksums = file.checksums if computable(file.checksums) else None
    if checksums is None and len(spans) > 1:
        known = effort.requests.look(place, file)
        if known.unchecked:
            effort.requests.tell(place, known.unchecked)
        checksums = known.checksums
    return File(place, file, put(file), spans, None if checksums is None else Digests(checksums))


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def read_back(file: File, span: Span, digests: Digests, buffer: memoryview) -> None:
    """Let the digests have a part that was written; another process may not have changed it meanwhile."""
    offset = span.start
    while offset < span.end:
        got = os.preadv(file.descriptor, [buffer[: min(len(buffer), span.end - offset)]], offset)
        if not got:
            raise OSError(f"{file.file.name!a}: was cut short while it was written")
        digests.update(buffer[:got])
        offset += got


@attrs.define(eq=False)
class FileSink:
    """Writes what comes of one part.

    Attributes:
        file: whose part it is.
        requests: what to ask, and tell, of its checksums.
        count: hears of bytes that were written.
        buffer: where bytes lie on their way.
    """

    file: File
    requests: Requests
    count: Callable[[int], None]
    buffer: memoryview

    def answered(self, told: Mapping[str, object]) -> None:
        """Learn the checksums, where they are not known yet."""
        file = self.file
        if file.digests is None:
            known = self.requests.known(told)
            if known.unchecked:
                self.requests.tell(file.place, known.unchecked)
            file.digests = Digests(known.checksums)

    def room(self, _offset: int, /) -> memoryview:
        """Return the buffer."""
        return self.buffer

    def came(self, offset: int, size: int) -> None:
        """Write what is in the buffer."""
        view = self.buffer[:size]
        if len(self.file.spans) == 1 and self.file.digests is not None:
            self.file.digests.update(view)
        try:
            _write(self.file.descriptor, view, offset)
        except OSError as error:  # of the disk: not to be taken for one of the network
            raise SinkBroken from error
        self.count(size)

"""One file that is being written: what is known of it, its bytes written at their place and read back.

Which of its parts come when is ``s3_saving``'s business.
"""

import os
from collections.abc import Callable

import attrs

from modelcache.sources.base import RemoteFile
from modelcache.sources.checksums import Digests, computable
from modelcache.sources.s3_effort import Effort
from modelcache.sources.s3_errors import Place
from modelcache.sources.s3_get import Span
from modelcache.sources.s3_parts import spans_of

CLOSED = -1
"""Descriptor of a file that is not open."""


@attrs.define(eq=False)
class File:
    """One file on its way.

    Attributes:
        place, file: what it is.
        open: opens it for writing.
        spans: its parts.
        digests: of the bytes so far; None until its checksums are known.
        descriptor: where it is written to; -1 before and after.
        done: numbers of the parts that are written.
        checked: parts that the digests know.
        checking: whether a thread is about to read the next of them.
    """

    place: Place
    file: RemoteFile
    open: Callable[[], int]
    spans: tuple[Span, ...]
    digests: Digests | None
    descriptor: int = CLOSED
    done: set[int] = attrs.field(factory=set)
    checked: int = 0
    checking: bool = False


def prepared(place: Place, file: RemoteFile, put: Callable[[RemoteFile], Callable[[], int]], effort: Effort) -> File:
    """Return a file that there is room for."""
    spans = spans_of(file.size)
    checksums = file.checksums if computable(file.checksums) else None
    if checksums is None and len(spans) > 1:
        known = effort.requests.look(place, file)
        if known.unchecked:
            effort.requests.tell(place, known.unchecked)
        checksums = known.checksums
    return File(place, file, put(file), spans, None if checksums is None else Digests(checksums))


def write(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of it at its place."""
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

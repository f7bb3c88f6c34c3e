"""Unpacks a tar as it streams.

Covers the data of members and the end of the archive. Headers are in ``tarheaders``, compression in ``decode``,
creation in ``writer``. The whole stream is read to its end, so that the source can check it.
"""

from collections.abc import Iterator

from modelcache.archives.decode import PIECE, Decoded
from modelcache.archives.job import Job
from modelcache.archives.sniff import HEADER
from modelcache.archives.tarheaders import Headers, Member, What
from modelcache.archives.writer import Writer


def unpack_tar(decoded: Decoded, writer: Writer, job: Job) -> None:
    """Write all members; symbolic links are left to :meth:`Writer.finish`.

    Raises:
        ArtifactCorrupt: cut off, damaged, without its end marker, or with more than zeros behind it.
        UnsafeArtifact: a member that must not be made.
    """
    tar = _Tar(decoded, job)
    headers = Headers(job, tar.take, tar.offset)
    while block := tar.header():
        member = headers.next(block)
        decoded.member = member.name
        _write(member, tar, writer)
        decoded.member = None
    tar.finish()


def _write(member: Member, tar: "_Tar", writer: Writer) -> None:
    if member.what is What.FOLDER:
        writer.folder(member.name)
    elif member.what is What.SYMLINK:
        writer.symlink(member.name, member.goal)
    elif member.what is What.HARDLINK:
        writer.hardlink(member.name, member.goal)
    else:
        with writer.file(member.name, program=member.program, size=member.size) as write:
            for data in tar.data(member.size):
                write(data)


class _Tar:
    """The decoded bytes, taken in exact amounts; the data of files as views, never copied."""

    def __init__(self, decoded: Decoded, job: Job) -> None:
        self._decoded = decoded
        self._job = job
        self._piece = memoryview(b"")

    def offset(self) -> int:
        """Return where we are in the stored file: exactly where it isn't compressed, else a little further."""
        return self._decoded.offset - (0 if self._decoded.compressed else len(self._piece))

    def take(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) < size:
            raise self._cut_off()
        return data

    def header(self) -> bytes:
        """Return the next header; empty where the end marker is."""
        block = self._read(HEADER)
        if len(block) < HEADER:
            raise self._corrupt("cut off: the tar has no end marker") from EOFError("end of stream")
        return block if block.strip(b"\0") else b""

    def data(self, size: int) -> Iterator[memoryview]:
        """Give the data of one file, and pass over the padding behind it."""
        padding = -size % HEADER
        while size:
            if not (data := self._some(size)):
                raise self._cut_off()
            size -= len(data)
            yield data
        self.take(padding)

    def finish(self) -> None:
        """Read what follows the end marker, which must be zeros."""
        while data := bytes(self._some(PIECE)):
            if data.strip(b"\0"):
                raise self._corrupt(f"{data.lstrip(bytes(1))[:16]!a} follows the end of the tar")

    def _read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer at the end."""
        data = bytes(self._some(size))
        while len(data) < size and (more := self._some(size - len(data))):
            data += more
        return data

    def _some(self, size: int) -> memoryview:
        """Return 1 to ``size`` bytes, none at the end."""
        if not self._piece:
            self._piece = memoryview(self._decoded.read())
        data, self._piece = self._piece[:size], self._piece[size:]
        return data

    def _cut_off(self) -> Exception:
        error = self._corrupt("cut off")
        error.__cause__ = EOFError("end of stream")
        return error

    def _corrupt(self, what: str) -> Exception:
        return self._job.corrupt(what, self._decoded.member, self.offset())

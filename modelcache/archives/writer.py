"""Writes the members of one archive below a folder, and nothing anywhere else.

Covers creation, modes, clashes of names, links, and asking for room before each write. Does not cover reading
the archive (``tar``, ``zip``), the rules for names (``names``) and for links (``tree``), nor syncing and
publishing, which is the disk tier's.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from modelcache.archives.job import CHUNK, Job
from modelcache.archives.names import split
from modelcache.archives.tree import Node
from modelcache.blocks import BLOCK, USUAL, Blocks, set_length
from modelcache.openfiles import NewFile, OpenFile
from modelcache.units import format_bytes

_UNSTORABLE = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)
_INODE = 60  # bytes of a link's goal that take no block
_INDEX = 4 * BLOCK  # what a folder takes for its names, once these are more than one block: XFS has three for an index


class Writer:
    """Puts members into an empty folder that nobody else writes to.

    Every path on the way is a folder made here, never a link: symbolic links come last, in :meth:`finish`.
    Concurrency: one thread, one archive. After any error the folder holds junk, and is to be deleted.

    Args:
        target: the folder.
        job: for limits and errors.
        grow: called with the bytes of disk about to be used, negative for bytes given back.
        mode: mode of folders; files get its read and write bits, and its execute bits where they are programs.
        blocks: how the file system allocates.
    """

    def __init__(self, target: Path, job: Job, grow: Callable[[int], None], mode: int, blocks: Blocks = USUAL) -> None:
        self._target = target
        self._path = str(target)
        self._job = job
        self._grow = grow
        self._mode = mode | 0o700  # we must be able to fill it and to delete it
        self.blocks = blocks
        self._root = Node(parent=None, folder=True, charged=BLOCK)
        self._links: dict[Node, str] = {}
        self._members = 0

    def folder(self, name: str) -> None:
        """Make a folder, with those above it; nothing where it is there already."""
        before = self._members
        self._folder(split(name, self._job), name)
        if self._members == before:
            self._count(name)

    def file(
        self, name: str, *, program: bool = False, size: int = 0
    ) -> AbstractContextManager[Callable[[bytes | memoryview], None]]:
        """Make a file; the context is a function that appends bytes to it. A file or link of that name goes.

        Args:
            name: its path.
            program: whether its owner may execute it.
            size: bytes that it is said to have, 0 where nobody says; refused at once where that is over the limit.
        """
        self._count(name)
        self._check_size(size, name)
        node, path = self._leaf(name)
        return self._create(node, path, program=program, length=size)

    def reserve(self, name: str, size: int) -> Callable[[], OpenFile]:
        """Make room for a file of a known size; the result makes it, empty, and opens it: on any thread, once."""
        self._count(name)
        node, path = self._leaf(name)
        taken = self.blocks.charged(size)
        self._grow(taken)
        node.charged = taken
        return lambda: self._open(node, path, program=False, length=size)

    def symlink(self, name: str, goal: str) -> None:
        """Note a symbolic link; it is checked and made in :meth:`finish`."""
        self._count(name)
        with self._storing(name):
            size = len(os.fsencode(goal))
        if not goal or goal.startswith("/") or "\0" in goal or size > self._job.limits.path:
            raise self._job.unsafe("a symbolic link whose goal is absolute, empty or too long", name)
        node, path = self._leaf(name)
        node.goal = goal
        self._links[node] = path

    def hardlink(self, name: str, earlier: str) -> None:
        """Give a file that is already there a second name."""
        self._count(name)
        parts = split(earlier, self._job, name)
        old = self._find(parts)
        if old is None or old.folder or old.goal is not None:
            raise self._job.unsafe("a hard link to something that is no earlier file of this archive", name)
        if self._find(split(name, self._job)) is old:
            return
        source = self._target.joinpath(*parts)
        node, path = self._leaf(name)
        node.charged = old.charged  # what is given back once its last name goes
        try:
            with self._storing(name):
                os.link(source, path, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._copy(source, path, node)

    def finish(self) -> None:
        """Check all symbolic links, then make them.

        Raises:
            UnsafeArtifact: one leads outside the folder, or in a circle.
            ArtifactCorrupt: one leads to nothing.
        """
        for node in self._links:
            node.resolve(self._job)
        for node, path in self._links.items():
            self._grow(BLOCK + self.blocks.beside if len(node.goal or "") < _INODE else self.blocks.charged(BLOCK))
            with self._storing(node.member):
                os.symlink(node.goal or "", path)  # noqa: PTH211 - a str

    @contextlib.contextmanager
    def _create(
        self, node: Node, path: str, *, program: bool, length: int
    ) -> Iterator[Callable[[bytes | memoryview], None]]:
        if self.blocks.beside:  # which an empty file takes, too
            node.charged = self.blocks.charged(min(length, CHUNK))
            self._grow(node.charged)
        with self._open(node, path, program=program, length=length) as file:
            size = 0

            def write(data: bytes | memoryview) -> None:
                nonlocal size
                size += len(data)
                if (more := self.blocks.charged(size) - node.charged) > 0:
                    self._check_size(size, node.member)
                    self._grow(more)
                    node.charged += more
                file.write(data)

            yield write
            if size < length:
                os.ftruncate(file.descriptor, size)
            file.finish()

    def _check_size(self, size: int, member: str) -> None:
        if size > self._job.limits.file:
            raise self._job.unsafe(f"a file over {format_bytes(self._job.limits.file)}", member)

    def _open(self, node: Node, path: str, *, program: bool, length: int) -> OpenFile:
        mode = self._mode & (0o777 if program else 0o666)
        try:
            file = NewFile(path, mode)
        except (OSError, UnicodeEncodeError) as error:
            self._judge(error, node.member)
            raise
        try:
            if stat.S_IMODE(os.fstat(file.descriptor).st_mode) != mode:  # by the umask; to set it takes longer
                os.fchmod(file.descriptor, mode)
        except BaseException:
            file.close()
            raise
        set_length(file.descriptor, length)
        return file

    def _count(self, member: str) -> None:
        self._members += 1
        if self._members > self._job.limits.members:
            raise self._job.unsafe(f"more than {self._job.limits.members} members", member)

    def _find(self, parts: tuple[str, ...]) -> Node | None:
        here: Node | None = self._root
        for part in parts:
            here = here and here.kids.get(part)
        return here

    def _folder(self, parts: tuple[str, ...], member: str) -> Node:
        here = self._root
        for depth, part in enumerate(parts, 1):
            kid = here.kids.get(part)
            if kid is None:
                self._count(member)
                kid = self._add(here, part, Node(parent=here, member=member, folder=True, charged=BLOCK))
                self._grow(self.blocks.folder)
                path = self._target.joinpath(*parts[:depth])
                with self._storing(member):
                    path.mkdir(0o700)
                path.chmod(self._mode | (path.stat().st_mode & stat.S_ISGID))  # whatever the umask and the archive say
            elif kid.goal is not None:
                raise self._job.unsafe("a member below a symbolic link, or a folder of the same name", member)
            elif not kid.folder:
                raise self._job.corrupt("a file and a folder of one name", member)
            here = kid
        return here

    def _leaf(self, name: str) -> tuple[Node, str]:
        """Return the new node and the path of a file or link; an earlier one of that name is removed.

        No ``Path``, which would take a moment for each of very many.
        """
        parts = split(name, self._job)
        if not parts:
            raise self._job.unsafe("a file or link in place of the whole folder", name)
        parent = self._folder(parts[:-1], name)
        if (old := parent.kids.get(parts[-1])) is not None:
            self._remove(old, parts, name)
        node = self._add(parent, parts[-1], Node(parent=parent, member=name))
        return node, f"{self._path}/{'/'.join(parts)}"

    def _add(self, parent: Node, part: str, node: Node) -> Node:
        if part not in parent.kids:
            parent.names += 2 * (len(os.fsencode(part)) + 16)  # a folder of many names is itself big
            if parent.names > parent.charged:
                more = max(BLOCK, self.blocks.unit)
                self._grow(more if parent.charged > BLOCK else max(_INDEX, more))  # which an index of them takes, too
                parent.charged += more
        parent.kids[part] = node
        return node

    def _remove(self, node: Node, parts: tuple[str, ...], member: str) -> None:
        if node.folder:
            raise self._job.corrupt("a file and a folder of one name", member)
        if self._links.pop(node, None) is not None:
            return
        path = self._target.joinpath(*parts)
        last = path.lstat().st_nlink == 1
        path.unlink()
        if last and node.charged:
            self._grow(-node.charged)

    def _copy(self, source: Path, path: str, node: Node) -> None:
        """Copy a file: for file systems without hard links, or with too many of them."""
        node.charged = 0
        status = source.lstat()
        program = bool(status.st_mode & 0o100)
        with source.open("rb") as old, self._create(node, path, program=program, length=status.st_size) as write:
            while data := old.read(CHUNK):
                self._job.count(len(data), node.member)
                write(data)

    @contextlib.contextmanager
    def _storing(self, member: str) -> Iterator[None]:
        """Turn what the file system has against a *name* into our errors; a full or broken disk stays OSError."""
        try:
            yield
        except (OSError, UnicodeEncodeError) as error:
            self._judge(error, member)
            raise

    def _judge(self, error: OSError | UnicodeEncodeError, member: str) -> None:
        """Raise what the file system has against a name, where it is that."""
        if isinstance(error, FileExistsError):
            what = "a name that differs from another's only in case or accents, which this file system takes for one"
            raise self._job.unsafe(what, member) from error
        if not isinstance(error, OSError) or error.errno in _UNSTORABLE:
            raise self._job.unsafe("a name that this file system can't store", member) from error

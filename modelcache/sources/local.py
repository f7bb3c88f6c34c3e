"""Models in a folder of this machine, or of a network file system mounted on it.

The rules by which an id becomes a name are in ``keys``, the same as for S3. Copying into the disk tier is
``fetch``'s business.
"""

import errno
import io
import logging
import os
import re
import stat
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelcache.errors import (
    AccessDenied,
    ArtifactChanged,
    ConfigError,
    ModelCacheError,
    ModelNotFound,
    SourceUnavailable,
    UnsafeArtifact,
)
from modelcache.sources.base import Artifact, RemoteFile, Stream
from modelcache.sources.keys import KeyRule, check_names, folder_version, is_archive
from modelcache.sources.streams import ClosableStream

_log = logging.getLogger("modelcache")
CHUNK = 1024 * 1024
"""Most bytes read at once."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_REFUSED = (errno.EACCES, errno.EPERM)


class LocalSource:
    """A folder with models.

    An id with an archive suffix is a file as it stands; any other is ``{model}.tar.gz`` where that exists, else
    the folder ``{model}/``. Symbolic links are followed as long as they stay inside the folder.

    Args:
        folder: a path or a ``file://`` URL. A relative path is made absolute at once; the folder may appear later.
        copy: True: models are copied into the disk tier, as from any source. False: folders are loaded where
            they lie, and must not change while they are in use; archives are unpacked into the disk tier as ever.

    Raises:
        ConfigError: no path, a URL of another kind, or a file instead of a folder.

    Concurrency: no state; both methods may be called from any thread and any process.
    """

    def __init__(self, folder: str | os.PathLike[str], copy: bool = True) -> None:  # noqa: FBT001, FBT002 - public name
        self._folder = _absolute(folder)
        self._copy = copy
        self._rule = KeyRule()

    @property
    def url(self) -> str:
        """The folder as a ``file://`` URL."""
        return self._folder.as_uri()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._folder)!r}, copy={self._copy})"

    def find(self, model: str) -> Artifact:
        """Return the present version of a model's artifact.

        Raises:
            ModelNotFound: no such file, and no such folder or an empty one.
            SourceUnavailable: the folder itself is not there (not mounted?), or can't be read now.
            AccessDenied: this user may not read it.
            UnsafeArtifact: a link that leads out of the folder, or something that is no file or folder.
        """
        tried = []
        with self._mapped(model, self._folder):
            root = Path(os.path.realpath(self._folder, strict=True))
            if not stat.S_ISDIR(root.stat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "is no folder")
        for key in self._rule.keys(model):
            path = self._folder / key
            tried.append(str(path))
            with self._mapped(model, path):
                artifact = self._look(model, root, path, folder=key.endswith("/"))
                if artifact is not None:
                    return artifact
        raise ModelNotFound(
            f"model {model!r}: nothing at {' or '.join(tried)}; put it there",
            model=model,
            source=self.url,
            tried=tuple(tried),
        )

    def open(self, artifact: Artifact, file: RemoteFile) -> Stream:
        """Return the bytes of one file, pinned to its version."""
        with self._mapped(artifact.model, Path(file.address), pinned=file.version):
            return LocalStream(artifact.model, self.url, file)

    def _look(self, model: str, root: Path, path: Path, *, folder: bool) -> Artifact | None:
        """Return the artifact at ``path``; None where there is none of this kind."""
        try:
            inside = self._inside(model, root, path)
            mode = inside.stat().st_mode
        except OSError as error:
            if error.errno in _MISSING:
                return None
            raise
        if folder:
            return self._folder_artifact(model, root, path) if stat.S_ISDIR(mode) else None
        if stat.S_ISDIR(mode):
            return None
        file = self._file(model, root, path, path.name)
        in_place = None if self._copy or is_archive(path.name) else path
        return Artifact(model, file.version, (file,), path=in_place)

    def _folder_artifact(self, model: str, root: Path, path: Path) -> Artifact | None:
        files = tuple(sorted(self._walk(model, root, path, "", ()), key=lambda file: file.name))
        if not files:
            return None
        check_names(model, f"{path}/", (file.name for file in files))
        return Artifact(model, folder_version(files), files, folder=True, path=None if self._copy else path)

    def _walk(self, model: str, root: Path, folder: Path, name: str, above: tuple[Path, ...]) -> Iterator[RemoteFile]:
        inside = self._inside(model, root, folder)
        if inside in above:
            raise UnsafeArtifact(f"model {model!r}: {folder} is a link to a folder above it", model=model, member=name)
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
        for entry in names:
            path = folder / entry
            below = f"{name}{entry}"
            if stat.S_ISDIR(self._inside(model, root, path).stat().st_mode):
                yield from self._walk(model, root, path, f"{below}/", (*above, inside))
            else:
                yield self._file(model, root, path, below)

    def _file(self, model: str, root: Path, path: Path, name: str) -> RemoteFile:
        status = self._inside(model, root, path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeArtifact(f"model {model!r}: {path} is no regular file", model=model, member=name)
        return RemoteFile(name, status.st_size, _version(status), str(path))

    def _inside(self, model: str, root: Path, path: Path) -> Path:
        """Return where ``path`` really leads, if that is inside the source."""
        real = Path(os.path.realpath(path, strict=True))
        if not real.is_relative_to(root):
            raise UnsafeArtifact(
                f"model {model!r}: {path} is a link that leads out of {self._folder}", model=model, member=path.name
            )
        return real

    @contextmanager
    def _mapped(self, model: str, path: Path, *, pinned: str | None = None) -> Iterator[None]:
        try:
            yield
        except ModelCacheError:
            raise
        except OSError as error:
            raise _judge(error, model, self.url, path, pinned) from error


class LocalStream(ClosableStream):
    """The bytes of one local file, as long as it stays the same."""

    def __init__(self, model: str, url: str, file: RemoteFile) -> None:
        super().__init__()
        self._model = model
        self._url = url
        self._file = file
        self._offset = 0
        # Not blocking: it may have become a FIFO since it was found.
        self._io = io.FileIO(os.open(file.address, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), closefd=True)
        try:
            self._check()
        except BaseException:
            self._io.close()
            raise

    def _read(self, size: int) -> bytes:
        left = self._file.size - self._offset
        try:
            data = (self._io.read(min(size, left, CHUNK)) or b"") if left else b""
            self._offset += len(data)
            if not data:
                self._check(ended=True)
        except ModelCacheError:
            raise
        except OSError as error:
            raise _judge(error, self._model, self._url, Path(self._file.address), self._file.version) from error
        return data

    def _check(self, *, ended: bool = False) -> None:
        status = os.fstat(self._io.fileno())
        whole = not ended or self._offset == self._file.size
        if not whole or not stat.S_ISREG(status.st_mode) or _version(status) != self._file.version:
            raise ArtifactChanged(
                f"model {self._model!r}: {self._file.address} was changed or replaced while it was read",
                model=self._model,
                source=self._url,
                version=self._file.version,
            )

    def _release(self) -> None:
        self._io.close()


def _version(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def _judge(error: OSError, model: str, url: str, path: Path, pinned: str | None) -> ModelCacheError:
    """Return what an error of the operating system means."""
    said = f"model {model!r}: {error.filename or path}: {error.strerror or type(error).__name__}"
    if pinned is not None and error.errno in (*_MISSING, errno.ENXIO, errno.ESTALE):
        text = f"{said}; it was moved or deleted while it was read"
        return ArtifactChanged(text, model=model, source=url, version=pinned)
    if error.errno in _REFUSED:
        return AccessDenied(f"{said}; let this user read it", model=model, source=str(path))
    if error.errno == errno.ELOOP:
        return UnsafeArtifact(f"{said} (links in a circle)", model=model, member=path.name)
    return SourceUnavailable(f"{said}; is the folder there, and mounted?", model=model, source=url)


def _absolute(folder: object) -> Path:
    """Return the folder that a path or a ``file://`` URL names."""
    path = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise ConfigError(f"folder={folder!r:.200} is no path", setting="folder", value=folder)
    url = _SCHEME.fullmatch(path) if isinstance(folder, str) else None
    if url:
        path = _from_url(url[1], url[2])
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - links stay: they may be switched to a new release
    if absolute.is_file():
        raise ConfigError(f"folder={str(absolute)!r} is a file; give the folder it lies in", setting="folder")
    if not absolute.exists():  # a network mount may come later
        _log.warning("folder %s is not there (yet): until it is, every model is unavailable", absolute)
    return absolute


def _from_url(scheme: str, rest: str) -> str:
    if scheme.lower() != "file":
        hint = "use S3Source" if scheme.lower() == "s3" else "mount it, or write a Source for it"
        raise ConfigError(f"a {scheme}:// URL is no folder of this machine; {hint}", setting="folder")
    host, slash, path = rest.partition("/")
    path = urllib.parse.unquote(slash + path, errors="surrogateescape")
    if host.lower() not in ("", "localhost") or not slash or "\0" in path:
        raise ConfigError(
            f"file://{rest} names no folder of this machine; write file:///folder, with three slashes", setting="folder"
        )
    return path

"""Sources: the key rules, local folders, and what a ``source`` argument may be."""

import os
import socket
import threading
from pathlib import Path

import attrs
import pytest

from modelcache.errors import (
    AccessDenied,
    ArtifactChanged,
    ConfigError,
    ModelNotFound,
    SourceUnavailable,
    UnsafeArtifact,
)
from modelcache.sources import LocalSource, S3Source, source_from
from modelcache.sources.keys import KeyRule, check_names, folder_version
from modelcache.sources.streams import ClosableStream
from tests.contracts.source_contract import BODY, Kit, SourceContract, content
from tests.support.s3 import Bucket


@attrs.frozen
class LocalKit:
    """A folder as a source."""

    folder: Path
    source: LocalSource

    def put(self, key: str, body: bytes) -> None:
        """Write a new file in the place of an old one, as a careful deployment does."""
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(".new").write_bytes(body)
        path.with_name(".new").rename(path)

    def remove(self, key: str) -> None:
        """Remove it."""
        (self.folder / key).unlink()


@attrs.frozen
class S3Kit:
    """A prefix in a bucket as a source."""

    bucket: Bucket
    source: S3Source

    def put(self, key: str, body: bytes) -> None:
        """Put an object."""
        self.bucket.put(f"prod/{key}", body)

    def remove(self, key: str) -> None:
        """Delete an object."""
        self.bucket.client.delete_object(Bucket=self.bucket.name, Key=f"prod/{key}")


class TestLocalContract(SourceContract):
    """The contract, on a folder."""

    @pytest.fixture(params=[True, False])
    def kit(self, request: pytest.FixtureRequest, tmp_path: Path) -> Kit:
        """Return a kit with an empty folder."""
        return LocalKit(tmp_path, LocalSource(tmp_path, copy=request.param))


class TestS3Contract(SourceContract):
    """The contract, on S3."""

    @pytest.fixture
    def kit(self, bucket: Bucket) -> Kit:
        """Return a kit with an empty prefix."""
        return S3Kit(bucket, S3Source(f"{bucket.url}/prod/", client=bucket.store.client()))


class TestKeyRule:
    """Which keys may hold a model."""

    @pytest.mark.parametrize(
        ("key", "model", "keys"),
        [
            (None, "fraud/v3", ("fraud/v3.tar.gz", "fraud/v3/")),
            (None, "fraud.ZIP", ("fraud.ZIP",)),
            (None, "a.tar.zst", ("a.tar.zst",)),
            (None, "a.tar.xz", ("a.tar.xz.tar.gz", "a.tar.xz/")),
            ("{model}/model.bin", "fraud/v3", ("fraud/v3/model.bin",)),
            ("x/{model}/", "fraud", ("x/fraud/",)),
            ("{model}/{model}.tgz", "a", ("a/a.tgz",)),
            ("{{}}{model}", "a", ("{}a",)),
            ("{model}", "{model}{0}", ("{model}{0}",)),
            (lambda model: f"y/{model}/", "fraud", ("y/fraud/",)),
        ],
    )
    def test_keys(self, key: object, model: str, keys: tuple[str, ...]) -> None:
        """The default rule, a template or a function say where to look, in order."""
        assert KeyRule(key).keys(model) == keys  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "model.tar.gz",
            "{}",
            "{0}",
            "{name}",
            "{model!r}",
            "{model:>9}",
            "{model.x}",
            "{model}{x}",
            "{model",
            "}",
            7,
        ],
    )
    def test_refused_at_construction(self, key: object) -> None:
        """A template that would not give each model a key of its own is refused at once."""
        with pytest.raises(ConfigError) as caught:
            KeyRule(key)  # type: ignore[arg-type]
        assert caught.value.setting == "key"

    @pytest.mark.parametrize("value", ["", None, b"key", 3])
    def test_function_returns_nonsense(self, value: object) -> None:
        """What a function returns is checked, and the model is named."""
        with pytest.raises(ConfigError, match="'fraud'") as caught:
            KeyRule(lambda model: value).keys("fraud")  # type: ignore[arg-type,return-value]
        assert caught.value.model == "fraud"

    def test_function_raises(self) -> None:
        """A function that raises is told with its cause."""
        with pytest.raises(ConfigError, match="KeyError") as caught:
            KeyRule({}.__getitem__).keys("fraud")
        assert isinstance(caught.value.__cause__, KeyError)

    @pytest.mark.parametrize(
        "names",
        [["../x"], ["a/../b"], ["/x"], ["a//b"], ["."], ["a/."], ["a\0b"], [""], ["a", "a/b"], ["a/b/c", "a/b"]],
    )
    def test_names_refused(self, names: list[str]) -> None:
        """Names that lead out, or that can't exist beside one another, are refused by name."""
        with pytest.raises(UnsafeArtifact, match="'m'") as caught:
            check_names("m", "s3://b/m/", [*names, "fine", "..fine", "a-b/c"])
        assert caught.value.member in names

    def test_folder_version_has_no_seams(self) -> None:
        """Names, versions and sizes can't be shifted into one another; order does not matter."""
        from modelcache.sources.base import RemoteFile  # noqa: PLC0415 - next to its use

        one, two = RemoteFile("ab", 1, "c", ""), RemoteFile("a", 1, "bc", "")
        assert folder_version([one]) != folder_version([two])
        assert folder_version([one, two]) == folder_version([two, one])


class TestLocalSource:
    """A folder of this machine."""

    def test_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A relative folder is made absolute at construction, whatever the working directory becomes."""
        (tmp_path / "models").mkdir()
        (tmp_path / "models/a.tar.gz").write_bytes(BODY)
        monkeypatch.chdir(tmp_path)
        source = LocalSource("models")
        monkeypatch.chdir("/")
        assert source.find("a").size == len(BODY)
        assert source.url == (tmp_path / "models").as_uri()

    def test_file_as_folder(self, tmp_path: Path) -> None:
        """A file in the place of the folder is refused at once."""
        (tmp_path / "f").write_bytes(b"")
        with pytest.raises(ConfigError, match="is a file"):
            LocalSource(tmp_path / "f")

    @pytest.mark.parametrize(
        "folder", ["", b"x", 3, None, "a\0b", "s3://b/c", "ftp://h/x", "file://other/x", "file:/%00"]
    )
    def test_refused(self, folder: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What names no folder of this machine is refused, a URL of another kind with a hint."""
        if folder == "file:/%00":
            folder = "file:///%00"
        with pytest.raises(ConfigError) as caught:
            LocalSource(folder)  # type: ignore[arg-type]
        assert caught.value.setting == "folder"

    def test_missing_folder(self, tmp_path: Path) -> None:
        """A folder that is not there yet (not mounted) is SourceUnavailable, and found once it is there."""
        source = LocalSource(tmp_path / "later")
        with pytest.raises(SourceUnavailable, match="later"):
            source.find("a")
        (tmp_path / "later").mkdir()
        (tmp_path / "later/a.tar.gz").write_bytes(b"x")
        assert source.find("a").size == 1

    def test_wrong_kinds(self, tmp_path: Path) -> None:
        """A folder with an archive's name is no archive, a file with a folder's name no folder."""
        (tmp_path / "m/a.tar.gz").mkdir(parents=True)
        (tmp_path / "m/b").write_bytes(b"")
        source = LocalSource(tmp_path / "m")
        for model in ("a", "a.tar.gz", "b", "b/c"):
            with pytest.raises(ModelNotFound):
                source.find(model)
        (tmp_path / "m").rename(tmp_path / "old")
        (tmp_path / "m").write_bytes(b"")
        with pytest.raises(SourceUnavailable):
            source.find("a")

    def test_in_place(self, tmp_path: Path) -> None:
        """With ``copy=False`` a folder is to be loaded where it lies; an archive still has to be unpacked."""
        (tmp_path / "a").mkdir()
        (tmp_path / "a/x").write_bytes(b"1")
        (tmp_path / "b.tar.gz").write_bytes(b"1")
        source = LocalSource(tmp_path, copy=False)
        assert source.find("a").path == tmp_path / "a"
        assert source.find("b").path is None
        assert LocalSource(tmp_path).find("a").path is None

    def test_links(self, tmp_path: Path) -> None:
        """Links are followed inside the folder, and refused where they lead out of it."""
        root = tmp_path / "root"
        (root / "blobs").mkdir(parents=True)
        (root / "blobs/1").write_bytes(BODY)
        (root / "a").mkdir()
        (root / "a/x").symlink_to("../blobs/1")
        (tmp_path / "alias").symlink_to("root")
        source = LocalSource(tmp_path / "alias")
        artifact = source.find("a")
        assert content(source, artifact, artifact.files[0]) == BODY
        (root / "b.tar.gz").symlink_to("/etc/passwd")
        (root / "c").symlink_to("/etc")
        (root / "a/y").symlink_to("../../outside")
        (tmp_path / "outside").write_bytes(b"")
        for model in ("a", "b", "c"):
            with pytest.raises(UnsafeArtifact, match="leads out"):
                source.find(model)

    def test_circles(self, tmp_path: Path) -> None:
        """Links in a circle are refused, not followed for ever."""
        (tmp_path / "a").mkdir()
        (tmp_path / "a/up").symlink_to(".")
        (tmp_path / "b").mkdir()
        (tmp_path / "b/self").symlink_to("self")
        for model in ("a", "b"):
            with pytest.raises(UnsafeArtifact):
                LocalSource(tmp_path).find(model)

    def test_special_files(self, tmp_path: Path) -> None:
        """A FIFO or a socket is no model, and is never opened."""
        (tmp_path / "a").mkdir()
        os.mkfifo(tmp_path / "a/pipe")
        os.mkfifo(tmp_path / "b.tar.gz")
        with socket.socket(socket.AF_UNIX) as listener:
            (tmp_path / "c").mkdir()
            listener.bind(str(tmp_path / "c/s"))
            for model in ("a", "b", "c"):
                with pytest.raises(UnsafeArtifact, match="no regular file"):
                    LocalSource(tmp_path).find(model)

    def test_became_fifo(self, tmp_path: Path) -> None:
        """A file that became a FIFO after it was found does not hang the reader."""
        (tmp_path / "a.tar.gz").write_bytes(b"x")
        source = LocalSource(tmp_path)
        artifact = source.find("a")
        (tmp_path / "a.tar.gz").unlink()
        os.mkfifo(tmp_path / "a.tar.gz")
        with pytest.raises(ArtifactChanged):
            source.open(artifact, artifact.files[0])

    def test_changed_while_read(self, tmp_path: Path) -> None:
        """A file that is written to, or cut, while it is read has changed."""
        path = tmp_path / "a.tar.gz"
        for change in (lambda: path.write_bytes(b"y" * 10), lambda: os.truncate(path, 5)):
            path.write_bytes(BODY)
            os.utime(path, (1, 1))
            source = LocalSource(tmp_path)
            artifact = source.find("a")
            with source.open(artifact, artifact.files[0]) as stream:
                assert stream.read(10) == BODY[:10]
                change()
                with pytest.raises(ArtifactChanged):
                    list(iter(lambda: stream.read(10**6), b""))

    def test_empty_folder(self, tmp_path: Path) -> None:
        """An empty folder is no model, as an empty prefix is none."""
        (tmp_path / "a/b").mkdir(parents=True)
        with pytest.raises(ModelNotFound):
            LocalSource(tmp_path).find("a")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_unreadable(self, tmp_path: Path) -> None:
        """What this user may not read is AccessDenied."""
        (tmp_path / "a").mkdir()
        (tmp_path / "a").chmod(0)
        with pytest.raises(AccessDenied):
            LocalSource(tmp_path).find("a")
        (tmp_path / "a").chmod(0o700)

    def test_longest_id(self, tmp_path: Path) -> None:
        """An id too long for a file name is not found; it is no fault of the source."""
        with pytest.raises(ModelNotFound):
            LocalSource(tmp_path).find("x" * 1024)


class TestSourceFrom:
    """What a ``source`` argument may be."""

    def test_kinds(self, tmp_path: Path) -> None:
        """URLs, paths and sources each give a source."""
        assert source_from("s3://models/prod").url == "s3://models/prod"
        assert source_from("S3://models").url == "s3://models"
        folder = tmp_path / "a b"
        for value in (folder, str(folder), folder.as_uri(), f"file://localhost{folder}".replace(" ", "%20")):
            assert source_from(value).url == folder.as_uri()
        source = LocalSource(tmp_path)
        assert source_from(source) is source

    @pytest.mark.parametrize(
        "value", [None, 3, b"/x", LocalSource, "gs://b/x", "https://b.s3.amazonaws.com/x", "", "file://"]
    )
    def test_refused(self, value: object) -> None:
        """Anything else is refused with a hint."""
        with pytest.raises(ConfigError):
            source_from(value)


class _Held(ClosableStream):
    """A stream whose reads wait until they are woken."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = threading.Event()
        self.woken = threading.Event()
        self.released = 0

    def _read(self, size: int) -> bytes:
        self.reading.set()
        assert self.woken.wait(10)
        return b"late"

    def _interrupt(self) -> None:
        self.woken.set()

    def _release(self) -> None:
        self.released += 1


class TestClosableStream:
    """Closing under a running read."""

    def test_close_during_read(self) -> None:
        """``close`` from another thread wakes the reader; the connection is given back once, after the read."""
        stream = _Held()
        reader = threading.Thread(target=stream.read, args=(1,))
        reader.start()
        assert stream.reading.wait(10)
        with pytest.raises(RuntimeError, match="two threads"):
            stream.read(1)
        assert stream.released == 0
        stream.close()
        stream.close()
        reader.join()
        assert stream.released == 1

    @pytest.mark.parametrize("size", [0, -1])
    def test_size(self, size: int) -> None:
        """Reading no bytes, or "all", is refused: neither says when the end is reached."""
        with pytest.raises(ValueError, match="at least one"):
            _Held().read(size)

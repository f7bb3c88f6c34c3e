"""What every ``Source`` must do, whatever it reads from.

Subclass :class:`SourceContract`, give it a fixture ``kit``, and pytest runs all of it on your source.
"""

import copy
import pickle
import threading
from typing import Protocol

import pytest

from modelcache.errors import ArtifactChanged, ModelNotFound
from modelcache.sources.base import Artifact, RemoteFile, Source

BODY = bytes(range(256)) * 1500
"""Content of most files here: long enough for several reads."""


class Kit(Protocol):
    """A source with a way to fill what it reads from."""

    source: Source

    def put(self, key: str, body: bytes) -> None:
        """Put, or replace, what lies at ``key`` by the default key rules."""

    def remove(self, key: str) -> None:
        """Remove it."""


def content(source: Source, artifact: Artifact, file: RemoteFile, size: int = 65536) -> bytes:
    """Return all bytes of a file, in reads of ``size``."""
    with source.open(artifact, file) as stream:
        return b"".join(iter(lambda: stream.read(size), b""))


class SourceContract:
    """The tests; ``kit`` is the fixture to override."""

    @pytest.fixture
    def kit(self) -> Kit:
        """Return a kit with an empty source."""
        raise NotImplementedError

    def test_is_source(self, kit: Kit) -> None:
        """It has what the Protocol asks for, and a URL for people."""
        assert isinstance(kit.source, Source)
        assert "://" in kit.source.url

    def test_finds_archive(self, kit: Kit) -> None:
        """A model is the archive of its name, one file, with its size."""
        kit.put("fraud/v3.tar.gz", BODY)
        artifact = kit.source.find("fraud/v3")
        assert (artifact.model, artifact.folder, artifact.size) == ("fraud/v3", False, len(BODY))
        assert [file.name for file in artifact.files] == ["v3.tar.gz"]
        assert content(kit.source, artifact, artifact.files[0]) == BODY

    def test_finds_folder(self, kit: Kit) -> None:
        """Without an archive of its name, a model is the folder of its name, all levels of it."""
        files = {"config.json": b"{}", "weights/a.bin": BODY, "weights/b.bin": b""}
        for name, body in files.items():
            kit.put(f"fraud/{name}", body)
        artifact = kit.source.find("fraud")
        assert artifact.folder
        assert artifact.size == sum(map(len, files.values()))
        assert {file.name: content(kit.source, artifact, file) for file in artifact.files} == files

    def test_prefers_archive(self, kit: Kit) -> None:
        """Where there are both, it is the archive."""
        kit.put("fraud/model.bin", b"folder")
        kit.put("fraud.tar.gz", b"archive")
        assert not kit.source.find("fraud").folder

    @pytest.mark.parametrize("key", ["model.zip", "a/model.TAR.GZ", "model.tgz"])
    def test_id_with_suffix(self, kit: Kit, key: str) -> None:
        """An id with an archive suffix is the key as it stands."""
        kit.put(key, BODY)
        artifact = kit.source.find(key)
        assert content(kit.source, artifact, artifact.files[0]) == BODY

    @pytest.mark.parametrize("model", ["a b+c", "50%25", "größe/模型", "a#b?c=d&e", "~x;y,z@1!'()*", "-", "a\\b"])
    def test_odd_ids(self, kit: Kit, model: str) -> None:
        """Any valid id is taken literally."""
        kit.put(f"{model}.tar.gz", BODY)
        kit.put(f"{model}2/in it", b"yes")
        artifact = kit.source.find(model)
        assert content(kit.source, artifact, artifact.files[0]) == BODY
        assert [file.name for file in kit.source.find(f"{model}2").files] == ["in it"]

    def test_missing(self, kit: Kit) -> None:
        """A missing model is ModelNotFound, with the places that were looked at; it survives pickling."""
        kit.put("fraud2.tar.gz", BODY)
        kit.put("fraudulent/x", BODY)
        with pytest.raises(ModelNotFound, match="fraud") as caught:
            kit.source.find("fraud")
        error = caught.value
        assert (error.model, error.source, len(error.tried)) == ("fraud", kit.source.url, 2)
        assert isinstance(error, LookupError)
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert (str(twin), twin.tried) == (str(error), error.tried)

    def test_missing_then_there(self, kit: Kit) -> None:
        """A model that appears later is found at once: a source remembers no failure."""
        with pytest.raises(ModelNotFound):
            kit.source.find("late")
        kit.put("late.tar.gz", BODY)
        assert kit.source.find("late").size == len(BODY)

    def test_version_of_file(self, kit: Kit) -> None:
        """The version stays while the bytes stay, and changes with them, also at the same length."""
        kit.put("fraud.tar.gz", b"first")
        version = kit.source.find("fraud").version
        assert kit.source.find("fraud").version == version
        kit.put("fraud.tar.gz", b"other")
        assert kit.source.find("fraud").version != version

    def test_version_of_folder(self, kit: Kit) -> None:
        """The version of a folder changes with any file in it, and with their number."""
        kit.put("fraud/a", b"first")
        kit.put("fraud/b", b"first")
        versions = [kit.source.find("fraud").version]
        assert kit.source.find("fraud").version == versions[0]
        kit.put("fraud/a", b"other")
        versions.append(kit.source.find("fraud").version)
        kit.put("fraud/c", b"")
        versions.append(kit.source.find("fraud").version)
        kit.remove("fraud/b")
        versions.append(kit.source.find("fraud").version)
        assert len(set(versions)) == 4

    def test_replaced(self, kit: Kit) -> None:
        """What was replaced after it was found is not read."""
        kit.put("fraud.tar.gz", BODY)
        artifact = kit.source.find("fraud")
        kit.put("fraud.tar.gz", BODY[::-1])
        with pytest.raises(ArtifactChanged, match="fraud") as caught:
            content(kit.source, artifact, artifact.files[0])
        assert (caught.value.model, caught.value.version) == ("fraud", artifact.files[0].version)

    def test_removed(self, kit: Kit) -> None:
        """What was removed after it was found has changed; only the next look-up says that there is none."""
        kit.put("fraud.tar.gz", BODY)
        artifact = kit.source.find("fraud")
        kit.remove("fraud.tar.gz")
        with pytest.raises(ArtifactChanged):
            content(kit.source, artifact, artifact.files[0])
        with pytest.raises(ModelNotFound):
            kit.source.find("fraud")

    @pytest.mark.parametrize("size", [4099, 10**9])
    def test_read_sizes(self, kit: Kit, size: int) -> None:
        """No read returns more than was asked for, and the end comes as often as it is asked for."""
        kit.put("fraud.tar.gz", BODY)
        artifact = kit.source.find("fraud")
        with kit.source.open(artifact, artifact.files[0]) as stream:
            parts = list(iter(lambda: stream.read(size), b""))
            assert stream.read(size) == b""
            assert stream.read(1) == b""
        assert max(map(len, parts)) <= size
        assert b"".join(parts) == BODY

    def test_empty_file(self, kit: Kit) -> None:
        """A file of no bytes is found and read."""
        kit.put("fraud.tar.gz", b"")
        artifact = kit.source.find("fraud")
        assert artifact.size == 0
        assert content(kit.source, artifact, artifact.files[0]) == b""

    def test_close(self, kit: Kit) -> None:
        """A stream may be closed early and often; reading it then is an error, as with a closed file."""
        kit.put("fraud.tar.gz", BODY)
        artifact = kit.source.find("fraud")
        for reads in (0, 1):
            stream = kit.source.open(artifact, artifact.files[0])
            for _ in range(reads):
                assert stream.read(10)
            stream.close()
            stream.close()
            with pytest.raises(ValueError, match="closed"):
                stream.read(10)

    def test_threads(self, kit: Kit) -> None:
        """Many threads find and read at once, each the bytes of its own model."""
        bodies = {f"m{number}": bytes([number]) * 50_000 for number in range(8)}
        for model, body in bodies.items():
            kit.put(f"{model}.tar.gz", body)
        barrier = threading.Barrier(len(bodies))
        got: dict[str, bytes] = {}

        def run(model: str) -> None:
            barrier.wait()
            artifact = kit.source.find(model)
            got[model] = content(kit.source, artifact, artifact.files[0])

        threads = [threading.Thread(target=run, args=(model,)) for model in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == bodies

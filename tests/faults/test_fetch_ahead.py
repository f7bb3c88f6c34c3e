"""Many small files at once: one thread asks for several before it reads, and none of them suffers for another."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from modelcache.errors import AccessDenied, ArtifactChanged, ArtifactCorrupt, ModelCacheError
from modelcache.sources import s3_ahead
from modelcache.sources.s3 import S3Source
from modelcache.sources.s3_ahead import DEPTH, SMALL
from modelcache.sources.s3_connection import Connection
from modelcache.sources.s3_effort import Patience
from tests.support.proxy import Fault, FaultProxy
from tests.support.racing import descriptors
from tests.support.s3 import Bucket, Store, noise
from tests.support.saving import saved
from tests.support.waiting import eventually

SIZE = 3000
BODIES = {f"{number:02}": noise(SIZE, number) for number in range(40)}


def fetchers() -> int:
    """Return how many threads fetch."""
    return sum(thread.name == "modelcache-fetch" for thread in threading.enumerate())


@attrs.define
class Scene:
    """Forty small files behind a proxy, and a source that reads them without pausing.

    Attributes:
        proxy: what breaks things.
        bucket: where they lie; reached without the proxy.
        source: reads through the proxy.
        folder: for what is saved.
    """

    proxy: FaultProxy
    bucket: Bucket
    source: S3Source
    folder: Path

    def save(self, check: Callable[[], None] = lambda: None) -> dict[str, bytes]:
        """Save all files and return them."""
        return saved(self.source, self.source.find("m"), self.folder, check)


def source_of(bucket: Bucket, proxy: FaultProxy, connections: int = DEPTH, **settings: Any) -> S3Source:
    """Return a source that does not pause before it tries again."""
    client = bucket.store.at(proxy.endpoint).client(**settings)
    source = S3Source(bucket.url, client=client, connections=connections)
    source._patience = Patience(wait=lambda stop, seconds: stop.is_set())
    return source


def connected(scene: Scene) -> None:
    """Let the source of a scene have open connections, as many as it may."""
    together = threading.Barrier(DEPTH)
    scene.proxy.script(*[Fault(before=lambda: together.wait(20))] * DEPTH)
    assert scene.save() == BODIES
    scene.proxy.script()
    scene.proxy.forget()


@pytest.fixture
def scene(s3_moto: Store, tmp_path: Path) -> Iterator[Scene]:
    """Return a scene without faults as yet; no answer for 1 s is silence. Afterwards all connections are free."""
    bucket = s3_moto.bucket()
    for name, body in BODIES.items():
        bucket.put(f"m/{name}", body)
    with FaultProxy(s3_moto.endpoint) as proxy:
        scene = Scene(proxy, bucket, source_of(bucket, proxy, read_timeout=1), tmp_path)
        yield scene
        eventually(lambda: not fetchers())
        assert scene.source._getter.means._connections == scene.source._connections


@pytest.mark.parametrize("hooked", [False, True], ids=["our wire", "the client"])
def test_as_many_answers_as_connections(scene: Scene, monkeypatch: pytest.MonkeyPatch, hooked: bool) -> None:
    """As many requests are under way as there are connections: by one thread, or where the client asks, by as many."""
    monkeypatch.setattr(s3_ahead, "_LOOKS", 10**6)  # none is silent, however long all take to come together
    scene.source = source_of(scene.bucket, scene.proxy, read_timeout=30)
    connected(scene)
    together = threading.Barrier(DEPTH)
    threads: list[int] = []

    def arrive() -> None:
        together.wait(20)
        threads.append(fetchers())

    if hooked:
        client = scene.bucket.store.at(scene.proxy.endpoint).client()
        client.meta.events.register("before-sign.s3.GetObject", lambda **about: None)
        scene.source = S3Source(scene.bucket.url, client=client, connections=DEPTH)
    scene.proxy.script(*[Fault(before=arrive)] * DEPTH)
    assert scene.save() == BODIES
    assert set(threads) == {DEPTH if hooked else 1}


def test_one_slow_answer_keeps_no_other_waiting(scene: Scene) -> None:
    """The first answer comes only after all others were taken."""
    others = threading.Event()
    whole: list[bool] = []

    def last() -> None:
        whole.append(others.wait(20))

    def check() -> None:
        if len(list(scene.folder.iterdir())) >= len(BODIES) - 1 and len(scene.proxy.reads()) == len(BODIES):
            others.set()

    scene.source = source_of(scene.bucket, scene.proxy, read_timeout=30)
    scene.proxy.script(Fault(before=last))
    assert scene.save(check) == BODIES
    assert whole == [True]


@pytest.mark.parametrize("number", [0, 5, 39])
@pytest.mark.parametrize(
    "fault",
    [
        {"cut": 0},
        {"cut": SIZE // 2},
        {"cut": SIZE},
        {"reset": 0},
        {"reset": SIZE // 2},
        {"silent": 0},
        {"silent": SIZE // 2},
        {"answer": (503, "SlowDown")},
        {"answer": (500, "InternalError")},
        {"lengthen": 1},
        {"lengthen": -1},
    ],
    ids=str,
)
def test_f048_f058_f060_one_answer_of_many(scene: Scene, fault: dict[str, Any], number: int) -> None:
    """F048, F058, F060: what befalls one answer is mended by asking for that file again, and for no other."""
    scene.proxy.script(*[Fault()] * number, Fault(**fault))
    assert scene.save() == BODIES
    again = fault != {"cut": SIZE}
    assert len(scene.proxy.reads()) == len(BODIES) + again


@pytest.mark.parametrize("number", [0, 5, 39])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"flip": 7}, ArtifactCorrupt),
        ({"etag": '"' + 32 * "0" + '"'}, ArtifactChanged),
        ({"answer": (403, "ExpiredToken")}, AccessDenied),
        ({"answer": (412, "PreconditionFailed")}, ArtifactChanged),
    ],
    ids=str,
)
def test_f049_f051_f059_one_wrong_answer(
    scene: Scene, fault: dict[str, Any], error: type[ModelCacheError], number: int
) -> None:
    """F049, F051, F059: one wrong answer of many ends all of it, with its own error; the next try is whole."""
    scene.proxy.script(*[Fault()] * number, Fault(**fault))
    with pytest.raises(error):
        scene.save()
    scene.proxy.script()
    assert scene.save() == BODIES


def test_new_connections_are_made_side_by_side(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """To connect takes some round trips, with TLS: 16 connections are made in the time of one."""
    together = threading.Barrier(DEPTH)
    connect = Connection.connect

    def slow(connection: Connection) -> None:
        if connection.fileno() < 0 and not together.broken:
            together.wait(10)
        connect(connection)

    artifact = scene.source.find("m")
    monkeypatch.setattr(Connection, "connect", slow)
    assert saved(scene.source, artifact, scene.folder) == BODIES
    assert not together.broken


def test_f058_many_silent_answers_are_waited_for_together(scene: Scene) -> None:
    """F058: kept connections whose peer has gone without a word cost the time of one of them, not of each."""
    connected(scene)
    over = threading.Event()
    scene.proxy.script(*[Fault(before=lambda: over.wait(60))] * DEPTH)
    start = time.monotonic()
    assert scene.save() == BODIES
    assert time.monotonic() - start < 10  # one after the other: 16 times 3 s
    over.set()


@pytest.mark.parametrize("begun", [0, SIZE // 2])
def test_f058_many_that_stop_in_the_middle_are_waited_for_together(scene: Scene, begun: int) -> None:
    """F058: answers that have begun to come, and go on no more, cost the time of two of them, not of each."""
    scene.source = source_of(scene.bucket, scene.proxy, read_timeout=3)
    connected(scene)
    scene.proxy.script(*[Fault(silent=begun)] * DEPTH)
    start = time.monotonic()
    assert scene.save() == BODIES
    assert time.monotonic() - start < 15  # one after the other: 16 times 2 s


def test_downloads_share_connections(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that comes while another has all connections soon has as many."""
    monkeypatch.setattr(s3_ahead, "_LOOKS", 10**6)  # none is silent, however long the second one takes to ask
    scene.source = source_of(scene.bucket, scene.proxy, read_timeout=30)
    connected(scene)
    others = {f"{number:02}": noise(SIZE, 100 + number) for number in range(40)}
    for name, body in others.items():
        scene.bucket.put(f"n/{name}", body)
    first, second = (scene.source.find(model) for model in "mn")
    together = threading.Barrier(DEPTH)
    began, gate = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        gate.wait(20)

    scene.proxy.script(*[Fault(before=hold)] * DEPTH, *[Fault(before=lambda: together.wait(20))] * DEPTH)
    got: dict[str, dict[str, bytes]] = {}

    def one(name: str, artifact: Any) -> None:
        got[name] = saved(scene.source, artifact, scene.folder / name)

    threads = [threading.Thread(target=one, args=pair, daemon=True) for pair in (("m", first), ("n", second))]
    threads[0].start()
    assert began.wait(20)
    threads[1].start()
    eventually(lambda: scene.source._getter.means._sharing == 2)
    gate.set()
    for thread in threads:
        thread.join(30)
    assert got == {"m": BODIES, "n": others}
    under_way = scene.proxy.reads()[DEPTH : 2 * DEPTH]  # all at once
    assert sum("/n/" in request.path for request in under_way) >= DEPTH // 2 - 1


def test_f060_pauses_keep_no_other_file_waiting(scene: Scene) -> None:
    """F060: files that a busy store refuses pause side by side; all others come meanwhile."""
    connected(scene)
    pausing = threading.Barrier(5)

    def wait(stop: threading.Event, _: float) -> bool:
        pausing.wait(20)  # all of them, and the proof that all others are here
        return stop.is_set()

    def check() -> None:
        if len(scene.proxy.reads()) == len(BODIES) and pausing.n_waiting == pausing.parties - 1:
            pausing.wait(20)

    scene.source._patience = Patience(wait=wait)
    busy = Fault(answer=(503, "SlowDown"))
    scene.proxy.script(*[busy, Fault()] * 4)
    assert scene.save(check) == BODIES


class _Told(Exception):
    """Told to stop."""


@pytest.mark.parametrize("begun", [False, True])
def test_f058_stopped_in_silence(scene: Scene, begun: bool) -> None:
    """F058: told to stop while the peers are silent, before an answer or in it, it ends at once; nothing is left."""
    scene.source = source_of(scene.bucket, scene.proxy, read_timeout=60)
    artifact = scene.source.find("m")
    over = threading.Event()
    scene.proxy.script(always=Fault(silent=0) if begun else Fault(before=lambda: over.wait(60)))
    before = descriptors()

    def check() -> None:
        if scene.proxy.stalled.is_set() if begun else len(scene.proxy.reads()) == DEPTH:
            raise _Told

    with pytest.raises(_Told):
        saved(scene.source, artifact, scene.folder, check)
    over.set()
    eventually(lambda: descriptors() <= before + 2)


@pytest.mark.parametrize("connections", [1, 2, 3, DEPTH + 1])
def test_few_connections_for_many(scene: Scene, connections: int) -> None:
    """Several downloads of files of both kinds share few connections; none waits for what it holds itself."""
    large = {f"large{number}": noise(SMALL + 1, number) for number in range(6)}
    for name, body in large.items():
        scene.bucket.put(f"m/{name}", body)
    scene.source = source_of(scene.bucket, scene.proxy, connections, read_timeout=30)
    artifact = scene.source.find("m")
    got: list[dict[str, bytes]] = []

    def one(number: int) -> None:
        folder = scene.folder / str(number)
        got.append(saved(scene.source, artifact, folder))

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [BODIES | large] * 4

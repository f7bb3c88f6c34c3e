"""The process that serves from inside the cgroup: threads ask, lease and use; see ``watch`` for who starts it.

It goes on where the book says that a killed one stopped.
"""

import collections
import itertools
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import attrs

from benchmarks import cgroup

LOOK = 0.05  # seconds between two looks at the cache


@attrs.frozen
class Task:
    """What the child is told.

    Attributes:
        row: name of the cache.
        folder: of the store.
        models: how many.
        requests: how many.
        threads: how many ask.
        loaders: loads at once.
        gauge: ``"process"`` or ``"container"``: what modelcache measures with.
        high: bytes that the process may use.
        group: folder of the cgroup.
        book: path of the book.
    """

    row: str
    folder: str
    models: int
    requests: int
    threads: int
    loaders: int
    gauge: str
    high: int
    group: str = ""
    book: str = ""


class Service:
    """Requests, answered from one cache by several threads.

    Args:
        task: what to do.
    """

    def __init__(self, task: Task) -> None:
        from benchmarks.wall import book, models, rows, store  # noqa: PLC0415 - charged to the group

        self._task = task
        self._models = models
        self._todo = book.TODO
        self._fates = (book.BEGUN, book.DONE, book.FAILED)
        self._book = book.Book(Path(task.book))
        self._store = store.Store(Path(task.folder), task.models)
        self._asked = store.requests(self._store.ids(), task.requests)
        self._next = itertools.count()
        self._stop = threading.Event()
        self._loaded: collections.Counter[str] = collections.Counter()
        self._reload = 0.0
        # guards the two above, which loads at once all count
        self._counting = threading.Lock()
        self.errors: collections.defaultdict[str, list[str]] = collections.defaultdict(list)
        warm = next(model for model in self._store.ids() if model.startswith("forest"))
        models.use(warm, models.load(self._store.models / warm, warm), random.Random(0))  # noqa: S311 - it only imports what it needs
        taken = store.resident()
        self._row = rows.make(task.row, self._store, self._load, task.loaders, task.gauge, task.high, taken)

    def _load(self, path: Path, model: str) -> Any:
        started = time.monotonic()
        value = self._models.load(path, model)
        seconds = time.monotonic() - started
        with self._counting:
            self._reload += seconds if self._loaded[model] else 0
            self._loaded[model] += 1
        return value

    def run(self) -> None:
        """Answer all that is to do."""
        threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(self._task.threads)]
        watcher = threading.Thread(target=self._watch)
        for thread in [*threads, watcher]:
            thread.start()
        for thread in threads:
            thread.join()
        self._stop.set()
        watcher.join()
        self._row.close()

    def _ask(self, seed: int) -> None:
        begun, done, failed = self._fates
        chance, fates = random.Random(seed), self._book.requests  # noqa: S311 - as above
        for number in self._next:
            if number >= len(self._asked):
                return
            if fates[number] != self._todo:
                continue
            fates[number] = begun
            try:
                model = self._asked[number]
                with self._row.lease(model) as value:
                    self._models.use(model, value, chance)
                    del value
            except Exception as error:  # noqa: BLE001 - counted, whatever it is
                fates[number] = failed
                self.errors[type(error).__name__].append(str(error)[:300])
            else:
                fates[number] = done

    def _watch(self) -> None:
        book, started = self._book, time.monotonic()
        names = ("hits", "misses", "loads", "evictions", "reload_seconds", "seconds")
        before = {name: book[name] for name in names}  # of processes that were killed
        parent = os.getppid()
        last = False
        while not last:
            if os.getppid() != parent:
                os._exit(1)  # nobody samples any more
            last = self._stop.wait(LOOK)
            look = self._row.look()
            now = (look.hits, look.misses, self._loaded.total(), look.evictions, self._reload)
            for name, value in zip(names, (*now, time.monotonic() - started), strict=True):
                book[name] = before[name] + value
            book["begun"] = len(self._asked) - book.count(self._todo)
            book["held"] += look.held
            book["models"] += look.models
            book["reserved"] += look.reserved
            book["looks"] += 1
            if look.room is not None:
                book["room"] += look.room
                book["waits"] += 1
            book["underrated"] = max(book["underrated"], getattr(self._row, "underrated", 0))


if __name__ == "__main__":
    told = Task(**json.loads(sys.argv[1]))
    cgroup.enter(told.group)
    service = Service(told)
    service.run()
    sys.stdout.write(json.dumps([(name, len(texts), texts[-1]) for name, texts in service.errors.items()]))

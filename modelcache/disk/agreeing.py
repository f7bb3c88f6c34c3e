"""``Agreement``: what this process knows, kept in step with what all processes that share the folder know.

Each transaction with the ledger begins with what others have changed, so that what is decided in it holds for all.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from modelcache.disk.book import USED, Book, Hold
from modelcache.disk.index import Index
from modelcache.disk.items import RECHECK, Item, Others, Staging
from modelcache.disk.ledger import patience
from modelcache.disk.refusals import FetchedElsewhere
from modelcache.disk.states import State
from modelcache.disk.store import Store
from modelcache.disk.sweeping import reconcile
from modelcache.errors import ModelCacheError
from modelcache.guard import Guard
from modelcache.telling import complain

R = TypeVar("R")

_REST = 5.0  # seconds until uses are told again where that failed
_BATCH = 64  # uses that are told at once, where nothing else is to be told
_ASKING = 3 * RECHECK  # seconds for which a request that lacks room is taken to wait, unless that is told again
_PATIENCE = 3.0  # seconds that the end of a cache waits for other processes to decide


class Agreement:
    """Reads and writes the ledger for one cache.

    Concurrency: any thread, never with the guard held; the guard is taken inside.

    Args:
        store: the folder.
        source: URL of the cache's source.
        index: what this process knows.
        guard: the cache's lock.
        budget: returns the bytes that the tier may take at this moment; None: no such bound.
    """

    def __init__(
        self, store: Store, source: str, index: Index, guard: Guard, budget: Callable[[], int | None] = lambda: None
    ) -> None:
        self._budget = budget
        self._store = store
        self._source = source
        self._index = index
        self._guard = guard
        self._uses: dict[str, tuple[float, int]] = {}
        self._misses: list[str] = []
        store.ledger.undo = self._undo
        self._debts: list[Callable[[Book], object]] = []  # what could not be told yet
        self._rest = 0.0  # monotonic time until which uses are not told
        self._registered = ("", "", "")  # epoch, owner and settings under which the ledger knows this process

    @property
    def busy(self) -> bool:
        """Whether this very thread is in the middle of a decision that all processes share."""
        return self._store.ledger.busy

    def change(self, decide: Callable[[Book], R], check: Callable[[], None] | None = None) -> R:
        """Run a transaction that reads and writes; see ``Ledger.change``."""
        self._refuse_nesting()

        def run(book: Book) -> R:
            while self._debts:  # each once: another transaction waits for this one
                debt = self._debts[0]
                book.undo.append(functools.partial(self._owe, debt))  # first, as an interrupt may come between
                self._debts.remove(debt)
                debt(book)
            return decide(book)

        return self._store.ledger.change(run, check)

    def _owe(self, debt: Callable[[Book], object]) -> None:
        """Take back that a debt was paid."""
        if debt not in self._debts:
            self._debts.insert(0, debt)

    def _undo(self, book: Book, error: BaseException) -> None:
        """Take back what a transaction that failed has done here: nothing of it is in the ledger."""
        with self._guard:
            for undo in reversed(book.undo):
                undo()
            if book.ahead or not isinstance(error, FetchedElsewhere):  # which comes before anything is decided
                self._index.doubt()

    def settle(self, decide: Callable[[Book], R], owed: Callable[[Book], object] | None = None) -> R | None:
        """Tell what is so already.

        Where that fails, on a full disk, say, or by Ctrl-C, it is told with the next transaction, by ``owed`` or else
        ``decide``, which then may be so already. None is returned on a full disk.
        """
        try:
            return self.change(decide)
        except BaseException as error:
            self._debts.append(owed or decide)
            if not isinstance(error, OSError):
                raise
            complain("the ledger in %s can't be written: tried again later", self._store.path, error=error)
            return None

    def look(self, check: Callable[[], None] | None = None) -> None:
        """Learn what other processes have changed; see ``Ledger.look``."""
        self._refuse_nesting()
        self._look_at_folder()
        self._store.ledger.look(self._catch_up, check)

    def look_at_others(self, check: Callable[[], None] | None = None) -> None:
        """Learn what other processes have changed, have set aside and wait for."""
        self._refuse_nesting()
        self._look_at_folder()
        self._store.ledger.look(self._look, check)

    def _look_at_folder(self) -> None:
        """Find what others have published or removed where they can't say so: in a folder that can only be read."""
        if not self._store.writable and self._store.changed():
            with self._guard:
                known = dict(self._index.items)
            reconcile(self._store, known)

    def _look(self, book: Book) -> None:
        self._catch_up(book)
        self.count(book)

    def _refuse_nesting(self) -> None:
        if self.busy:
            raise ModelCacheError(
                "a call from a signal handler or __del__ in the middle of the disk tier's own decision: "
                "hand it to another thread"
            )

    def _catch_up(self, book: Book) -> str:
        epoch = book.epoch
        rows, seq, whole = book.changes(self._index.since(epoch), self._store.made)
        if rows or whole or seq != self._index.since(epoch):
            asked = book.asked(self._source, 0 if whole else self._index.since(epoch))
            owner = self._store.owner
            with self._guard:
                self._index.learn(epoch, rows, asked, seq, owner, whole=whole)
                self._store.made = None
                now = time.time()
                for name in [row[0] for row in rows if row[USED] > now]:  # by a wrong clock: the latest for years
                    self._uses.setdefault(name, (0.0, 0))
        return epoch

    def learn(self, book: Book) -> None:
        """Catch up at the beginning of a transaction that writes, and tell what others don't know yet."""
        epoch, owner = self._catch_up(book), self._store.owner
        settings = json.dumps({"source": self._source, "budget": self._budget()})
        if self._registered != (epoch, owner, settings) and self._store.writable:
            book.register(owner, settings)
            with self._guard:
                stagings = [staging for staging in self._index.stagings if staging.listed]
                debris = list(self._index.debris.items())
            for staging in stagings:
                self.hold(book, staging, staging.reserved)
            for folder, size in debris:
                self.leave(book, folder, size)
            book.undo.append(self._unregister)
            self._registered = (epoch, owner, settings)
        with self._guard:
            uses, self._uses = self._uses, {}
            misses, self._misses = self._misses, []
        if misses:
            book.undo.append(lambda: self._misses.__setitem__(slice(0, 0), misses))
            book.ask(self._source, misses)
        if uses:
            book.undo.append(lambda: self._untold(uses))
            book.touch(((name, used, times) for name, (used, times) in uses.items()), owner)
        self.count(book)

    def confirm(self) -> None:
        """Tell all anew where the ledger was made anew since it was last told.

        Raises:
            OSError: the disk is full, or broken.
        """
        if self._store.ledger.look(lambda book: book.epoch) != self._registered[0]:
            self.change(self.learn)

    def _unregister(self) -> None:
        self._registered = ("", "", "")

    def _untold(self, uses: dict[str, tuple[float, int]]) -> None:
        for name, (used, times) in uses.items():
            later, more = self._uses.get(name, (0.0, 0))
            self._uses[name] = max(used, later), times + more

    def count(self, book: Book) -> None:
        """Take over what is set aside by all processes."""
        mine, holds, now = self._store.owner, book.holds(), time.monotonic()
        foreign = [hold for hold in holds if hold.owner != mine and hold.model]
        others = Others(
            reserved=sum(hold.reserved for hold in holds),
            unwritten=sum(max(hold.reserved - hold.charged, 0) for hold in holds),
            sharing=bool(foreign),
            moving=any(not hold.wanted for hold in foreign),
            wanted=sum(hold.wanted for hold in foreign),
            pressed=any(hold.wanted and now - hold.asked < _ASKING for hold in foreign),
        )
        with self._guard:
            self._index.others = others

    def check_single(self, book: Book, staging: Staging) -> None:
        """Raise FetchedElsewhere where another process is fetching the same model, or has done so meanwhile."""
        model = staging.wish.model
        with self._guard:
            item = self._index.models.get(model)
        if (item is not None and item.name != staging.known) or self._fetching(book, model):
            raise FetchedElsewhere(model)

    def fetched_elsewhere(self, model: str) -> bool:
        """Whether another process is fetching a model."""
        self._refuse_nesting()
        return self._store.ledger.look(lambda book: self._fetching(book, model))

    def _fetching(self, book: Book, model: str) -> bool:
        mine = self._store.owner
        owners = {hold.owner for hold in book.holds() if (hold.source, hold.model) == (self._source, model)}
        return bool((owners | book.arriving(self._source, model)) - {mine})

    def hold(self, book: Book, staging: Staging, reserved: int) -> None:
        """Set bytes aside for a staging; it knows at once, as the next transaction may tell of all stagings anew."""
        charged, owner, model = min(staging.charged, reserved), self._store.owner, staging.wish.model
        with self._guard:
            staging.asked = time.monotonic() if staging.wanted and staging.wish.urgent else 0.0
            book.undo.append(functools.partial(staging.note, staging.reserved, staging.told))
            staging.note(reserved, charged)
        wants = staging.wanted, staging.asked
        book.hold(Hold(staging.id, owner, self._source, model, reserved, charged, *wants))
        self.count(book)

    def ask(self, book: Book, staging: Staging) -> None:
        """Tell again whether a request waits for what a staging wants, where that has changed, or was told long ago."""
        with self._guard:
            urgent = staging.wish.urgent
        if urgent != (staging.asked > 0) or (urgent and time.monotonic() - staging.asked >= RECHECK):
            self.hold(book, staging, staging.reserved)

    def withdraw(self, book: Book, staging: Staging) -> None:
        """Have others know nothing of a staging for which nothing is set aside."""
        book.let_go([staging.id])
        with self._guard:
            book.undo.append(functools.partial(setattr, staging, "listed", staging.listed))
            staging.listed, staging.wanted = False, 0
        self.count(book)

    def leave(self, book: Book, folder: Path, size: int) -> None:
        """Go on counting a folder that could not be deleted yet."""
        with self._guard:
            size = self._index.debris.setdefault(folder, size)
        book.hold(Hold(folder.name, self._store.owner, "", "", size, size, 0))

    def mark(self, book: Book, items: Iterable[Item], state: State) -> None:
        """Say what is to become of items."""
        owner = self._store.owner if state in {State.LEAVING, State.ARRIVING} else None
        book.mark([item.name for item in items], state, owner)

    def missed(self, model: str) -> None:
        """Book a memory miss, for the policies of all processes; the guard is held."""
        self._misses.append(model)

    def touched(self, item: Item, *, asked: bool) -> None:
        """Book a use, ``asked`` for by a lookup or not; others are told of it later, of many at once."""
        with self._guard:
            _, times = self._uses.get(item.name, (0.0, 0))
            self._uses[item.name] = item.used, times + asked
            many = max(len(self._uses), len(self._misses)) >= _BATCH and time.monotonic() >= self._rest
        if many:
            self.tell()

    def tell(self) -> None:
        """Tell what others don't know yet, where that can be done soon."""
        if not (self._uses or self._misses or self._debts) or not self._store.writable:
            return
        try:
            self.change(self.learn, patience())
        except OSError as error:  # the disk is full, or a process was stopped while it wrote: no reason to fail a hit
            self._rest = time.monotonic() + _REST
            complain("the ledger in %s can't be written: tried again later", self._store.path, error=error)

    def end(self) -> None:
        """Tell what others don't know yet, and that this process is done; what is still set aside for it stays so.

        Raises:
            OSError: the disk is full, or broken, or another process has stopped in the middle of a decision.
        """
        if self._registered[1] and self._store.writable:
            self.change(self._end, patience(_PATIENCE))

    def _end(self, book: Book) -> None:
        self.learn(book)
        book.leave(self._store.owner)
        self._unregister()

    def reset_after_fork(self) -> None:
        """In a child: what the parent has yet to tell, and what is set aside for it, are not ours."""
        self._uses, self._misses, self._debts = {}, [], []
        self._unregister()

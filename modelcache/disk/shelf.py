"""The artifacts on disk, as they are read: open, compare, release, delete.

What may stay is decided by ``disk.index`` and agreed on with other processes by ``disk.agreeing``; files are
``disk.store``'s. How an artifact comes there is ``disk.publishing``.
"""

import contextlib
import time
from collections.abc import Iterable

from modelcache.disk.agreeing import Agreement
from modelcache.disk.book import Book
from modelcache.disk.held import Held
from modelcache.disk.index import Index
from modelcache.disk.items import RECHECK, Item, Wish
from modelcache.disk.ledger import OPENING, patience
from modelcache.disk.opening import told, warn_of_budgets
from modelcache.disk.pins import Pin
from modelcache.disk.refusals import not_deleted
from modelcache.disk.removing import Remover
from modelcache.disk.states import State
from modelcache.disk.sweeping import reconcile, sweep
from modelcache.disk.tier import DiskTier
from modelcache.errors import ArtifactCorrupt, ModelCacheError
from modelcache.events import Failed, Reason
from modelcache.guard import Guard
from modelcache.telling import Teller, complain

_MOMENT = 0.02  # seconds until what other processes are doing is looked at again


class Shelf:
    """The artifacts of one disk tier.

    Args:
        tier: its settings and folder.
        source: URL of the cache's source.
        guard: the cache's lock.
        index: what lies there.
        agreed: what all processes agree on.
        remover: removes what is deleted, replaced or damaged.
        teller: takes events, outside the guard.
    """

    def __init__(
        self,
        tier: DiskTier,
        source: str,
        guard: Guard,
        index: Index,
        agreed: Agreement,
        remover: Remover,
        teller: Teller,
    ) -> None:
        self._store = store = tier.store
        self._verify = tier.verify
        self.keep_files = tier.keep_files
        self._source = source
        self._teller = teller
        self._guard = guard
        self._agreed = agreed
        self._remover = remover
        self._closed = False
        self.index = index
        with told(store.path):
            agreed.look(patience(OPENING))
            if reconcile(store, index.items):
                agreed.look(patience(OPENING))
        if store.writable:
            with contextlib.suppress(TimeoutError):  # a process was stopped while it wrote: with the first fetch
                agreed.change(agreed.learn, patience())
            told_by = store.ledger.look(Book.settings)
            warn_of_budgets(store.path, tier.budget, [text for owner, text in told_by.items() if owner != store.owner])

    @property
    def busy(self) -> bool:
        """Whether this very thread is in the middle of a decision that all processes share."""
        return self._agreed.busy

    def look(self) -> None:
        """Learn what other processes have changed, where that can be done now; never raises."""
        if not self.busy and not self._guard.busy and not self._closed:  # never the ledger from under the guard
            with contextlib.suppress(OSError):
                self._agreed.look_at_others(patience())

    def open(self, model: str, *, missed: bool = False) -> Held | None:
        """Return the model's artifact, pinned; None where it must be fetched. ``missed``: a lookup waits for it.

        Raises:
            OSError: the disk is full, or broken.
        """
        if missed:
            with self._guard:
                self.index.requested(model)
                self._agreed.missed(model)
        while True:
            self._agreed.look()
            with self._guard:
                item = self.index.models.get(model)
                if item is None:
                    return None
                self.index.pin(item)
                item.used = time.time()
            pin = None
            try:
                pin = self._store.pin(item.name)
                sound = pin is not None and self._sound(item)
            except BaseException:
                if pin is not None:
                    pin.close()
                self._unpinned(item)
                raise
            if pin is not None and sound:
                self._agreed.touched(item, asked=missed)
                return Held(item, self._store.folder(item.name), pin)
            self._lost(item, pin)

    def _sound(self, item: Item) -> bool:
        """Whether a pinned artifact is there, and is what was published, as far as that is to be looked at."""
        if self._store.read(item.name) is None:
            return False
        if self._verify == "never" or (self._verify == "first_use" and item.verified):
            return True
        item.verified = self._store.intact(item.record, item.name)
        return item.verified

    def _lost(self, item: Item, pin: Pin | None) -> None:
        """Book that an item can't be read: it is damaged, or another process removes it, or somebody has done so."""
        if pin is not None:
            pin.close()
        with self._guard:
            self.index.unpin(item)
        if pin is not None or self._store.spoilt(item.name):
            if self._store.writable:
                self._tell_damaged(item)
                self._remover.drop([item])
            else:
                with self._guard:
                    self.index.forget(item)
        elif self._store.exists(item.name):
            with self._guard:  # the ledger may say that it stays after all
                self._guard.wait(_MOMENT)
        elif self._store.writable:
            self._agreed.change(lambda book: self._gone(book, item))
        else:
            with self._guard:
                self.index.forget(item)

    def _tell_damaged(self, item: Item) -> None:
        event = Failed(
            seq=self._teller.number(),
            time=time.time(),
            model=item.model,
            tier="disk",
            reason=Reason.DAMAGED,
            bytes=item.bytes,
            error=ArtifactCorrupt.__name__,
            message=f"{item.name} in {self._store.path} is damaged: removed, to be fetched again; check that disk",
        )
        self._teller.tell([event])

    def _gone(self, book: Book, item: Item) -> None:
        self._agreed.learn(book)
        if item.state in {State.PRESENT, State.DOOMED}:  # else who removes it says when its bytes are gone
            self._remover.missing(book, item.name)
            self._agreed.learn(book)

    def release(self, held: Held) -> None:
        """Let go of a pinned artifact; one that was to be deleted, or was replaced, goes with its last pin."""
        pin, held.pin = held.pin, None
        if pin is None:
            return
        try:
            pin.close()
        finally:
            self._unpinned(held.item)

    def _unpinned(self, item: Item) -> None:
        """Book that a pin is gone, and remove what was only waiting for that."""
        with self._guard:
            self.index.unpin(item)
            self._guard.notify()
        if item.pins or not self._store.writable:
            return
        try:
            self._agreed.look()  # another process may have replaced or deleted it
            if item.state is State.DOOMED:
                self._remover.drop([item], patience())
        except OSError as error:  # it goes when room is wanted
            complain("%s can't be removed now", item.name, error=error)

    def delete(self, model: str) -> bool:
        """Remove all versions of a model's artifact, pinned ones with their last pin; return whether all is gone."""
        if not self._store.writable:
            raise not_deleted(model, self._store.path)
        self._agreed.look()
        with self._guard:
            items = self.index.of(model)
        if not items:
            return True
        begun, stayed = self._remover.drop(items)
        return not stayed and len(begun) == len(items)

    def await_others(self, wish: Wish) -> Held | None:
        """Wait while another process fetches the model; return it pinned, None where it must be fetched after all.

        A process that is only paused is waited for; one that has died is not.

        Raises:
            Cancelled: it was told to stop, or nobody waits for it any more.
            OSError: the disk is full, or broken.
        """
        state, wish.state, looked = wish.state, "fetching", 0.0
        try:
            while self._agreed.fetched_elsewhere(wish.model):
                if time.monotonic() - looked >= RECHECK:
                    sweep(self._store)
                    looked = time.monotonic()
                with self._guard:
                    wish.check()
                    self._guard.wait(_MOMENT)
        finally:
            wish.state = state
        return self.open(wish.model)

    def before_fork(self) -> None:
        """Close what must not come over a fork; this thread may hold the guard, in a signal handler."""
        self._store.before_fork(guarded=self._guard.busy)

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._store.after_fork_in_parent()

    def reset_after_fork(self, kept: Iterable[Held], leased: Iterable[Held]) -> None:
        """In a child: no I/O but opening, locking and closing descriptors.

        Args:
            kept: what models that were loaded before the fork keep pinned; ``adopt`` each of them later. Until then
                nothing keeps their files but the parent: this child may never look at the cache.
            leased: which of them this child holds leases on, so that they are pinned at once.
        """
        kept = list(kept)
        self._store.reset_after_fork(held.pin for held in leased if held.pin is not None)
        self._agreed.reset_after_fork()
        self.index.reset_after_fork()
        for held in kept:
            self.index.pin(held.item)

    def adopt(self, kept: Iterable[Held]) -> None:
        """In a child: replace the pins that held artifacts inherited by our own."""
        for held in kept:
            inherited = held.pin
            try:
                own = self._store.pin(held.item.name) if inherited is not None else None
            except OSError:  # no descriptor left: the inherited one holds as well
                return
            if own is None or inherited is None:
                continue
            with self._guard:
                swapped = held.pin is inherited  # else the model has left meanwhile, and its pin with it
                if swapped:
                    held.pin = own
            (inherited if swapped else own).close()
        self._store.adopted()

    def close(self) -> None:
        """Remove this process's temporary folder; the artifacts stay for the next start."""
        with contextlib.suppress(OSError, ModelCacheError):  # or the next start knows less of who was used last
            self._agreed.end()
        self._closed = True
        self._store.close()

"""The artifacts on disk: open, stage, publish, delete.

What may stay is decided by ``disk.index`` and agreed on with other processes by ``disk.agreeing``; room is made by
``disk.reserving``; files are ``disk.store``'s.
"""

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

import attrs

from modelcache.disk.agreeing import Agreement
from modelcache.disk.book import Book, State
from modelcache.disk.index import RECHECK, Index, Item, Staging, Wish
from modelcache.disk.layout import BLOCK, Record, charged, folder_prefix
from modelcache.disk.ledger import patience
from modelcache.disk.pins import Pin
from modelcache.disk.reserving import DiskRoom
from modelcache.disk.sweeping import sweep
from modelcache.disk.tier import DiskTier
from modelcache.errors import AccessDenied, ArtifactCorrupt, ModelCacheError
from modelcache.events import Failed, Reason
from modelcache.guard import Guard
from modelcache.telling import Teller, complain

_MOMENT = 0.02  # seconds until what other processes are doing is looked at again
_OVERHEAD = 4 * BLOCK  # the published folder, artifact/ in it, the record, and the figures


@attrs.define(eq=False)
class Held:
    """A published artifact that no process removes while this is open.

    Attributes:
        item: what it is.
        folder: where it lies.
        pin: what keeps it there; None once it was released.
    """

    item: Item
    folder: Path
    pin: Pin | None

    @property
    def path(self) -> Path:
        """What the loader gets."""
        return self.item.record.path(self.folder)

    @property
    def size(self) -> int:
        """Bytes of the artifact's files."""
        return self.item.record.size

    @property
    def version(self) -> str:
        """The source's version of it."""
        return self.item.record.version


class Shelf:
    """The artifacts of one disk tier.

    Args:
        tier: its settings and folder.
        source: URL of the cache's source.
        guard: the cache's lock.
        index: what lies there.
        agreed: what all processes agree on.
        room: makes room for more.
        teller: takes events, outside the guard.
    """

    def __init__(
        self,
        tier: DiskTier,
        source: str,
        guard: Guard,
        index: Index,
        agreed: Agreement,
        room: DiskRoom,
        teller: Teller,
    ) -> None:
        self._store = store = tier.store
        self._verify = tier.verify
        self._source = source
        self._teller = teller
        self._guard = guard
        self._agreed = agreed
        self._room = room
        self._closed = False
        self.index = index
        agreed.look()
        if store.writable:
            with contextlib.suppress(TimeoutError):  # a process was stopped while it wrote: with the first fetch
                agreed.change(agreed.learn, patience())
            agreed.warn()

    @property
    def mode(self) -> int:
        """Permissions of folders made in this tier."""
        return self._store.mode

    @property
    def busy(self) -> bool:
        """Whether this very thread is in the middle of a decision that all processes share."""
        return self._agreed.busy

    def free(self) -> int:
        """Return the bytes that the file system has left."""
        return self._store.free()

    def look(self) -> None:
        """Learn what other processes have changed, where that can be done now; never raises."""
        if not self.busy and not self._guard.busy and not self._closed:  # never the ledger from under the guard
            with contextlib.suppress(OSError):
                self._agreed.look_at_others()

    def open(self, model: str, *, missed: bool = False) -> Held | None:
        """Return the model's artifact, pinned; None where it must be fetched. ``missed``: a lookup waits for it.

        Raises:
            OSError: the disk is full, or broken.
        """
        if missed:
            with self._guard:
                self.index.requested(model)
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
                self._agreed.touched(item)
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
                self._room.remove(self._agreed.change(lambda book: self._doom(book, [item])))
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
            book.gone([item.name])
            with self._guard:
                self.index.forget(item)

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
                self._room.remove(self._agreed.change(lambda book: self._doom(book, [item]), patience()))
        except OSError as error:  # it goes when room is wanted
            complain("%s can't be removed now", item.name, error=error)

    def _doom(self, book: Book, items: Iterable[Item]) -> list[Item]:
        """Begin to remove what nobody reads here, and have the rest go with its last pin; return the former."""
        self._agreed.learn(book)
        with self._guard:
            begun = [item for item in items if item.state is State.LEAVING]
            stay = [item for item in items if item.state is not State.GONE and item.state is not State.LEAVING]
            due = [item for item in stay if not item.pins]
            for item in stay:
                item.was = State.DOOMED  # also where another process reads it
                self.index.become(item, State.DOOMED if item.pins else State.LEAVING)
        self._agreed.mark(book, begun, State.DOOMED)  # or it would stay after all where its remover finds it read
        self._agreed.mark(book, [item for item in stay if item not in due], State.DOOMED)
        self._agreed.mark(book, due, State.LEAVING)
        return due

    def delete(self, model: str) -> bool:
        """Remove all versions of a model's artifact, pinned ones with their last pin; return whether all is gone."""
        if not self._store.writable:
            raise self._read_only(model)
        self._agreed.look()
        with self._guard:
            items = self.index.of(model)
        if not items:
            return True
        due = self._agreed.change(lambda book: self._doom(book, items))
        return not self._room.remove(due) and len(due) == len(items)

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

    def stage(self, wish: Wish, size: int, least: int, beside: int = 0, known: str = "") -> Staging:
        """Reserve room for a download of ``size`` bytes, ``least`` in all, and return a folder for it.

        ``beside``: bytes of the version on disk that stays until this one is published; ``known``: its folder's name.

        Raises:
            TooLarge: it can never fit within the budget; nothing was downloaded.
            NoRoom: what is in the way is leased, or not ours.
            FetchedElsewhere: another process is fetching it already.
            Contention: give up, and try again with more.
            AccessDenied: the folder can only be read.
            OSError: the disk is full, or broken.
        """
        if not self._store.writable:
            raise self._read_only(wish.model)
        self._clear_debris()
        staging = Staging(wish, self._store.path, beside=beside, known=known)
        with self._guard:
            self.index.stagings.add(staging)
        try:
            self._room.reserve(staging, max(charged(size) + _OVERHEAD, least))
            staging.folder = self._store.stage()
        except BaseException:
            self._drop(staging)
            raise
        staging.charged = _OVERHEAD
        return staging

    def _read_only(self, model: str) -> AccessDenied:
        return AccessDenied(
            f"model {model!a} is not in disk folder {self._store.path}, or not as it should be, and that folder can "
            f"only be read: give DiskTier a folder that this user may write to",
            model=model,
            source=str(self._store.path),
        )

    def grow(self, staging: Staging, amount: int) -> None:
        """Charge bytes about to be written (negative: given back); make room where the reservation is used up.

        Raises:
            TooLarge, NoRoom, Contention, OSError: as ``stage``.
        """
        staging.charged += amount
        if staging.charged > staging.reserved:
            self._room.reserve(staging, staging.charged - staging.reserved)

    def discard(self, staging: Staging) -> None:
        """Delete what was staged, and give its reservation back."""
        gone = self._store.discard(staging.folder)
        self._drop(staging, None if gone else staging.folder)

    def _clear_debris(self) -> None:
        with self._guard:
            debris = list(self.index.debris)
        gone = [folder for folder in debris if self._store.discard(folder)]
        if gone:
            with self._guard:
                ids = [self.index.debris.pop(folder) for folder in gone if folder in self.index.debris]
            self._agreed.settle(lambda book: self._let_go(book, ids))

    def _let_go(self, book: Book, ids: Iterable[str]) -> None:
        book.let_go(ids)
        self._agreed.count(book)

    def _drop(self, staging: Staging, debris: Path | None = None) -> None:
        """Give a reservation back; what can't be deleted now (no descriptor left, say) counts until it is gone."""
        with self._guard:
            self.index.stagings.discard(staging)
        if staging.listed:
            self._agreed.drop(staging, debris)
        with self._guard:
            self._guard.notify()

    def publish(self, staging: Staging, record: Record) -> Held:
        """Make a staged artifact visible, durably, and return it pinned.

        Raises:
            TooLarge, NoRoom, Contention: what the file system allocated does not fit.
            OSError: the disk is full, or broken.
        """
        record = self._store.seal(staging.folder, record)
        if record.bytes > staging.reserved:
            self._room.reserve(staging, record.bytes - staging.reserved)
        name = self._store.new_name(folder_prefix(self._source, record.model))
        self._agreed.change(lambda book: self._arriving(book, staging, name, record))
        with self._guard:
            self.index.stagings.discard(staging)
            item = self.index.items[name]
            item.verified = True
            self.index.pin(item)  # before anybody sees it, so that nobody removes it first
        pin = None
        try:
            self._store.publish(staging.folder, name)
            pin = self._store.pin(name)
        except BaseException:
            if pin is not None:
                pin.close()
            with self._guard:
                self.index.unpin(item)
            self._store.withdraw(name, staging.folder)
            self._agreed.settle(lambda book: self._returned(book, staging, item))
            raise
        late: list[bool] = []
        old = self._agreed.settle(lambda book: self._arrived(book, item, late=bool(late))) or []
        late.append(True)
        with self._guard:
            item = self._same(item)
            self._guard.notify()
        self._room.remove(old)
        return Held(item, self._store.folder(name), pin)

    def _same(self, item: Item) -> Item:
        """Return what is now known under a pinned item's name: the ledger may be a new one; the guard is held."""
        now = self.index.items.get(item.name, item)
        if now is not item:
            self.index.pin(now)
            self.index.unpin(item)
        now.verified = item.verified
        return now

    def _arriving(self, book: Book, staging: Staging, name: str, record: Record) -> None:
        """Count the folder instead of the staging, before it is there: so no crash leaves it uncounted."""
        self._agreed.learn(book)
        book.let_go([staging.id])
        book.add([(name, record, record.fetched)], State.ARRIVING, self._store.owner)
        self._agreed.learn(book)

    def _returned(self, book: Book, staging: Staging, item: Item) -> None:
        """Count the staging again: it could not be published."""
        self._agreed.learn(book)
        book.gone([item.name])
        with self._guard:
            self.index.forget(item)
        self._agreed.hold(book, staging, staging.reserved)

    def _arrived(self, book: Book, item: Item, *, late: bool) -> list[Item]:
        """Serve what was published, and begin to remove earlier versions of it; ``late``: leave that to others."""
        self._agreed.learn(book)
        book.add([(item.name, item.record, item.record.fetched)], State.PRESENT, None)  # it may be another ledger
        self._agreed.learn(book)
        with self._guard:
            old = [at for at in self.index.of(item.model) if at.name != item.name]
        if not late:
            return self._doom(book, old)
        book.mark([at.name for at in old if at.state is State.PRESENT], State.DOOMED, None)
        return []

    def before_fork(self) -> None:
        """Close what must not come over a fork."""
        self._store.before_fork()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._store.after_fork_in_parent()

    def reset_after_fork(self, kept: Iterable[Held]) -> None:
        """In a child: no I/O but closing descriptors.

        Args:
            kept: what models that were loaded before the fork keep pinned; ``adopt`` each of them later.
        """
        kept = list(kept)
        self._store.reset_after_fork(held.pin for held in kept if held.pin is not None)
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

"""From a reservation to a published artifact: stage, charge, publish, or give all of it back.

What is fetched into the staged folder is ``fetch``'s business, room is made by ``disk.reserving``; what is published is
read by way of ``disk.shelf``.
"""

import sys
from pathlib import Path

from modelcache.blocks import Blocks
from modelcache.disk.agreeing import Agreement
from modelcache.disk.book import Book
from modelcache.disk.held import Held
from modelcache.disk.index import Index
from modelcache.disk.items import Item, Staging, Wish
from modelcache.disk.layout import UNSEALED, Draft, Record, folder_prefix
from modelcache.disk.refusals import read_only
from modelcache.disk.removing import Remover
from modelcache.disk.reserving import DiskRoom
from modelcache.disk.states import State
from modelcache.disk.store import Store
from modelcache.guard import Guard


class Publisher:
    """Brings artifacts into one disk tier.

    Args:
        store: its folder.
        source: URL of the cache's source.
        guard: the cache's lock.
        index: what lies there.
        agreed: what all processes agree on.
        room: makes room for more.
        remover: removes earlier versions, and what could not be removed before.
    """

    def __init__(
        self,
        store: Store,
        source: str,
        guard: Guard,
        index: Index,
        agreed: Agreement,
        room: DiskRoom,
        remover: Remover,
    ) -> None:
        self._store = store
        self._source = source
        self._guard = guard
        self._index = index
        self._agreed = agreed
        self._room = room
        self._remover = remover

    @property
    def mode(self) -> int:
        """Permissions of folders made in this tier."""
        return self._store.mode

    @property
    def blocks(self) -> Blocks:
        """How the file system allocates."""
        return self._store.blocks

    def _overhead(self, length: int) -> int:
        """Return what the published folder takes, with artifact/, the figures, and a record of that length in it."""
        return 2 * self.blocks.folder + self.blocks.charged(1) + self.blocks.charged(length)

    @property
    def path(self) -> Path:
        """The folder of the tier."""
        return self._store.path

    def free(self) -> int:
        """Return the bytes that the file system has left."""
        return self._store.free()

    def stage(self, wish: Wish, size: int, least: int, beside: int = 0, known: str = "") -> Staging:
        """Reserve room for files that take ``size`` bytes on disk, ``least`` in all, and return a folder for them.

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
            raise read_only(wish.model, self._store.path)
        self._remover.clear()
        staging = Staging(wish, self._store.path, beside=beside, known=known)
        with self._guard:
            self._index.stagings.add(staging)
        try:
            longest = len(Draft(staging.id, self._source, wish.model, sys.maxsize).to_json())
            overhead = self._overhead(longest)
            draft = Draft(staging.id, self._source, wish.model, max(size + overhead, least)).to_json()
            self._room.reserve(staging, max(size + overhead, least))
            staging.folder = self._store.stage(draft)
        except BaseException:
            self._drop(staging)
            raise
        staging.charged, staging.recorded = overhead, self.blocks.charged(longest)
        try:
            self._agreed.confirm()  # a ledger that was made anew before the draft was there does not know of it
        except BaseException:
            self.discard(staging)
            raise
        return staging

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

    def _drop(self, staging: Staging, debris: Path | None = None) -> None:
        """Give a reservation back; what can't be deleted now (no descriptor left, say) counts until it is gone."""
        if staging.listed:
            self._agreed.settle(lambda book: self._dropped(book, staging, debris))
        with self._guard:
            self._index.stagings.discard(staging)
            self._guard.notify()

    def _dropped(self, book: Book, staging: Staging, debris: Path | None) -> None:
        self._agreed.learn(book)  # the ledger may be a new one
        self._end(book, staging)
        if debris is not None:
            self._agreed.leave(book, debris, staging.reserved)
        self._agreed.count(book)

    def _end(self, book: Book, staging: Staging) -> None:
        """Set nothing aside for a staging any more; nor does the next transaction, which may tell of all anew."""
        book.let_go([staging.id, staging.folder.name])  # the one, or in a ledger that was made anew, the other
        with self._guard:
            if staging in self._index.stagings:
                self._index.stagings.discard(staging)
                book.undo.append(lambda: self._index.stagings.add(staging))

    def publish(self, staging: Staging, record: Record) -> Held:
        """Make a staged artifact visible, durably, and return it pinned.

        Raises:
            TooLarge, NoRoom, Contention: what the file system allocated does not fit.
            OSError: the disk is full, or broken.
        """
        length = len(record._replace(digest=UNSEALED).to_json())
        if (more := self.blocks.charged(length) - staging.recorded) > 0:  # of a long id, or a long URL
            self.grow(staging, more)
        record = self._store.seal(staging.folder, record)
        if record.bytes > staging.reserved:
            self._room.reserve(staging, record.bytes - staging.reserved)
        name = self._store.new_name(folder_prefix(self._source, record.model))
        self._agreed.change(lambda book: self._arriving(book, staging, name, record))
        with self._guard:
            item = self._index.items[name]
            item.verified = True
            self._index.pin(item)  # before anybody sees it, so that nobody removes it first
        pin = None
        try:
            pin = self._store.pin(name, staging.folder)  # the same for other processes
            self._store.publish(staging.folder, name)
        except BaseException:
            if pin is not None:
                pin.close()
            with self._guard:
                self._index.unpin(item)
                self._index.stagings.add(staging)
            self._store.withdraw(name, staging.folder)
            stays = self._store.exists(name)  # the system may refuse that, too
            self._agreed.settle(lambda book: self._returned(book, staging, item, stays=stays))
            raise
        with self._remover.duty() as due:

            def arrive(book: Book) -> bool:
                due[:] = self._arrived(book, staging, item, late=False)
                return True

            if not self._agreed.settle(arrive, lambda book: self._arrived(book, staging, item, late=True)):
                due.clear()
            with self._guard:
                item = self._same(item)
                self._guard.notify()
            self._remover.remove(list(due))
        return Held(item, self._store.folder(name), pin)

    def _same(self, item: Item) -> Item:
        """Return what is now known under a pinned item's name: the ledger may be a new one; the guard is held."""
        now = self._index.items.get(item.name, item)
        if now is not item:
            self._index.pin(now)
            self._index.unpin(item)
        now.verified = item.verified
        return now

    def _arriving(self, book: Book, staging: Staging, name: str, record: Record) -> None:
        """Count the folder instead of the staging, before it is there: so no crash leaves it uncounted."""
        self._agreed.learn(book)
        self._end(book, staging)
        book.add([(name, record, record.fetched)], State.ARRIVING, self._store.owner)
        self._agreed.learn(book)

    def _returned(self, book: Book, staging: Staging, item: Item, *, stays: bool) -> None:
        """Count the staging again: it could not be published; ``stays``: nor be taken back."""
        self._agreed.learn(book)
        if stays:
            book.mark([item.name], State.DOOMED, None)
        else:
            book.gone([item.name])
        self._agreed.learn(book)
        with self._guard:
            wanted = staging in self._index.stagings  # else it was discarded meanwhile
        if wanted:
            self._agreed.hold(book, staging, staging.reserved)

    def _arrived(self, book: Book, staging: Staging, item: Item, *, late: bool) -> list[Item]:
        """Serve what was published, and begin to remove earlier versions of it; ``late``: leave that to others."""
        self._agreed.learn(book)
        book.let_go([staging.folder.name])
        if book.state(item.name) in {None, State.ARRIVING}:  # it may be another ledger
            book.add([(item.name, item.record, item.record.fetched)], State.PRESENT, None)
        self._agreed.learn(book)
        with self._guard:
            old = [at for at in self._index.of(item.model) if at.name != item.name and at.fetched <= item.fetched]
            served = self._index.models.get(item.model)
            if served is not None and served.fetched > item.fetched:  # another process was faster
                old.append(self._index.items.get(item.name, item))
        if not late:
            return self._remover.doom(book, old)
        book.mark([at.name for at in old if at.state is State.PRESENT], State.DOOMED, None)
        book.expel(at.name for at in old)
        return []

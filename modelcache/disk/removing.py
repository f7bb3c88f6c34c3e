"""Removing artifacts that were marked as leaving: moved aside, deleted, and told to all processes.

Who goes is decided elsewhere (``disk.reserving``, ``disk.shelf``), in the transaction that marks them.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from modelcache.disk.agreeing import Agreement
from modelcache.disk.book import Book
from modelcache.disk.index import Index
from modelcache.disk.items import Item
from modelcache.disk.states import REMOVING, State
from modelcache.disk.store import Store
from modelcache.guard import Guard
from modelcache.telling import complain

_STUCK = 30.0  # seconds until the removal of what the system refuses to remove is tried again


class Remover:
    """Removes from one disk tier.

    Args:
        store: its folder.
        index: what lies there.
        guard: the cache's lock.
        agreed: what all processes agree on.
    """

    def __init__(self, store: Store, index: Index, guard: Guard, agreed: Agreement) -> None:
        self._store = store
        self._index = index
        self._guard = guard
        self._agreed = agreed
        self._duties: list[list[Item]] = []  # of all threads; changed and read under the guard

    @contextlib.contextmanager
    def duty(self) -> Iterator[list[Item]]:
        """Give a list for what is marked as leaving, while it is marked and removed.

        Where something comes between, such as Ctrl-C just when the mark has become true, it is left for whoever needs
        the room: else all would wait for this process to remove it.
        """
        due: list[Item] = []
        with self._guard:
            self._duties.append(due)
        try:
            yield due
        except BaseException:
            if due:
                self._agreed.settle(lambda book: self._leave(book, due))
            raise
        finally:
            with self._guard:
                self._duties = [each for each in self._duties if each is not due]

    def _leave(self, book: Book, due: Collection[Item]) -> None:
        self._agreed.learn(book)
        mine = {name for name, state in book.owned(self._store.owner) if state in REMOVING}
        with self._guard:
            mine -= {item.name for others in self._duties if others is not due for item in others}
            known = [self._index.items.get(item.name, item) for item in due if item.name in mine]
            for item in known:
                self._index.become(item, State.DOOMED)
        self._agreed.mark(book, known, State.DOOMED)

    def drop(
        self, items: Iterable[Item], check: Callable[[], None] | None = None
    ) -> tuple[Collection[Item], Collection[Item]]:
        """Remove items, those that are read here with their last pin; return what was begun, and what of it stayed.

        Raises:
            OSError: the disk is full, or broken, or ``check`` has raised it.
        """
        with self.duty() as due:

            def doom(book: Book) -> list[Item]:
                due[:] = self._agreed.doom(book, items)
                return list(due)

            begun = self._agreed.change(doom, check)
            return begun, self.remove(begun)

    def remove(self, items: Collection[Item]) -> list[Item]:
        """Delete the files of items marked as leaving; return those that another process still reads.

        Raises:
            OSError: the disk is full, or broken.
        """
        kept, debris, gone = list(items), dict[Path, Item](), list[str]()
        try:
            for item in items:
                self._remove(item, kept, debris, gone)
        finally:  # also where Ctrl-C comes between: or nobody would remove the rest, and all would wait for that
            for aside, item in [*debris.items()]:
                if not os.path.lexists(aside):
                    del debris[aside]
                elif item in kept:  # it came right after the move
                    kept.remove(item)
            self._agreed.settle(lambda book: self._removed(book, items, kept, debris, gone))
            with self._guard:
                self._guard.notify()
        return kept

    def _remove(self, item: Item, kept: list[Item], debris: dict[Path, Item], gone: list[str]) -> None:
        """Remove one item, and note what has become of it."""
        try:
            aside = self._store.aside()
            debris[aside] = item
            moved = self._store.remove(item.name, aside)
            if moved is None:
                return
            kept.remove(item)
            debris[moved] = item
            if self._store.discard(moved):
                gone.append(moved.name)
        except OSError as error:  # no descriptor left, or no permission: it still counts, and is tried again later
            item.stuck = time.monotonic() + _STUCK
            complain("%s can't be removed now: look at its owner and mode", item.name, error=error)

    def _removed(
        self, book: Book, items: Collection[Item], kept: list[Item], debris: dict[Path, Item], gone: list[str]
    ) -> None:
        """Book what has gone, and what has not."""
        self._agreed.learn(book)
        book.let_go(gone)  # by its name a ledger that was made anew meanwhile knows it
        fates = {item: State.DOOMED if item.state is State.EXPELLED else item.was for item in kept}
        fates = {item: fate for item, fate in fates.items() if item.state in REMOVING}  # else somebody said otherwise
        for fate in {*fates.values()}:
            self._agreed.mark(book, [item for item in fates if fates[item] is fate], fate)
        book.gone(item.name for item in items if item not in kept)
        with self._guard:
            for item in items:
                if item in kept:
                    self._index.kept(item, fates.get(item, item.state))
                else:
                    self._index.forget(item)
        for folder, item in debris.items():
            self._agreed.leave(book, folder, item.bytes)
        self._agreed.count(book)

    def clear(self) -> None:
        """Delete what could not be deleted before, as far as it can be now."""
        with self._guard:
            debris = list(self._index.debris)
        gone = [folder for folder in debris if self._store.discard(folder)]
        if gone:
            with self._guard:
                ids = [folder.name for folder in gone if self._index.debris.pop(folder, None) is not None]
            self._agreed.settle(lambda book: self._let_go(book, ids))

    def _let_go(self, book: Book, ids: Iterable[str]) -> None:
        self._agreed.learn(book)
        book.let_go(ids)
        self._agreed.count(book)

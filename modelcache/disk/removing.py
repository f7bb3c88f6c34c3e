"""Removing artifacts that were marked as leaving: moved aside, deleted, and told to all processes.

Who goes is decided elsewhere (``disk.reserving``, ``disk.shelf``), in the transaction that marks them.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import attrs

from modelcache.disk.agreeing import Agreement
from modelcache.disk.book import Book
from modelcache.disk.index import Index
from modelcache.disk.items import Item
from modelcache.disk.states import REMOVING, State
from modelcache.disk.store import Store
from modelcache.guard import Guard
from modelcache.telling import complain

_STUCK = 30.0  # seconds until the removal of what the system refuses to remove is tried again


@attrs.define
class _Outcome:
    """What has become of items that were to be removed.

    Attributes:
        kept: what could not be moved aside.
        debris: what was, and is not deleted yet, by where it is now.
        gone: names of what was deleted, where it was then.
        missing: what was not there.
    """

    kept: list[Item]
    debris: dict[Path, Item] = attrs.Factory(dict)
    gone: list[str] = attrs.Factory(list)
    missing: list[Item] = attrs.Factory(list)

    def look(self) -> None:
        """Look at the folders: an interrupt may have come before that was noted."""
        for aside, item in [*self.debris.items()]:
            if not os.path.lexists(aside):
                del self.debris[aside]
            elif item in self.kept:
                self.kept.remove(item)


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
        theirs = self._theirs(book)
        with self._guard:
            theirs |= {item.name for others in self._duties if others is not due for item in others}
            known = [self._index.items.get(item.name, item) for item in due if item.name not in theirs]
            known = [item for item in known if item.state in REMOVING]
            for item in known:
                self._index.become(item, State.DOOMED)
        self._agreed.mark(book, known, State.DOOMED)

    def _theirs(self, book: Book) -> set[str]:
        """Return what other processes bring or remove; one that has lost its temporary folder has another name now."""
        return {name for owner in self._store.workshop.others() for name, _ in book.owned(owner)}

    def drop(
        self, items: Iterable[Item], check: Callable[[], None] | None = None
    ) -> tuple[Collection[Item], Collection[Item]]:
        """Remove items, those that are read here with their last pin; return what was begun, and what of it stayed.

        Raises:
            OSError: the disk is full, or broken, or ``check`` has raised it.
        """
        with self.duty() as due:

            def doom(book: Book) -> list[Item]:
                due[:] = self.doom(book, items)
                return list(due)

            begun = self._agreed.change(doom, check)
            return begun, self.remove(begun)

    def doom(self, book: Book, items: Iterable[Item]) -> list[Item]:
        """Begin to remove what nobody reads here, and have the rest go with its last pin; return the former.

        What is only arriving is not there yet: its bytes are its owner's.
        """
        self._agreed.learn(book)
        with self._guard:
            begun = [item for item in items if item.state is State.LEAVING]
            stay = [item for item in items if item.state in {State.PRESENT, State.DOOMED}]
            due = [item for item in stay if not item.pins]
            for item in stay:
                item.was = State.DOOMED  # also where another process reads it
                self._index.become(item, State.DOOMED if item.pins else State.LEAVING)
        book.expel(item.name for item in begun)  # or it would stay after all where its remover finds it read
        self._agreed.mark(book, [item for item in stay if item not in due], State.DOOMED)
        self._agreed.mark(book, due, State.LEAVING)
        return due

    def missing(self, book: Book, name: str) -> None:
        """Say that a folder is not there: it is gone, or somebody has moved it aside, who says when it is."""
        aside = self._store.workshop.aside(name)
        with self._guard:
            left = aside in self._index.debris  # which counts by itself
        book.missing(name, None if left else self._store.workshop.taker(name))

    def remove(self, items: Collection[Item]) -> list[Item]:
        """Delete the files of items marked as leaving; return those that another process still reads.

        Raises:
            OSError: the disk is full, or broken.
        """
        outcome = _Outcome(list(items))
        try:
            for item in items:
                self._remove(item, outcome)
        finally:  # also where Ctrl-C comes between: or nobody would remove the rest, and all would wait for that
            self._agreed.settle(lambda book: self._removed(book, items, outcome))
            with self._guard:
                self._guard.notify()
        return outcome.kept

    def _remove(self, item: Item, outcome: _Outcome) -> None:
        """Remove one item, and note what has become of it."""
        try:
            aside = self._store.workshop.aside(item.name)
            outcome.debris[aside] = item  # first: an interrupt may come right after the move
            moved = self._store.remove(item.name, aside)
            if moved is None:
                return
            outcome.kept.remove(item)
            outcome.debris[moved] = item
            if self._store.discard(moved):
                outcome.gone.append(moved.name)
        except OSError as error:  # no descriptor left, or no permission: it still counts, and is tried again later
            if isinstance(error, FileNotFoundError) and not self._store.exists(item.name):
                outcome.kept.remove(item)
                outcome.missing.append(item)
                return
            item.stuck = time.monotonic() + _STUCK
            complain("%s can't be removed now: look at its owner and mode", item.name, error=error)

    def _removed(self, book: Book, items: Collection[Item], outcome: _Outcome) -> None:
        """Book what has gone, and what has not; may be called again, after others have decided."""
        self._agreed.learn(book)
        outcome.look()
        book.let_go(outcome.gone)  # by its name a ledger that was made anew meanwhile knows it
        theirs = self._theirs(book) if outcome.kept else set()
        stay = [item for item in outcome.kept if item.state in REMOVING and item.name not in theirs]  # else said so
        fates = {item: State.DOOMED if item.state is State.EXPELLED else item.was for item in stay}
        for fate in {*fates.values()}:
            self._agreed.mark(book, [item for item in fates if fates[item] is fate], fate)
        book.gone(item.name for item in items if item not in outcome.kept and item not in outcome.missing)
        for item in outcome.missing:
            self.missing(book, item.name)
        with self._guard:
            for item in items:
                if item in outcome.kept:
                    self._index.kept(item, fates.get(item, item.state))
                elif item not in outcome.missing:
                    self._index.forget(item)
        for folder, item in outcome.debris.items():
            self._agreed.leave(book, folder, item.bytes)
        self._agreed.learn(book)

    def clear(self) -> None:
        """Delete what could not be deleted before, as far as it can be now."""
        with self._guard:
            debris = list(self._index.debris)
        gone = [folder for folder in debris if self._store.discard(folder)]
        if gone:
            self._agreed.settle(lambda book: self._let_go(book, gone))

    def _let_go(self, book: Book, folders: Collection[Path]) -> None:
        self._agreed.learn(book)
        book.let_go(folder.name for folder in folders)
        with self._guard:
            debris = self._index.debris
            left = {folder: debris.pop(folder) for folder in folders if folder in debris}
            book.undo.append(lambda: debris.update(left))
        self._agreed.count(book)

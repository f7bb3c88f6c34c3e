"""The artifacts on disk: open, stage, publish, delete.

What may stay is decided by ``disk.index``; room is made by ``disk.reserving``; files are ``disk.store``'s.
"""

import logging
import time
from collections.abc import Iterable
from pathlib import Path

import attrs

from modelcache.disk.index import Index, Item, Staging, Wish
from modelcache.disk.layout import BLOCK, Record, charged, folder_prefix
from modelcache.disk.pins import Pin
from modelcache.disk.reserving import DiskRoom
from modelcache.disk.store import Published, Store
from modelcache.guard import Guard

_log = logging.getLogger("modelcache")
_OVERHEAD = 4 * BLOCK  # the published folder, artifact/ in it, the record, and the figures


@attrs.define(eq=False)
class Held:
    """A published artifact that no process removes while this is open."""

    item: Item
    pin: Pin | None

    @property
    def path(self) -> Path:
        """What the loader gets."""
        return self.item.published.path

    @property
    def size(self) -> int:
        """Bytes of the artifact's files."""
        return self.item.published.record.size

    @property
    def version(self) -> str:
        """The source's version of it."""
        return self.item.published.record.version


class Shelf:
    """The artifacts of one disk tier.

    Args:
        store: its folder.
        source: URL of the cache's source.
        guard: the cache's lock.
        index: what lies there.
        room: makes room for more.
    """

    def __init__(self, store: Store, source: str, guard: Guard, index: Index, room: DiskRoom) -> None:
        self._store = store
        self._source = source
        self._guard = guard
        self._room = room
        self.index = index
        self._refresh()
        self._clear_damaged()

    def _clear_damaged(self) -> None:
        """Remove published folders whose record can't be read, so that their bytes do not go uncounted."""
        with self._guard:
            known = set(self.index.items)
        for name in (self._store.names() or set()) - known:
            if self._store.read(name) is None:
                _log.warning("%s in %s is damaged: removed, to be fetched again", name, self._store.path)
                try:
                    aside = self._store.remove(self._store.folder(name))
                    if aside is not None:
                        self._store.discard(aside)
                except OSError as error:
                    _log.warning("%s can't be removed (%s): look at its owner and mode", name, error)

    @property
    def mode(self) -> int:
        """Permissions of folders made in this tier."""
        return self._store.mode

    def free(self) -> int:
        """Return the bytes that the file system has left."""
        return self._store.free()

    def _refresh(self, prefix: str = "") -> None:
        """Learn what other processes published or removed; only names with ``prefix`` are looked at."""
        with self._guard:  # before the listing: what is published after it is not known, and so not missed
            known = {name: item for name, item in self.index.items.items() if name.startswith(prefix)}
        listed = self._store.names()
        if listed is None:
            return
        names = {name for name in listed if name.startswith(prefix)}
        found = [published for name in names - known.keys() if (published := self._store.read(name))]
        with self._guard:
            for name, item in known.items():
                if name not in names and not item.leaving and self.index.items.get(name) is item:
                    self.index.forget(item)
            self.index.take_in(found)

    def open(self, model: str, *, missed: bool = False) -> Held | None:
        """Return the model's artifact, pinned; None where it must be fetched. ``missed``: a lookup waits for it."""
        with self._guard:
            if missed:
                self.index.requested(model)
            known = model in self.index.models
        if not known:
            self._refresh(folder_prefix(self._source, model))
        while True:
            with self._guard:
                item = self.index.models.get(model)
                if item is None or item.leaving or item.doomed:
                    return None
                item.pins += 1
                item.used = time.time()
            pin = None
            try:
                pin = self._store.pin(item.published.folder)
            except BaseException:
                self._unpinned(item)
                raise
            if pin is not None:
                return Held(item, pin)
            with self._guard:  # another process removed it
                item.pins -= 1
                self.index.forget(item)

    def newest(self, model: str) -> Held | None:
        """Return the model's artifact, pinned, as other processes may have published it by now."""
        self._refresh(folder_prefix(self._source, model))
        return self.open(model)

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
            item.pins -= 1
            due = item.doomed and not item.pins and not item.leaving
            item.leaving = item.leaving or due
            self._guard.notify()
        if due:
            self._room.remove([item])

    def delete(self, model: str) -> bool:
        """Remove all versions of a model's artifact, pinned ones with their last pin; return whether all is gone."""
        self._refresh(folder_prefix(self._source, model))
        with self._guard:
            mine = [item for item in self.index.items.values() if item.published.record.source == self._source]
            items = [item for item in mine if item.model == model]
            due = [item for item in items if not item.pins and not item.leaving]
            for item in items:
                item.doomed = item.doomed or item not in due
                item.leaving = item.leaving or item in due
        return not self._room.remove(due) and len(due) == len(items)

    def stage(self, wish: Wish, size: int, least: int, beside: int = 0) -> Staging:
        """Reserve room for a download of ``size`` bytes, ``least`` in all, and return a folder for it.

        ``beside``: bytes of the version on disk that stays until this one is published.

        Raises:
            TooLarge: it can never fit within the budget; nothing was downloaded.
            NoRoom: what is in the way is leased, or not ours.
            Contention: give up, and try again with more.
        """
        self._clear_debris()
        self._refresh()
        staging = Staging(wish, self._store.path, beside=beside)
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

    def grow(self, staging: Staging, amount: int) -> None:
        """Charge bytes about to be written (negative: given back); make room where the reservation is used up.

        Raises:
            TooLarge, NoRoom, Contention: as ``stage``.
        """
        staging.charged += amount
        if staging.charged > staging.reserved:
            self._room.reserve(staging, staging.charged - staging.reserved)

    def discard(self, staging: Staging) -> None:
        """Delete what was staged, and give its reservation back."""
        if not self._store.discard(staging.folder):  # no descriptor left, say: its bytes count until it is gone
            with self._guard:
                self.index.debris[staging.folder] = staging.reserved
        self._drop(staging)

    def _clear_debris(self) -> None:
        with self._guard:
            debris = list(self.index.debris)
        gone = [folder for folder in debris if self._store.discard(folder)]
        with self._guard:
            for folder in gone:
                self.index.debris.pop(folder, None)

    def _drop(self, staging: Staging) -> None:
        with self._guard:
            self.index.stagings.discard(staging)
            self._guard.notify()

    def publish(self, staging: Staging, record: Record) -> Held:
        """Make a staged artifact visible, durably, and return it pinned.

        Raises:
            TooLarge, NoRoom, Contention: what the file system allocated does not fit.
            OSError: the disk is full, or broken.
        """
        size = self._store.seal(staging.folder, record)
        if size > staging.reserved:
            self._room.reserve(staging, size - staging.reserved)
        prefix = folder_prefix(self._source, record.model)
        pin = self._store.pin(staging.folder)  # before anybody sees it, so that nobody removes it first
        try:
            folder = self._store.publish(staging.folder, prefix)
        except BaseException:
            if pin is not None:
                pin.close()
            raise
        with self._guard:
            self.index.stagings.discard(staging)
            old = [item for name, item in self.index.items.items() if name.startswith(prefix) and not item.leaving]
            item = self.index.add(Published(record, folder, size, record.fetched))
            item.pins += 1
            for stale in old:
                stale.doomed = True
                stale.leaving = not stale.pins
            self._guard.notify()
        self._room.remove([stale for stale in old if stale.leaving])
        return Held(item, pin)

    def reset_after_fork(self, kept: Iterable[Held]) -> None:
        """In a child: no I/O but closing descriptors.

        Args:
            kept: what models that were loaded before the fork keep pinned; ``adopt`` each of them later.
        """
        kept = list(kept)
        self._store.reset_after_fork(held.pin for held in kept if held.pin is not None)
        self.index.reset_after_fork()
        for held in kept:
            held.item.pins += 1

    def adopt(self, held: Held) -> None:
        """In a child: replace the pin that a held artifact inherited by one of our own."""
        inherited = held.pin
        try:
            own = self._store.pin(held.item.published.folder) if inherited is not None else None
        except OSError:  # no descriptor left: the inherited one holds as well
            own = None
        if own is None or inherited is None:
            return
        with self._guard:
            swapped = held.pin is inherited  # else the model has left meanwhile, and its pin with it
            if swapped:
                held.pin = own
        (inherited if swapped else own).close()

    def close(self) -> None:
        """Remove this process's temporary folder; the artifacts stay for the next start."""
        self._store.close()

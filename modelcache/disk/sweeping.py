"""Puts the ledger and the folders of a disk tier in step: at the start, and for processes that have died.

Folders of live processes are left alone: each has its own temporary folder locked (``disk.workshop``).
"""

import contextlib
import functools
import logging
import secrets
from collections.abc import Mapping

import attrs

from modelcache.disk.book import Book, Hold
from modelcache.disk.items import Item
from modelcache.disk.layout import published
from modelcache.disk.ledger import OPENING, patience
from modelcache.disk.published import Published
from modelcache.disk.states import State
from modelcache.disk.store import Store

_log = logging.getLogger("modelcache")


def reconcile(store: Store, known: Mapping[str, Item]) -> bool:
    """Take in folders that the ledger does not know, and drop what it knows and is not there.

    Args:
        store: the folder.
        known: what the ledger said just now.

    Returns:
        Whether there was anything to correct.

    Raises:
        OSError: the disk is full, or broken.
    """
    listed = store.listed()
    if listed is None:
        return False
    strange = [name for name in listed if name not in known]
    found = {name: store.read(name) for name in published(strange)}
    absent = set(known).difference(listed) if len(listed) - len(strange) < len(known) else set[str]()
    lost = [name for name in absent if known[name].state in {State.PRESENT, State.DOOMED} and not store.exists(name)]
    fresh = [at for at in found.values() if at is not None]
    if fresh or lost:
        with contextlib.suppress(TimeoutError):
            store.ledger.change(lambda book: _correct(book, store, fresh, lost), patience())
    for name, at in found.items():
        if at is None and store.exists(name):
            _clear(store, name)
    return bool(fresh or lost)


def _correct(book: Book, store: Store, fresh: list[Published], lost: list[str]) -> None:
    known = book.names()
    there = [at for at in fresh if at.name not in known and store.exists(at.name)]  # else removed meanwhile
    book.add(((at.name, at.record, at.used) for at in there), State.PRESENT, None)
    for name in lost:
        if known.get(name) in {State.PRESENT, State.DOOMED}:  # else somebody removes it
            book.missing(name, store.workshop.taker(name) if store.writable else None)


def _clear(store: Store, name: str) -> None:
    """Remove a published folder whose record can't be read, so that its bytes do not go uncounted."""
    if not store.writable:
        return
    _log.warning("%s in %s is damaged: removed, to be fetched again", name, store.path)
    try:
        aside, size = store.workshop.aside(name), store.taken(name)
        hold = Hold(secrets.token_hex(8), store.owner, "", "", size, size, 0)
        store.ledger.change(lambda book: book.hold(hold), patience())  # nobody has counted it yet
        ids = [hold.id]
        with contextlib.suppress(FileNotFoundError):  # another one that starts removes it
            moved = store.remove(name, aside)
            if moved is None or not store.discard(moved):
                return  # it counts until this process ends
            ids.append(moved.name)  # as a ledger that was made anew meanwhile has it
        store.ledger.change(lambda book: book.let_go(ids), patience(OPENING))
    except OSError as error:
        _log.warning("%s can't be removed (%s): look at its owner and mode", name, error)


def sweep(store: Store) -> None:
    """Delete what dead processes left, and give back what was set aside for them.

    Raises:
        OSError: the disk is full, or broken.
    """
    if not store.writable:
        return
    owners = store.ledger.look(Book.owners)  # before the look at their folders, which come first
    swept = store.sweep()
    dead = owners.intersection(swept) | (owners - store.workshop.all())
    for owner in dead:
        gone = swept.get(owner, True)
        left = store.ledger.look(lambda book, owner=owner: book.owned(owner))  # type: ignore[misc]
        there = {name for name, _ in left if store.exists(name)}
        taken = 0 if gone else store.workshop.taken_by(owner)
        with contextlib.suppress(TimeoutError):  # a process was stopped while it wrote: with the next sweep
            store.ledger.change(functools.partial(_bury, owner=owner, there=there, taken=taken, gone=gone), patience())


def _bury(book: Book, owner: str, there: set[str], taken: int, *, gone: bool) -> None:
    """Forget a dead process; what it had just published is served, what it was removing goes first.

    ``gone``: what it left is deleted; else the bytes ``taken`` by it count until it can be, but nobody waits for it.
    """
    left = book.owned(owner)  # anew: who buried it meanwhile has given that to all, and somebody may remove it now
    lost = [name for name, _ in left if name not in there]
    arrived = [name for name, state in left if name in there and state is State.ARRIVING]
    stayed = [name for name, state in left if name in there and state is not State.ARRIVING]
    book.mark(arrived, State.PRESENT, None)
    book.mark(stayed, State.DOOMED, None)
    if not gone:  # it was moved aside, or was not published yet: its bytes lie in what can't be deleted now
        for name, size in book.sizes(lost).items():
            part = min(size, taken)
            taken -= part
            book.hold(Hold(name, owner, "", "", part, part, 0))
    book.gone(lost)
    for hold in book.holds() if not gone else ():
        if hold.owner == owner:
            book.hold(attrs.evolve(hold, source="", model="", charged=hold.reserved, wanted=0))
    if gone:
        book.bury(owner)
    else:
        book.leave(owner)

"""Who a thread is, for as long as anybody remembers: ``threading.get_ident`` is given out again after a thread ends."""

import threading


class Who:
    """One thread of this process.

    Attributes:
        name: as it was called when it was first seen.
    """

    __slots__ = ("name",)

    def __init__(self) -> None:
        self.name = threading.current_thread().name


here = threading.local()
"""``here.token`` is a ``Who`` that no other thread has, now or later, once ``me`` was called on this thread.

A plain ``local``, not a subclass that fills itself: reading that costs twice as much, and a warm lease reads it.
"""


def me() -> object:
    """Return the calling thread's token; takes no lock."""
    try:
        return here.token
    except AttributeError:
        here.token = Who()
        return here.token

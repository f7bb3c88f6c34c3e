"""Who a thread is, for as long as anybody remembers: ``threading.get_ident`` is given out again after a thread ends."""

import threading


class Identity(threading.local):
    """``identity.token`` is an object that no other thread has, now or later; reading it takes no lock."""

    def __init__(self) -> None:
        self.token = object()


identity = Identity()

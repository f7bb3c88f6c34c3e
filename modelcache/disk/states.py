"""What is to become of a published folder, as all processes that share it know."""

import enum
from typing import Final


class State(enum.IntEnum):
    """What is to become of a published folder."""

    PRESENT = 0
    """It is served."""
    ARRIVING = 1
    """Its owner is about to publish it; its bytes count."""
    DOOMED = 2
    """It is old or deleted: nobody begins to read it, and it goes once nobody reads it."""
    LEAVING = 3
    """Its owner is removing it; its bytes count until it is gone."""
    GONE = 4
    """It is no more."""
    EXPELLED = 5
    """Its owner is removing it, and where that can't be now, it is doomed: it was replaced or deleted meanwhile."""


STATES = tuple(State)
"""By number: a call of the class takes ten times as long."""

REMOVING: Final = frozenset({State.LEAVING, State.EXPELLED})
"""What has a process that removes it: nobody else does, and its bytes count until that one says that it is gone."""

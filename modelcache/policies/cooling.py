"""``Cooling``: models in the order of a score that only falls while nobody asks for them, without scoring all of them.

It serves ``worth``, whose formula this is: ``n**2 * price / (age * idle)``, both counted up to now. Which of two models
is worth less may change with nothing but time, so no heap holds. What holds is a floor: when a score will fall below it
is known beforehand. So models lie on levels, each with a floor; few on the lowest, more on each above. A model is
looked at again when it was asked for, or when its score passes the floor of its level; the least of all lie on the
lowest level, and only those are scored to find a victim. An empty level makes place for the lowest part of the next.
"""

import bisect
import heapq
import math
from collections.abc import Iterator, Mapping

import attrs

PIECE = 64
"""Models on the lowest level after it was filled; each above has four times as many."""

Scored = tuple[float, float, str]
"""A score, the last request, and the id."""

_MOST = 2 * PIECE  # models on a level that are scored at once; of more, the lowest are parted from the rest
_PARTED = 3  # levels that are parted in one answer: who wants more, gets them level by level
_LEVELS = 32  # above that two small ones become one
_NEVER = 2.0**53  # no clock comes there


@attrs.define(eq=False)
class Life:
    """What is known of the requests for one model.

    Attributes:
        n: requests; 0: it came in and nobody has asked for it yet.
        since: the first of them that counts, by the policy's clock.
        last: the last of them.
        price: seconds to bring back a byte, squared; 0: unknown, or the model is not here.
        level: where it lies.
        due: when it is looked at again, by the clock.
    """

    n: float
    since: float
    last: float
    price: float = 0.0
    level: "Level | None" = None
    due: float = math.inf


@attrs.define(eq=False)
class Level:
    """Models with a score of at least ``floor``, and less than the floor of the level above."""

    floor: float
    members: dict[str, Life] = attrs.field(factory=dict)


class Cooling:
    """The order of some models.

    Attributes:
        lives: theirs, by id; to be read.

    Cost: :meth:`ascending` to its first model about 50 microseconds, however many there are; each request since the
    last call of it adds some, and the first call after very many scores all of them. All else O(1).

    Concurrency: as :class:`~modelcache.policies.Policy` says.
    """

    def __init__(self) -> None:
        self.lives: dict[str, Life] = {}
        self._levels = [Level(0.0)]
        self._floors = [0.0]
        self._looks: list[tuple[float, str]] = []  # a heap: when, and at what
        self._loose: dict[str, None] = {}  # asked for, or came in, since they were placed

    def __len__(self) -> int:
        """Return how many models there are."""
        return len(self.lives)

    def put(self, model: str, life: Life) -> None:
        """Take in a model, or note that its score has changed otherwise than by time."""
        self.lives[model] = life
        self._loose[model] = None

    def fill(self, lives: Mapping[str, Life]) -> None:
        """Take in many."""
        self.lives.update(lives)
        self._loose.update(dict.fromkeys(lives))

    def drop(self, model: str) -> None:
        """Let go of a model; unknown ids are ignored."""
        life = self.lives.pop(model, None)
        if life is None:
            return
        self._loose.pop(model, None)
        if life.level is not None:
            life.level.members.pop(model, None)
        life.level, life.due = None, math.inf

    def ascending(self, now: float) -> Iterator[Scored]:
        """Give score, last request and id of all, the lowest first; good until another method is called."""
        self._catch_up(now)
        place = parted = 0
        while place < len(self._levels):
            if len(self._levels[place].members) > _MOST and parted < _PARTED:
                self._part(place, now)
                parted += 1
            yield from sorted(scores(self._levels[place].members, now))
            place += 1

    def _catch_up(self, now: float) -> None:
        """Place anew what was asked for, and what has passed a floor meanwhile."""
        loose, self._loose = self._loose, {}
        if len(loose) > len(self.lives) // 2:
            self._start_over()
        else:
            for model in loose:
                self._place(model, self.lives[model], now)
            while self._looks and self._looks[0][0] <= now:
                due, model = heapq.heappop(self._looks)
                life = self.lives.get(model)
                if life is not None and life.due == due:
                    life.due = math.inf
                    self._place(model, life, now)
        self._tidy()

    def _start_over(self) -> None:
        level = Level(0.0, dict(self.lives))
        for life in self.lives.values():
            life.level, life.due = level, math.inf
        self._levels, self._floors, self._looks = [level], [0.0], []

    def _place(self, model: str, life: Life, now: float) -> None:
        score = (life.n * life.n or 1.0) * (life.price or 1.0) / ((now - life.since) * (now - life.last))
        level = self._levels[bisect.bisect_right(self._floors, score) - 1]
        if level is not life.level:
            if life.level is not None:
                life.level.members.pop(model, None)
            level.members[model] = life
            life.level = level
        if _lower(life, level.floor, now):
            heapq.heappush(self._looks, (life.due, model))

    def _part(self, place: int, now: float) -> None:
        """Make several levels of one, the lowest a small one."""
        level = self._levels[place]
        scored = sorted(scores(level.members, now))
        levels, start, size, looks = list[Level](), 0, PIECE, list[tuple[float, str]]()
        while start < len(scored):
            end = start + size if len(scored) - start - size > PIECE else len(scored)
            piece = Level(scored[start][0] if start else level.floor)
            for _, _, model in scored[start:end]:
                life = piece.members[model] = level.members[model]
                life.level = piece
                if _lower(life, piece.floor, now):
                    looks.append((life.due, model))
            levels.append(piece)
            start, size = end, size * 4
        self._levels[place : place + 1] = levels
        self._floors[place : place + 1] = [piece.floor for piece in levels]
        if 8 * len(looks) > len(self._looks):  # faster then
            self._looks += looks
            heapq.heapify(self._looks)
        else:
            for look in looks:
                heapq.heappush(self._looks, look)

    def _tidy(self) -> None:
        """Keep levels and looks few."""
        if not all(level.members for level in self._levels):
            self._levels = [level for level in self._levels if level.members] or [Level(0.0)]
            self._levels[0].floor = 0.0
            self._floors = [level.floor for level in self._levels]
        while len(self._levels) > _LEVELS:
            sizes = [len(level.members) for level in self._levels]
            least = min(range(1, len(sizes)), key=lambda place: sizes[place - 1] + sizes[place])
            self._join(least)
        if len(self._looks) > 4 * len(self.lives) + 1024:
            self._looks = [(life.due, model) for model, life in self.lives.items() if life.due < math.inf]
            heapq.heapify(self._looks)

    def _join(self, place: int) -> None:
        """Make one level of one and the one below it; looks that come too early do no harm."""
        upper, lower = self._levels.pop(place), self._levels[place - 1]
        del self._floors[place]
        for life in upper.members.values():
            life.level = lower
        lower.members.update(upper.members)


def _lower(life: Life, floor: float, now: float) -> bool:
    """Have a model looked at no later than when its score passes a floor; return whether that is earlier than before.

    The score is the floor where age times idle is ``n**2 * price / floor``, which is a quadratic equation.
    """
    product = (life.n * life.n or 1.0) * (life.price or 1.0) / floor if floor else math.inf
    apart = life.last - life.since
    when = life.last + 2 * product / (apart + math.sqrt(apart * apart + 4 * product))
    if not (when < _NEVER and when < life.due):  # also where it is not a number
        return False
    life.due = max(float(math.floor(when)), now + 1)
    return True


def scores(lives: Mapping[str, Life], now: float, usual: float = 1.0) -> list[Scored]:
    """Return score, last request and id of each; ``usual``: what an unknown price is taken to be."""
    return [
        ((one.n * one.n or 1.0) * (one.price or usual) / ((now - one.since) * (now - one.last)), one.last, model)
        for model, one in lives.items()
    ]

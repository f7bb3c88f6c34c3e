"""``Allowed``: which models may go, asked one by one instead of listed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Allowed(AbstractSet[str], Generic[T]):
    """The ids of a tier whose models may go now, as a set that is never built.

    ``in`` looks at one model. Iteration and ``len`` look at all of them, so that a policy which only asks about those
    that it would give costs the same however many there are. It shows the tier as it is at each look.

    Concurrency: read under the tier's lock.

    Args:
        models: what is in the tier, by id.
        may: whether one of these may go.
    """

    __slots__ = ("_may", "_models")

    def __init__(self, models: Mapping[str, T], may: Callable[[T], bool]) -> None:
        self._models = models
        self._may = may

    @classmethod
    def _from_iterable(cls, it: Iterable[S]) -> AbstractSet[S]:  # what &, | and - make
        return frozenset(it)

    def __contains__(self, model: object) -> bool:
        found = self._models.get(model)  # type: ignore[call-overload]  # any key may be asked for
        return found is not None and self._may(found)

    def __iter__(self) -> Iterator[str]:
        return (model for model, found in self._models.items() if self._may(found))

    def __len__(self) -> int:
        return sum(1 for _ in self)

"""Whether evicting helps: rounds of batches that free far less than they promise, time after time, are stopped.

What grew then is not the cache's, or somebody still holds the models. Every method runs under the cache's guard;
``memory.evicting`` weighs each batch and tells.
"""

_MISSED = 2  # a round that frees less than half of what it promised may have left cycles
_ROW = 3  # such rounds in a row
_SHARE = 10  # a batch that frees less than a tenth of what it promised has not helped
_LONGEST = 8  # times the first rest, which doubles as long as evicting does not help


class Futility:
    """One cache's experience with its latest evictions.

    Args:
        rest: seconds that evictions pause at first, before one more round is tried.
    """

    def __init__(self, rest: float) -> None:
        self._rest = rest
        self._times = 1
        self._row = 0
        self._promised = self._freed = self._explained = 0
        self._until = 0.0
        self._spared = 0.0
        self._largest = 0  # bytes of the largest model that left in vain
        self._joined = 0  # bytes of what went together though evictions rest
        self._joined_until = 0.0
        self._used = 0  # bytes in use after the latest round that did not help
        self.promised = 0
        self.freed = 0
        self.episode = False

    def stopped(self, now: float) -> bool:
        """Whether evictions for the watermark rest now, as they did not help."""
        return self._row >= _ROW and now < self._until

    def spare(self, size: int, now: float, *, together: bool = False) -> bool:
        """Whether a model may go all the same, for a load that is refused else; not soon again, if it does not help.

        It must be larger than all that did not help: these were perhaps small ones among others on the heap. Several
        may go together that promise more than any of these, and than those that went together before.
        """
        if together:
            if now < self._joined_until or size <= max(self._largest, self._joined):
                return False
            self._joined, self._joined_until = size, now + self._rest * _LONGEST
            return True
        if now < self._spared or size <= self._largest:
            return False
        self._spared = now + self._rest * _LONGEST
        return True

    @property
    def verging(self) -> bool:
        """Whether one more round that does not help begins an episode."""
        return self._row == _ROW - 1

    @property
    def vain(self) -> int:
        """Bytes that the rounds before an episode promised in vain: the next one promises as many, to find what helps.

        Small models of plain objects leave holes in the heap; a larger one among them may give its memory back.
        """
        return 0 if self.episode else self.promised

    def missing(self, promised: int, freed: int, explained: int, grain: int) -> int:
        """Return the bytes that are worth a look, as they have not come back in a round that is over with this batch.

        After a round that did not help another look is in vain, but for the last one before an episode; then, and where
        enough came back, it is 0.
        """
        if self._row > 0 and not self.verging:
            return 0
        total = self._promised + promised
        missing = total - self._freed - freed - max(self._explained, explained)
        return missing if total >= grain and missing * _MISSED > total else 0

    def judge(
        self, promised: int, freed: int, explained: int, used: int, grain: int, now: float, *, largest: int
    ) -> bool:
        """Weigh a batch; return whether this one begins an episode, which is to be told.

        Args:
            promised: bytes by which the gauge should fall: its footprints, but for mapped pages that were never used.
            freed: bytes that the gauge fell by.
            explained: bytes that loads under way may have taken meanwhile.
            used: bytes in use now.
            grain: bytes that the batches of a round must promise in all, to tell anything.
            now: monotonic seconds.
            largest: bytes of the largest model of the batch.
        """
        self._promised += promised
        self._freed += freed
        self._explained = max(self._explained, explained)
        self._largest = max(self._largest, largest)
        if self._promised < grain:
            return False
        helped = (self._freed + self._explained) * _SHARE >= self._promised and self._freed + self._explained > 0
        if helped:
            self.over()
            return False
        self._row += 1
        self._used = used
        self.promised += self._promised
        self.freed += self._freed
        self._promised = self._freed = self._explained = 0
        if self._row < _ROW:
            return False
        self._until = now + self._rest * self._times
        self._times = min(self._times * 2, _LONGEST)
        begins, self.episode = not self.episode, True
        return begins

    def look(self, used: int, low: int) -> None:
        """Forget where memory has come back after all.

        Memory that is merely below the watermark says nothing: newcomers are made room for from there.

        Args:
            used: bytes in use now, less than the watermark.
            low: bytes at which there is room in plenty.
        """
        if used <= low or (self._used - used) * 2 >= self.promised:
            self.over()

    def over(self) -> None:
        """Forget: a batch helped, or memory came back."""
        self._row = 0
        self._times = 1
        self._spared = self._joined_until = 0.0
        self._largest = self._joined = 0
        self._promised = self._freed = self._explained = 0
        self.promised = self.freed = 0
        self.episode = False

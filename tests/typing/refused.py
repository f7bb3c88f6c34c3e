"""What a strict type checker must refuse: each marked line, and no other."""

from modelcache import DiskTier, Evicted, Loaded, ModelCache

cache = ModelCache("models", load=lambda path: path.read_text())
cache.prefetch(["a"], tier="disc")  # refused
cache.memory.high = 0.8  # refused
cache.get(3)  # refused
ModelCache("models", load=3)  # refused
DiskTier("folder", budget=2.5)  # refused


def told(event: Evicted) -> None:
    """Take an event of one type."""


cache.on(Loaded, told)  # refused

"""The memory tier: models in memory, held by leases, within watermarks, a budget and a count."""

from modelcache.memory.entries import Lease
from modelcache.memory.tier import MemoryTier

__all__ = ["Lease", "MemoryTier"]

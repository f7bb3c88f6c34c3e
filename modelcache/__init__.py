"""Serve more models than fit in memory from one process, and see every load, unload and evict with its reason.

Start with ``ModelCache``. Protocols that you may implement live in their own modules: ``modelcache.sources.Source``,
``modelcache.gauges.Gauge``, ``modelcache.policies.Policy``.
"""

from modelcache.cache import ModelCache
from modelcache.disk import DiskTier
from modelcache.errors import (
    AccessDenied,
    ArtifactChanged,
    ArtifactCorrupt,
    CacheClosed,
    ConfigError,
    InvalidModelId,
    LoadFailed,
    ModelCacheError,
    ModelNotFound,
    NoRoom,
    SourceUnavailable,
    Timeout,
    TooLarge,
    UnsafeArtifact,
)
from modelcache.events import (
    Event,
    Evicted,
    Failed,
    Fetched,
    Hit,
    Loaded,
    Missed,
    Pressure,
    Reason,
    Reclaimed,
    Thrashing,
    Unloaded,
)
from modelcache.memory import Lease, MemoryTier
from modelcache.prefetching import Prefetch
from modelcache.reports import ModelInfo, Stats
from modelcache.sources import LocalSource, S3Source

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "ArtifactChanged",
    "ArtifactCorrupt",
    "CacheClosed",
    "ConfigError",
    "DiskTier",
    "Event",
    "Evicted",
    "Failed",
    "Fetched",
    "Hit",
    "InvalidModelId",
    "Lease",
    "LoadFailed",
    "Loaded",
    "LocalSource",
    "MemoryTier",
    "Missed",
    "ModelCache",
    "ModelCacheError",
    "ModelInfo",
    "ModelNotFound",
    "NoRoom",
    "Prefetch",
    "Pressure",
    "Reason",
    "Reclaimed",
    "S3Source",
    "SourceUnavailable",
    "Stats",
    "Thrashing",
    "Timeout",
    "TooLarge",
    "Unloaded",
    "UnsafeArtifact",
]

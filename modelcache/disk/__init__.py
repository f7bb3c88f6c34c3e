"""The disk tier: artifacts of models in a folder, within a byte budget, shared by the processes of one host."""

from modelcache.disk.tier import DiskTier

__all__ = ["DiskTier"]

"""Where events can go: one module a destination, each of which imports events and nothing of the cache.

Here is only what needs no further library: :func:`log`. How events reach a sink is ``hooks``.
"""

from modelcache.sinks.logs import log

__all__ = ["log"]

"""Replays recorded requests through policies: ``traces`` read, ``tiers`` replay, ``peers`` and ``offline`` compare.

It imports ``modelcache.policies`` and nothing else of the library, which never imports it. The command is
``python -m benchmarks.policies``.
"""

"""Replays recorded requests through policies: ``traces`` read, ``tiers`` and ``two`` replay, ``peers`` compare.

It imports ``modelcache.policies`` and nothing else of the library, which never imports it. The command is
``python -m benchmarks.policies``, for memory over disk ``python -m benchmarks.two_tiers``.
"""

"""The policies of libCacheSim, an independent simulator in C, where its Python package is installed."""

import importlib.util
from typing import Any

from benchmarks.simulator.tiers import Outcome, outcome
from benchmarks.simulator.traces import Trace

NAMES = ("LRU", "S3FIFO", "Belady")
"""Which of them are run."""

INSTALLED = importlib.util.find_spec("libcachesim") is not None
"""Whether they can be."""

_NEVER = 2**63 - 1


def replay(trace: Trace, name: str, capacity: int) -> Outcome:
    """Replay a trace through one of libCacheSim's policies, one request after the other."""
    import libcachesim  # noqa: PLC0415 - not everybody has it

    cache: Any = getattr(libcachesim, name)(capacity, hashpower=16)
    number = {model: place for place, model in enumerate(trace.bytes, 1)}
    coming, later = [0] * len(trace.requests), dict.fromkeys(number, _NEVER)
    for place in range(len(trace.requests) - 1, -1, -1):
        model = trace.requests[place]
        coming[place] = later[model]
        later[model] = place + 1
    missed = []
    for model, following in zip(trace.requests, coming, strict=True):
        size = trace.bytes[model]
        request = libcachesim.Request(obj_id=number[model], obj_size=size, next_access_vtime=following)
        if not cache.get(request):
            missed.append(model)
    return outcome(trace, missed, trace.load)

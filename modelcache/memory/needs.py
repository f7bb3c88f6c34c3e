"""How many bytes are set aside for a load, of what it is expected to take. Who is let in is ``memory.admission``."""

import math

import attrs

from modelcache.memory.footprints import Plan
from modelcache.memory.tier import Limits


def sober(plan: Plan, limits: Limits) -> Plan:
    """Return the plan of a load, which what other models became may not make larger than half of what is allowed."""
    if plan.sure or limits.most == math.inf:
        return plan
    return attrs.evolve(plan, resident=min(plan.resident, max(plan.artifact, int(limits.most // 2))))


def peak(plan: Plan, limits: Limits) -> int:
    """Return the bytes to reserve for a peak: one that is only estimated takes no more than half of what is allowed."""
    return plan.peak if plan.peak_sure else min(plan.peak, max(plan.resident, limits.high // 2))


def bare(plan: Plan, limits: Limits) -> int:
    """Return the least to reserve: a peak that was measured may go beyond ``high``, but not beyond the limit."""
    if not plan.peak_sure or limits.reading is None:
        return plan.resident
    return max(plan.resident, plan.peak - max(limits.reading.limit - limits.high, 0))

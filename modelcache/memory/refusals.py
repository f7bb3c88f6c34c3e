"""Errors of a memory tier that has no room, in words that say what stands in the way and what to do.

When they are raised is ``memory.admission``.
"""

from typing import Any

from modelcache.errors import NoRoom, TooLarge
from modelcache.events import Reason
from modelcache.memory.footprints import Plan
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import Limits
from modelcache.units import format_bytes, format_holders

_SETTING = {Reason.WATERMARK: "high", Reason.MEMORY_BUDGET: "budget", Reason.MAX_MODELS: "max_models"}


def no_room(model: str, shortage: Shortage, residents: Residents[Any]) -> NoRoom:
    """Return the error that says what is in the way; the guard is held."""
    holders = residents.holders()
    figures = shortage.figures
    need = figures["need"]
    show = str if shortage.reason is Reason.MAX_MODELS else format_bytes
    setting = f"memory.{_SETTING[shortage.reason]}"
    if shortage.fits:
        why = "others wait for room before it: ask again"
    elif holders:
        why = f"leases hold {format_holders(holders)}: release leases, or raise {setting}"
    elif shortage.reason is Reason.WATERMARK and (lingering := residents.lingering.bytes()):
        why = (
            f"evicting did not help, as somebody still references evicted models of {format_bytes(lingering)}: "
            f"drop these references, use lease() rather than get(), or raise {setting}"
        )
    elif residents.tracked():
        why = f"evicting did not help: free memory elsewhere in this process, or raise {setting}"
    else:
        why = f"that is the process without any model: raise {setting} well above it"
    return NoRoom(
        f"no room in memory for {model!a}: it needs {show(need)}, {setting} allows "
        f"{show(figures['high'])} and {show(figures['used'])} are used; {why}",
        model=model,
        tier="memory",
        need=need,
        used=figures["used"],
        limit=figures["high"],
        holders=holders,
    )


def refuse_too_large(model: str, plan: Plan, limits: Limits) -> None:
    """Let pass only what could fit with nothing else in memory.

    Raises:
        TooLarge: it could not.
    """
    bounds = [("budget", limits.budget)] if limits.budget is not None else []
    if limits.reading is not None:
        bounds.append(("high", limits.high))
    for setting, bound in bounds:
        if plan.resident > bound:
            raise TooLarge(
                f"model {model!a} needs {format_bytes(plan.resident)} of memory, more than memory.{setting} = "
                f"{format_bytes(bound)} allows with nothing else loaded: raise it, or serve the model elsewhere",
                model=model,
                tier="memory",
                need=plan.resident,
                limit=bound,
            )

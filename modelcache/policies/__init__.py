"""Which model to evict: the :class:`Policy` protocol, LRU, LFU and FIFO, and ``worth``, which weighs load seconds.

Whether anything has to go, how much, and what may go (nothing leased) is decided by the tiers, which then ask
here. How much memory is in use is told by ``gauges``.
"""

from collections.abc import Callable
from typing import TypeGuard

from modelcache.errors import ConfigError
from modelcache.policies.base import Policy, Remembering, Resident, Standing, recall_order
from modelcache.policies.guarded import STRAY_LIMIT, Guarded
from modelcache.policies.ranked import RANKED, Ranked
from modelcache.policies.views import Allowed
from modelcache.policies.worth import Restored, Worth

__all__ = [
    "STRAY_LIMIT",
    "Allowed",
    "Guarded",
    "Policy",
    "Ranked",
    "Remembering",
    "Resident",
    "Restored",
    "Standing",
    "Worth",
    "make_policy",
    "recall_order",
]

_BUILT_IN: dict[str, Callable[[], Ranked | Worth]] = {**RANKED, "worth": Worth}
_METHODS = ("requested", "admitted", "removed", "victims")


def make_policy(policy: str | Policy, setting: str) -> Policy:
    """Return a policy for one tier.

    Args:
        policy: ``"lru"``, ``"lfu"``, ``"fifo"``, ``"worth"``, or an object with the methods of :class:`Policy`,
            which is wrapped in :class:`Guarded`. One object serves one tier.
        setting: name of the setting, for the message.

    Raises:
        ConfigError: anything else, a class instead of an instance of it among them.
    """
    if isinstance(policy, str) and policy in _BUILT_IN:
        return _BUILT_IN[policy]()
    if isinstance(policy, Ranked | Worth | Guarded):
        return policy
    if _is_policy(policy):
        return Guarded(policy)
    names = ", ".join(f'"{name}"' for name in _BUILT_IN)
    raise ConfigError(
        f"{setting}={policy!r:.100} must be {names}, or an object with the methods {', '.join(_METHODS)}",
        setting=setting,
        value=policy,
    )


def _is_policy(policy: object) -> TypeGuard[Policy]:
    return not isinstance(policy, type) and all(callable(getattr(policy, method, None)) for method in _METHODS)

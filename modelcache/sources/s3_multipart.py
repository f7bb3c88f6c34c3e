"""How large the parts of a multipart upload were, which S3 tells one part at a time.

Only then can a checksum of the parts' checksums be compared; how, is in ``checksums``.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from modelcache.sources.checksums import Known, of_parts

_log = logging.getLogger(__name__)


def with_parts(known: Known, answer: Mapping[str, Any], head: Callable[[int], Mapping[str, Any]]) -> Known:
    """Return what is known of an object's checksums, those of its parts among it, where they help.

    The first and the last part are asked for: where both fit, those between them are taken to have one size. Where
    they don't, or can't be asked for, nothing is compared: a good object is never refused for it.

    Args:
        known: what the answer about the whole told.
        answer: that answer.
        head: asks for one part by its number, and returns the answer.
    """
    if known.unchecked is None or known.composite is None:
        return known
    algorithm, digest = known.composite
    count = int(digest.rpartition("-")[2])
    lengths = []
    for number in sorted({1, count}):
        try:
            part = head(number)
        except Exception as error:  # noqa: BLE001 - then it is not compared, and this is said
            _log.debug("the size of part %d is not told: %s", number, type(error).__name__)
            return known
        if part.get("PartsCount") != count:
            return known
        lengths.append(part["ContentLength"])
    first, last = lengths[0], lengths[-1]
    if first * (count - 1) + last != answer["ContentLength"] or not 0 < last <= first:
        return known
    return Known({**known.checksums, of_parts(algorithm, first): digest}, None)

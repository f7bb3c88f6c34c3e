"""What may name a model, decided in one place before any look-up, request or path.

How an id becomes a folder name is the disk tier's business (``disk.layout``), how it becomes a key the source's.
"""

from modelcache.errors import InvalidModelId

MAX_ID_BYTES = 1024
"""Longest id in UTF-8 bytes: the longest key S3 takes (S3 user guide, "Naming Amazon S3 objects")."""


def validate_id(model: object) -> str:
    """Return ``model`` if it can name a model.

    Ids are relative names with ``/`` between their parts, at most 1024 bytes of UTF-8. Ids that differ
    only in case or in Unicode form are different models.

    Raises:
        InvalidModelId: not a str, empty, too long, absolute, with an empty part, ``.`` or ``..``, with a
            control character, or not encodable as UTF-8 (lone surrogates).
    """
    if not isinstance(model, str):
        raise InvalidModelId(f"model id {model!r:.100} must be a str, not {type(model).__name__}", model=None) from None
    problem = _problem(model)
    if problem:
        shown = ascii(model) if len(model) <= 100 else ascii(model[:100]) + "..."  # noqa: PLR2004 - for people
        raise InvalidModelId(
            f"model id {shown} {problem}; an id is a relative name like 'fraud/v3' of at most {MAX_ID_BYTES} bytes",
            model=model,
        ) from None
    return str(model)


def _problem(model: str) -> str | None:  # noqa: PLR0911 - one return a rule
    if not model:
        return "is empty"
    try:
        size = len(model.encode())
    except UnicodeEncodeError:
        return "has a lone surrogate, which has no UTF-8 form"
    if size > MAX_ID_BYTES:
        return f"is {size} bytes long"
    if any(ord(character) < 32 or ord(character) == 127 for character in model):  # noqa: PLR2004 - C0 and DEL
        return "has a control character"
    parts = model.split("/")
    if parts[0] == "":
        return "is an absolute path"
    if ".." in parts or "." in parts:
        return "has a '.' or '..' part, which could lead out of a folder"
    if "" in parts:
        return "has an empty part (two slashes in a row, or one at the end)"
    return None

"""The key rules that sources share: which keys may hold a model, and which names an artifact's files may have.

Whether a key exists, and what it holds, only a source can tell (``s3``, ``local``). Model ids are validated
before they come here (``ids``); names inside an archive are ``archives``' business.
"""

import hashlib
import string
from collections.abc import Callable, Iterable

from modelcache.errors import ConfigError, UnsafeArtifact
from modelcache.sources.base import ARCHIVE_SUFFIXES, RemoteFile

Key = str | Callable[[str], str] | None
"""A template with the field ``{model}``, a function from id to key, or None for the default rule."""

_HOW = 'give a template like "{model}.tar.gz" or a function from model id to key'


def is_archive(key: str) -> bool:
    """Return whether the file at ``key`` must hold an archive, by its suffix (case ignored)."""
    return key.lower().endswith(ARCHIVE_SUFFIXES)


class KeyRule:
    """Which keys to look at for a model, in order; a key that ends in ``/`` is a prefix, fetched as a folder.

    Concurrency: has no state; a ``key`` function is called from several threads at once.

    Args:
        key: a template, a function, or None: an id with an archive suffix is the key as it stands; any other
            is ``{model}.tar.gz`` where that exists, else the prefix ``{model}/``.

    Raises:
        ConfigError: neither, or a template that has another field, a format, or none.
    """

    def __init__(self, key: Key = None) -> None:
        if isinstance(key, str):
            _check_template(key)
        elif key is not None and not callable(key):
            raise ConfigError(f"key={key!r:.200} can't name keys: {_HOW}", setting="key", value=key)
        self._key = key

    def keys(self, model: str) -> tuple[str, ...]:
        """Return the keys that may hold ``model``, the first to be found wins.

        Raises:
            ConfigError: the function raised, or returned no str or an empty one.
        """
        if self._key is None:
            return (model,) if is_archive(model) else (f"{model}.tar.gz", f"{model}/")
        if isinstance(self._key, str):
            return (self._key.format(model=model),)
        key = ask(self._key, "key", model)
        if not isinstance(key, str) or not key:
            raise ConfigError(
                f"model {model!r}: the function given as key= returned {key!r:.200}, which is no key",
                model=model,
                setting="key",
                value=key,
            )
        return (key,)


def ask(function: Callable[[str], object], setting: str, model: str) -> object:
    """Return what the user's ``function`` says of ``model``.

    Raises:
        ConfigError: it raised; the cause is attached.
    """
    try:
        return function(model)
    except Exception as error:
        raise ConfigError(
            f"model {model!r}: the function given as {setting}= raised {type(error).__name__}; see the cause",
            model=model,
            setting=setting,
        ) from error


def _check_template(key: str) -> None:
    problem = None
    try:
        fields = [part[1:] for part in string.Formatter().parse(key) if part[1] is not None]
    except ValueError as error:
        problem = str(error)
    else:
        if not fields:
            problem = "every model would have the same key"
        elif any(field != ("model", "", None) for field in fields):
            problem = "{model} is the only field, and takes no format"
    if problem:
        raise ConfigError(f"key={key!r} is no template ({problem}): {_HOW}", setting="key", value=key)


def check_names(model: str, place: str, names: Iterable[str]) -> None:
    """Let pass only names that are safe relative paths and that can all exist beside one another.

    Args:
        model: id, for the message.
        place: URL that the names are relative to, ending in ``/``, for the message.
        names: paths inside the artifact, ``/`` between parts.

    Raises:
        UnsafeArtifact: a name that leads out, has an empty part or a NUL, or is both a file and a folder.
    """
    known = set(names)
    for name in known:
        parts = name.split("/")
        if "" in parts or "." in parts or ".." in parts or "\0" in name:
            raise _unsafe(model, place, name, "has an empty, '.' or '..' part, or a NUL, so it can't become a file")
        for end in range(1, len(parts)):
            if "/".join(parts[:end]) in known:
                clash = "/".join(parts[:end])
                raise _unsafe(model, place, clash, f"is a file, and a folder too ({name!r}); remove one of them")


def _unsafe(model: str, place: str, name: str, problem: str) -> UnsafeArtifact:
    return UnsafeArtifact(f"model {model!r}: {place}{name} {problem}", model=model, member=name)


def folder_version(files: Iterable[RemoteFile]) -> str:
    """Return one version for several files, whatever their order."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        for part in (file.name, file.version, str(file.size)):
            raw = part.encode("utf-8", "surrogateescape")
            digest.update(b"%d:%b" % (len(raw), raw))
    return digest.hexdigest()

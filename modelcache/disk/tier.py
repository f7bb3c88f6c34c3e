"""``DiskTier``: the settings of the disk tier, and its folder, opened and swept.

What those settings decide, and when, is ``disk.shelf``; the files themselves are ``disk.store``.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from modelcache.disk.ledger import OPENING, patience
from modelcache.disk.opening import told
from modelcache.disk.store import Store
from modelcache.disk.sweeping import sweep
from modelcache.errors import ConfigError
from modelcache.policies import Policy, make_policy
from modelcache.units import Percent, Size, parse_size


class DiskTier:
    """A folder with fetched artifacts, bounded in bytes; all processes of a host may share it.

    The constructor makes the folder where it is missing, checks that it can be used safely, and sweeps what
    dead processes left. An artifact is code (a pickle runs what it likes), so what is made here is private to
    its user unless ``mode`` says otherwise.

    Args:
        path: the folder, on a local file system; made absolute at once. None: one for each source in the
            user's cache folder, decided by the cache.
        budget: most bytes, as the file system allocates them, that artifacts, downloads and unpacking under
            way may take, at every moment: an int, ``"20 GiB"``, or ``"50%"`` of the file system. None:
            bounded by ``min_free`` only.
        min_free: bytes that a fetch must leave free on the file system, for others: an int, a string with a
            unit, or a percentage of the file system. 0 switches the guard off.
        policy: ``"worth"`` (allocated bytes, fetch seconds and frequency), ``"lru"``, ``"lfu"``, ``"fifo"``, or a
            ``policies.Policy``. It is told of memory misses only, in any process.
        mode: permissions of the folders made here; files get the same without the execute bits,
            but for those in an archive that are executable.
        verify: when an artifact's files are read in full and compared with the digest stored at their publication:
            ``"first_use"`` in each process but that which fetched it, ``"always"`` before each load, or ``"never"``.
            What is damaged is removed, told by a ``Failed`` event with reason ``DAMAGED``, and fetched again.
        keep_files: whether a model in memory keeps its artifact on disk, as it may have mapped it. False: your loaders
            read all at once, so the artifact may be evicted as soon as the model is loaded, and room goes to others.

    Raises:
        ConfigError: a setting can't work, or the folder can't be one.
        AccessDenied: the folder can't be read, or what lies in it belongs to somebody else; or it can't be written, and
            holds no models yet (else they are served, with a warning).

    Concurrency: settings may be read and assigned from any thread. An assignment returns once all that must
    go, and may, is gone. A tier serves one cache.
    """

    __slots__ = (
        "_budget",
        "_changed",
        "_keep_files",
        "_min_free",
        "_mode",
        "_policy",
        "_store",
        "_verify",
    )  # an assignment with a typo raises

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        budget: int | str | None = None,
        min_free: int | str = "1 GiB",
        policy: str | Policy = "worth",
        mode: int = 0o700,
        verify: str = "first_use",
        keep_files: bool = True,  # noqa: FBT001, FBT002 - all are given by name
    ) -> None:
        self._budget = _parse_budget(budget)
        self._min_free = parse_size(min_free, "min_free", zero=True)
        self._policy = make_policy(policy, "policy")
        self._mode = _check_mode(mode)
        self._verify = _check_verify(verify)
        self._keep_files = _check_keep_files(keep_files)
        self._store: Store | None = None
        self._changed: Callable[[], None] | None = None
        if path is not None:
            self._open(_absolute(path))

    def _open(self, path: Path) -> Store:
        self._store = store = Store(path, self._mode)
        try:
            with told(path):
                if store.writable:  # else there is only one in memory, made once it is asked
                    store.ledger.look(lambda _: None, patience(OPENING))
                    sweep(store)
                    store.ledger.close()  # until it has a cache, nobody closes it before a fork
        except BaseException:
            store.close()
            raise
        return store

    @property
    def store(self) -> Store:
        """The folder behind this tier.

        Raises:
            ConfigError: the tier has no path yet; it gets one from its cache.
        """
        if self._store is None:
            raise ConfigError("this DiskTier has no path yet: give it to a ModelCache first", setting="path")
        return self._store

    @property
    def path(self) -> Path:
        """The folder, absolute."""
        return self.store.path

    @property
    def budget(self) -> int | None:
        """Most bytes on disk; None: bounded by ``min_free`` only. May be assigned at any time."""
        return self._bytes(self._budget) if self._budget is not None else None

    @budget.setter
    def budget(self, value: int | str | None) -> None:
        self._budget = _parse_budget(value)
        self._tell()

    @property
    def min_free(self) -> int:
        """Bytes to leave free on the file system. May be assigned at any time."""
        return self._bytes(self._min_free)

    @min_free.setter
    def min_free(self, value: int | str) -> None:
        self._min_free = parse_size(value, "min_free", zero=True)
        self._tell()

    @property
    def policy(self) -> Policy:
        """Who gives way first; fixed at construction."""
        return self._policy

    @property
    def verify(self) -> str:
        """When artifacts are compared with their digest; fixed at construction."""
        return self._verify

    @property
    def keep_files(self) -> bool:
        """Whether models in memory keep their artifacts; fixed at construction."""
        return self._keep_files

    def _bytes(self, size: Size) -> int:
        return size.of(self.store.total()) if isinstance(size, Percent) else size

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed()

    @property
    def bound(self) -> bool:
        """Whether it serves a cache already."""
        return self._changed is not None

    def bind(self, source: str, changed: Callable[[], None]) -> None:
        """Attach the tier to its one cache; called by ``ModelCache``.

        Args:
            source: URL of the cache's source; decides the folder where the user gave none.
            changed: called after each assignment, without any lock held.
        """
        if self._store is None:
            self._open(_default_folder(source))
        self.store.adopt()
        self._changed = changed


def _check_mode(mode: object) -> int:
    if isinstance(mode, int) and not isinstance(mode, bool) and mode & ~0o777 == 0 and mode & 0o700 == 0o700:  # noqa: PLR2004 - bits
        return mode
    raise ConfigError(
        f"mode={mode!r} must be permission bits that give the owner all, like 0o700 or 0o770",
        setting="mode",
        value=mode,
    )


def _check_verify(verify: object) -> str:
    if isinstance(verify, str) and verify in {"never", "first_use", "always"}:
        return verify
    raise ConfigError(f"verify={verify!r} must be 'never', 'first_use' or 'always'", setting="verify", value=verify)


def _check_keep_files(keep_files: object) -> bool:
    if isinstance(keep_files, bool):
        return keep_files
    raise ConfigError(f"keep_files={keep_files!r} must be True or False", setting="keep_files", value=keep_files)


def _parse_budget(value: int | str | None) -> Size | None:
    return None if value is None else parse_size(value, "budget")


def _absolute(path: str | os.PathLike[str]) -> Path:
    try:
        text = os.fspath(path)
        if text and "\0" not in text:
            return Path(text).expanduser().absolute()
        error: Exception = ValueError("empty, or with a NUL")
    except (TypeError, RuntimeError) as problem:
        error = problem
    raise ConfigError(f"path={path!r} must be a str or a Path ({error})", setting="path", value=path) from error


def _default_folder(source: str) -> Path:
    """Return a folder for this source in the user's cache folder (XDG base directories; macOS: Library/Caches)."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base.absolute() / "modelcache" / hashlib.sha256(source.encode()).hexdigest()[:16]
